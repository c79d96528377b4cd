"""Half of every image is missing: learning from what is left, and drawing the rest.

Each image has lost half of its pixels, at random or its lower half, also those to train on. What is
missing does not depend on what would stand there, so a story is fitted to what there is,

    log p(x_o) = log integral p(x_o, x_m) dx_m,    o: observed, m: missing,

and the missing pixels have a distribution, p(x_m | x_o), instead of a value. Three stories:

    pixel means        x ~ N(m, diag s^2): a missing pixel is its mean, whatever the others are
    Gaussian mixture   c ~ pi, x ~ N(m_c, diag s_c^2): p(x_o) and p(x_m | x_o) are exact
    VAE                z ~ N(0, I), x ~ N(m(z), s(z)^2): the encoder sees which pixels are missing
                       and makes do with the others, q(z | x_o); importance weights correct it

Measured on held-out images: log p(x_o); log p(x_m | x_o) = log p(x) - log p(x_o), how well the
pixels that were hidden are foretold; and the root mean square error of E[x_m | x_o]. Images are in
grey values, dequantised (see density_baselines.py).

    python examples/missing_pixels.py                        # 8 x 8 digits of scikit-learn
    python examples/missing_pixels.py --data folder/of/MNIST
"""

import argparse
import math
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pyro.distributions as dist
import torch
from common import arguments, save
from density_baselines import Levels, Rescaled, levels
from torch import Tensor, nn

import pyro_lvm as lvm

MISSING = -1.0  # what the encoder gets in the place of a pixel


def main() -> None:
    args = arguments(__doc__, epochs=80)
    data = levels(args.data)
    models = {"pixel means": means(data), "Gaussian mixture": mixture(data), "VAE": build(data)}
    for name in ("Gaussian mixture", "VAE"):
        print(f"{name}: {train(models[name], data, args)}\n")
    x = data.test[: args.images].to(args.device)
    masks = {"half at random": at_random(x), "lower half": upper_half(x, data)}
    found = {
        (missing, name): Found(model.to(args.device), x, mask, args)
        for missing, mask in masks.items()
        for name, model in models.items()
    }
    whole = torch.ones_like(x, dtype=torch.bool)
    complete = {
        name: log_prob((m.model, proposal(m, x, whole, args)), x, whole, args)
        for name, m in models.items()
    }
    rows = {key: f.row(complete[key[1]]) for key, f in found.items()}
    table = pd.DataFrame.from_dict(rows, orient="index")
    print(table.to_string(float_format="{:.3f}".format))
    save(draw(found, data), args, "missing_pixels")


def at_random(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Which pixels are there: half of them."""
    return torch.rand(x.shape, generator=generator, device=x.device) < 0.5


def upper_half(x: Tensor, data: Levels) -> Tensor:
    """Which pixels are there: those above the middle."""
    height, width = data.image_shape
    return (torch.arange(height * width, device=x.device) < height // 2 * width).expand_as(x)


def seen(x: Tensor, data: Levels) -> Tensor:
    """Which pixels of each image there are to learn from; the same at every call."""
    generator = torch.Generator().manual_seed(2)
    either = torch.rand(len(x), 1, generator=generator) < 0.5
    return torch.where(either, at_random(x, generator), upper_half(x, data))


def observed(data: Levels) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each pixel where it is there."""
    y, mask = data.dequantized(data.train), seen(data.train, data)
    known = torch.where(mask, y, torch.nan)
    mean = known.nanmean(0)
    return mean, (known - mean).square().nanmean(0).sqrt()


def means(data: Levels) -> lvm.Gaussian:
    """Independent pixels: what is missing elsewhere changes nothing, so the maximum is closed."""
    model = lvm.Gaussian(data.num_pixels, "diagonal", floor=1e-6)
    model.loc, model.scale = observed(data)
    return model


def mixture(data: Levels) -> lvm.GaussianMixture:
    """It starts from the clusters of images whose holes are filled with the pixels' means.

    Of those with holes at random: images without a lower half would make clusters of their own,
    with means of what was filled in, which nothing that is observed contradicts.
    """
    mask = seen(data.train, data)
    filled = torch.where(mask, data.dequantized(data.train), observed(data)[0])
    below = ~upper_half(data.train, data)
    random = (mask & below).any(1)
    return lvm.GaussianMixture(20, data.num_pixels, "diagonal").initialize(filled[random][:5000])


def build(data: Levels) -> lvm.VAE:
    """A VAE whose encoder is told which pixels are there."""
    hidden, latents = ([500, 500], 40) if data.num_pixels > 100 else ([200, 200], 10)
    encoder = lvm.nn.MLP(2 * data.num_pixels, hidden, head=lvm.nn.NormalHead(latents))
    decoder = lvm.nn.MLP(latents, hidden, head=lvm.nn.NormalHead(data.num_pixels))
    return lvm.VAE(
        Seeing(encoder, *observed(data)), Rescaled(decoder, *observed(data)), fill=MISSING
    )


class Seeing(Rescaled):
    """An encoder of incomplete images: pixels of mean 0 and deviation 1, and which there are."""

    def forward(self, x: Tensor) -> dist.Distribution:
        """Return q(z | x_o)."""
        there = x != MISSING
        pixels = torch.where(there, (x - self.mean) / self.deviation, 0.0)
        return self.network(torch.cat([pixels, there.to(x)], -1))


def train(model: nn.Module, data: Levels, args: argparse.Namespace) -> lvm.Fit:
    """Model and guide take a mask beside the data: the loss is about observed pixels alone."""
    mask, held_out = seen(data.train, data), seen(data.validation, data)
    return lvm.fit(
        model.model,
        model.guide,
        (data.train * mask, mask),  # what is missing is not there at all
        elbo=lvm.TraceInfo_ELBO(max_plate_nesting=1),
        transform=lambda k, mask: (data.dequantized(k), mask),
        validation=(data.validation * held_out, held_out),
        epochs=args.epochs,
        patience=20,
        batch_size=128 if data.num_pixels > 100 else 32,
        trainer={"gradient_clip_val": 100.0},
        device=args.device,
        seed=args.seed,
    )


class Found:
    """What a model makes of images with holes."""

    def __init__(self, model: Any, x: Tensor, mask: Tensor, args: argparse.Namespace) -> None:
        self.x, self.mask = x, mask
        pair = model.model, proposal(model, x * mask, mask, args)
        self.score = log_prob(pair, x * mask, mask, args)
        if isinstance(model, lvm.VAE):
            drawn = lvm.marginal.impute(*pair, x * mask, mask, num_samples=200)
            self.mean, self.draws = drawn.mean(), drawn.resample(3)["x"]
        else:
            self.mean = model.conditional_mean(x * mask, mask)
            self.draws = model.impute(x * mask, mask, num_samples=3)

    def row(self, whole: lvm.LogMarginal) -> dict[str, float]:
        """One of the table; log p(x_m | x_o) = log p(x) - log p(x_o)."""
        hidden, errors = whole.log_prob - self.score.log_prob, (whole, self.score)
        return {
            "log p(x_o)": self.score.mean,
            "error": self.score.mean_std_error,
            "of sampling": self.score.sampling_std_error,
            "log p(x_m | x_o)": float(hidden.mean()),
            "its error": float(hidden.std() / len(hidden) ** 0.5),
            "its sampling": math.hypot(*(s.sampling_std_error for s in errors)),
            "RMSE": float((self.mean - self.x)[~self.mask].square().mean().sqrt()),
        }


def proposal(model: Any, x: Tensor, mask: Tensor, args: argparse.Namespace) -> Any:
    """The guide; that of the VAE refined for each image, and widened."""
    if not isinstance(model, lvm.VAE):
        return model.guide
    refined = lvm.marginal.refined(
        model.model, model.guide, x, mask, num_steps=min(200, args.samples)
    )
    return lvm.marginal.widened(refined, (1.0, 1.5))


def log_prob(
    pair: tuple[Any, Any], x: Tensor, mask: Tensor, args: argparse.Namespace
) -> lvm.LogMarginal:
    """Log p(x_o), exact or, of the VAE, by importance sampling."""
    if isinstance(pair[0].__self__, lvm.VAE):
        return lvm.marginal.importance_sampling(*pair, x, mask, num_samples=args.samples)
    return lvm.marginal.exact(*pair, x, mask)


def draw(found: dict[tuple[str, str], Found], data: Levels, count: int = 10) -> plt.Figure:
    """The images, what is seen of them, and three draws of the whole by each model."""
    patterns = list(dict.fromkeys(missing for missing, _ in found))
    figure = plt.figure(figsize=(13, 6.5), layout="constrained")
    for part, missing in zip(figure.subfigures(1, len(patterns)), patterns, strict=True):
        part.suptitle(f"missing: {missing}")
        own = {name: f for (pattern, name), f in found.items() if pattern == missing}
        first = next(iter(own.values()))
        rows = {"original": first.x, "seen": torch.where(first.mask, first.x, 0.4)}
        for name, f in own.items():
            draws = [f.mean] if name == "pixel means" else f.draws
            rows |= {name if i == 0 else " " * i + name[0]: d for i, d in enumerate(draws)}
        for ax, (name, images) in zip(part.subplots(len(rows), 1), rows.items(), strict=True):
            lvm.plots.plot_images(
                images[:count], image_shape=data.image_shape, columns=count, ax=ax
            )
            ax.set_ylabel(
                name if len(name.strip()) > 1 else "", rotation=0, ha="right", va="center"
            )
    return figure


if __name__ == "__main__":
    main()
