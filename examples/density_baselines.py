"""Densities of grey images: what does a deep model add to a Gaussian, a kernel, a mixture?

Grey levels k = 0 ... L - 1 have probabilities, and a density of them could be made as high as one
likes. So the levels are dequantised, y = (k + u) / L with u ~ U[0, 1) for every pixel, and a
density of y bounds the probability of the levels (Theis et al. 2016):

    log P(k) >= E_u[log p(y)] - D log L,    bits per dimension = (log L - log p(y) / D) / log 2.

Five stories for y. Of all but the last log p(y) is exact:

    uniform            y ~ U[0, 1]^D, the coding of nothing: log2 L bits
    Gaussian           y ~ N(m, S), by maximum likelihood, S diagonal or full
    kernel density     y ~ N(y_s, h^2 I) around a training image y_s drawn at random
    Gaussian mixture   y ~ N(m_c, S_c), by expectation-maximisation
    VAE                z ~ N(0, I), y ~ N(m(z), s(z)^2), by SVI; log p(y) by importance sampling

A border pixel of MNIST has level 0 in all images, so y is uniform on [0, 1/256] there, with a
standard deviation of 1/887. A Gaussian finds that width, and earns at most log 256 = 5.5 nats by
it; the least scale of our models is a thousandth of a feature's deviation, far below. Without the
noise u that floor alone would say how high the likelihood is. A kernel of one width for all pixels
can't use it.

    python examples/density_baselines.py                        # 8 x 8 digits of scikit-learn
    python examples/density_baselines.py --data folder/of/MNIST
"""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pyro.distributions as dist
import torch
from common import arguments, grey_images, save
from torch import Tensor, nn

import pyro_lvm as lvm


def main() -> None:
    args = arguments(__doc__, epochs=100)
    data = levels(args.data)
    vae = build(data)
    print(f"VAE: {train(vae, data, args)}\n")
    models = {**baselines(data, args), "VAE": vae}
    test = data.test[: args.images].to(args.device)
    scores = {name: score(model.to(args.device), test, args) for name, model in models.items()}
    print(
        f"\n{table(scores, data).to_string(float_format='{:.3f}'.format)}\n\nVAE: {scores['VAE']}\n"
    )
    comparison = lvm.compare(scores)
    print(comparison.round(2).to_string())
    save(draw(models, comparison, data), args, "density_baselines")


@dataclass(frozen=True)
class Levels:
    """Grey levels k to train on, N x D, and held-out images y, dequantised once and for all."""

    train: Tensor
    validation: Tensor
    test: Tensor
    count: int
    image_shape: tuple[int, int]

    @property
    def num_pixels(self) -> int:
        """The number D of pixels."""
        return self.train.shape[1]

    def dequantized(self, k: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Levels with noise, y = (k + u) / L, u ~ U[0, 1), drawn afresh at every call."""
        return (k + torch.rand(k.shape, generator=generator, device=k.device)) / self.count


def levels(folder: Path | None) -> Levels:
    """MNIST's bytes, or the 17 levels of scikit-learn's digits."""
    grey, generator = grey_images(folder), torch.Generator().manual_seed(0)
    # MNIST comes as k / 255, the digits come dequantised, as (k + u) / 17
    count, known = (
        (17, lambda x: (17 * x).floor()) if folder is None else (256, lambda x: (255 * x).round())
    )
    data = Levels(*map(known, (grey.train, grey.validation, grey.test)), count, grey.image_shape)
    held_out = (data.dequantized(k, generator) for k in (data.validation, data.test))
    return Levels(data.train, *held_out, count, grey.image_shape)


def baselines(data: Levels, args: argparse.Namespace) -> dict[str, Any]:
    """What needs no gradient: fitted in closed form, or by expectation-maximisation."""
    y, num_pixels = data.dequantized(data.train), data.num_pixels
    box = dist.Uniform(torch.zeros(num_pixels, device=args.device), 1.0).to_event(1)
    kernels = lvm.KernelDensity(num_pixels).fit(y, validation=data.validation[:500])
    print(f"kernel density: width {float(kernels.bandwidth):.3f}, chosen on validation images")
    mixture = lvm.GaussianMixture(60, num_pixels, "diagonal").initialize(y[:5000])
    print(f"Gaussian mixture: {mixture.fit_em(y, max_iterations=min(args.epochs, 20))}")
    return {
        "uniform": lvm.Density(box),
        "Gaussian, diagonal": lvm.Gaussian(num_pixels, "diagonal").fit(y),
        "Gaussian, full": lvm.Gaussian(num_pixels).fit(y),
        "kernel density": kernels,
        "Gaussian mixture": mixture,
    }


def build(data: Levels) -> lvm.VAE:
    """Multilayer perceptrons, between images whose pixels have mean 0 and deviation 1."""
    y = data.dequantized(data.train)
    hidden, latents = ([500, 500], 40) if data.num_pixels > 100 else ([200, 200], 10)
    encoder = lvm.nn.MLP(data.num_pixels, hidden, head=lvm.nn.NormalHead(latents))
    decoder = lvm.nn.MLP(latents, hidden, head=lvm.nn.NormalHead(data.num_pixels))
    mean, deviation = y.mean(0), y.std(0)
    return lvm.VAE(Standardizing(encoder, mean, deviation), Rescaled(decoder, mean, deviation))


class Standardizing(nn.Module):
    """An encoder that sees (y - mean) / deviation: border pixels vary by 1/887, others by 1/3."""

    def __init__(self, network: nn.Module, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    @property
    def head(self) -> nn.Module:
        """It tells the VAE the shape of z."""
        return self.network.head

    def forward(self, y: Tensor) -> dist.Distribution:
        """Return q(z | y)."""
        return self.network((y - self.mean) / self.deviation)


class Rescaled(Standardizing):
    """A decoder for pixels of mean 0 and deviation 1, taken back to those of the data."""

    def forward(self, z: Tensor) -> dist.Distribution:
        """Return p(y | z)."""
        p = self.network(z).base_dist  # the pixels by themselves
        return dist.Normal(self.mean + self.deviation * p.loc, self.deviation * p.scale).to_event(1)


def train(vae: lvm.VAE, data: Levels, args: argparse.Namespace) -> lvm.Fit:
    """Noise of its own for every batch: else a scale would shrink to what it has seen."""
    return lvm.fit(
        vae.model,
        vae.guide,
        data.train,
        transform=data.dequantized,
        validation=data.validation,
        epochs=args.epochs,
        patience=20,
        batch_size=128 if data.num_pixels > 100 else 32,
        trainer={"gradient_clip_val": 100.0},
        device=args.device,
        seed=args.seed,
    )


def score(model: Any, y: Tensor, args: argparse.Namespace) -> lvm.LogMarginal:
    """Held-out log p(y): exact, or by a guide that is refined for these images and widened.

    A density of 64 or 784 numbers makes posteriors narrow, which the amortised guide misses.
    """
    if not isinstance(model, lvm.VAE):
        return lvm.marginal.exact(model.model, model.guide, y)
    refined = lvm.marginal.refined(model.model, model.guide, y, num_steps=min(200, args.samples))
    proposal = lvm.marginal.widened(refined, (1.0, 1.5))
    return lvm.marginal.importance_sampling(model.model, proposal, y, num_samples=args.samples)


def table(scores: Mapping[str, lvm.LogMarginal], data: Levels) -> pd.DataFrame:
    """Held-out log p(y) in nats per image, its errors, and what it costs to code a pixel."""
    rows = {
        name: {
            "log p(y)": s.mean,
            "error": s.mean_std_error,
            "of sampling": s.sampling_std_error,
            "bits/dim": (math.log(data.count) - s.mean / data.num_pixels) / math.log(2),
        }
        for name, s in scores.items()
    }
    return pd.DataFrame(rows).T


def draw(models: Mapping[str, Any], comparison: pd.DataFrame, data: Levels) -> plt.Figure:
    """What each story draws beside the data, and how probable the data are under it."""
    figure = plt.figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1])
    drawn = {"test images": data.test[:12], **{n: m.sample(12) for n, m in models.items()}}
    for ax, (name, images) in zip(left.subplots(len(drawn), 1), drawn.items(), strict=True):
        lvm.plots.plot_images(images, image_shape=data.image_shape, columns=12, ax=ax)
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    lvm.plots.plot_comparison(comparison.drop("uniform"), ax=right.subplots())
    return figure


if __name__ == "__main__":
    main()
