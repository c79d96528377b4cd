"""Which prior for a VAE? One architecture under five of them, and what each is worth.

The average ELBO says what a prior is for (Hoffman and Johnson 2016):

    mean_i ELBO_i = E[log p(x | z)] - I_q(x; z) - KL(q(z) || p(z)),   q(z) = mean_i q(z | x_i)

Only the last term knows the prior, and it vanishes where p(z) is the aggregate posterior q(z). So
priors that are learned can only gain, and the richer ones gain more:

    normal      z ~ N(0, I)
    mixture     y ~ Categorical(weights), z ~ N(loc[y], scale[y]^2), y summed out (VaDE)
    vamp        z ~ (1 / K) sum_k q(z | u_k), of K learned pseudo-inputs u_k (Tomczak and Welling)
    flow        z = f(e), e ~ N(0, I), an autoregressive flow of Zuko's
    layers      z2 ~ N(0, I), z1 ~ p(z1 | z2): a second layer of latents as the prior of the first

That is so of images to train on; what is left of it is measured by log p(x) of held-out images.
(Little, where z says as little of an image as it does of a binary one of 8 x 8 pixels.) The
components of a mixture are clusters as well: how often do the images of one have the same label,
which no model has seen?

    python examples/mixture_vae.py                              # 8 x 8 digits of scikit-learn
    python examples/mixture_vae.py --data folder/of/MNIST
"""

import argparse
import math
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
import zuko
from common import arguments, images, save
from pyro.contrib.zuko import ZukoToPyro
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import pyro_lvm as lvm

NAMES = ("normal", "mixture", "vamp", "flow", "layers")


def main() -> None:
    args = arguments(__doc__, epochs=100)
    data = images(args.data)
    models, rows = {}, {}
    for name in NAMES:
        models[name] = build(data, name)
        print(f"{name}: {train(models[name], data, args)}\n")
        models[name].to(args.device)
        rows[name] = measure(models[name], data, args)
    print(pd.DataFrame(rows).T.to_string(float_format="{:.2f}".format))
    save(draw(models, data.test[:1000].to(args.device), data.image_shape), args, "mixture_vae")


# the models


def build(data: lvm.datasets.Split, prior: str = "mixture") -> Any:
    """The same encoder and decoder, but for the prior between them."""
    pixels = data.train.shape[1]
    hidden, latents, components = (300, 40, 100) if pixels > 100 else (128, 8, 20)
    encoder = lvm.nn.MLP(pixels, [hidden, hidden], head=lvm.nn.NormalHead(latents))
    decoder = lvm.nn.MLP(latents, [hidden, hidden], head=lvm.nn.BernoulliHead(pixels))
    if prior == "mixture":
        return lvm.models.MixtureVAE(encoder, decoder, components)
    if prior == "layers":
        above = lvm.nn.MLP(latents, [hidden], head=lvm.nn.NormalHead(latents))
        below = lvm.nn.MLP(latents, [hidden], head=lvm.nn.NormalHead(latents))
        return lvm.models.HierarchicalVAE([encoder, above], [decoder, below])
    if prior == "vamp":
        vamp = lvm.nn.VampPrior(encoder, components, pixels, bounds=(0.0, 1.0))
        return lvm.VAE(encoder, decoder, prior=vamp.initialize(data.train))
    return lvm.VAE(encoder, decoder, prior=FlowPrior(latents) if prior == "flow" else None)


class FlowPrior(nn.Module):
    """A masked autoregressive flow (Papamakarios et al. 2017)."""

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        self.flow = zuko.flows.MAF(num_latents, transforms=3, hidden_features=(128, 128))

    def forward(self) -> ZukoToPyro:
        """Return p(z), in Pyro's words."""
        return ZukoToPyro(self.flow())


def train(
    model: Any, data: lvm.datasets.Split, args: argparse.Namespace, batch_size: int = 128
) -> lvm.Fit:
    """By the ELBO; a mixture starts at the clusters of what a short run before has found."""
    if isinstance(model, lvm.models.MixtureVAE):
        fit(model, data, args, max(1, args.epochs // 10), batch_size)
        model.initialize(data.train[:5000])
    return fit(model, data, args, args.epochs, batch_size)


def fit(
    model: Any, data: lvm.datasets.Split, args: argparse.Namespace, epochs: int, batch_size: int
) -> lvm.Fit:
    steps = epochs * math.ceil(len(data.train) / batch_size)
    return lvm.fit(
        model.model,
        model.guide,
        data.train,
        elbo=lvm.TraceInfo_ELBO(max_plate_nesting=1),
        transform=torch.bernoulli,
        validation=data.validation,
        epochs=epochs,
        batch_size=batch_size,
        scheduler=partial(OneCycleLR, max_lr=3e-3, total_steps=steps),
        device=args.device,
        seed=args.seed,
    )


# what they are worth


def measure(model: Any, data: lvm.datasets.Split, args: argparse.Namespace) -> dict[str, float]:
    """Log p(x) per image with its error, the bound, latents in use, and the clusters."""
    x = data.test[: args.images].to(args.device)
    score = lvm.marginal.importance_sampling(
        model.model, model.guide, x, num_samples=args.samples, batch_size=100
    )
    bound = lvm.marginal.importance_sampling(model.model, model.guide, x, num_samples=1)
    report = lvm.diagnostics.collapse_report(model.model, model.guide, x[:500])
    row = {
        "log p(x)": score.mean,
        "error": score.mean_std_error,
        "ELBO": bound.mean,
        "median ESS": float(score.ess.median()),
        "active units": float(report.num_active),
    }
    found = clusters(model, torch.cat([data.train.bernoulli(), data.test]).to(args.device))
    if found is not None and data.train_labels is not None and data.test_labels is not None:
        n = len(data.train)
        majority = majority_labels(found[:n].cpu(), data.train_labels)
        row["clusters"] = float(len(found.unique()))
        row["label right"] = float((majority[found[n:].cpu()] == data.test_labels).float().mean())
    return row


@torch.no_grad()
def clusters(model: Any, x: Tensor) -> Tensor | None:
    """The component that is the most probable for each image, at the mean of q(z | x)."""
    if isinstance(model, lvm.models.MixtureVAE):
        return model.label_probs(model.encode(x).mean).argmax(-1)
    if isinstance(getattr(model, "prior", None), lvm.nn.VampPrior):
        return model.prior().log_prob_table(model.encode(x).mean).argmax(-1)
    return None


def majority_labels(found: Tensor, labels: Tensor, num_components: int = 100) -> Tensor:
    """The label that most training images of each component have."""
    counts = torch.zeros(num_components, int(labels.max()) + 1)
    counts.index_put_((found, labels), torch.ones(len(found)), accumulate=True)
    return counts.argmax(-1)


# what they look like


def draw(models: dict[str, Any], x: Tensor, image_shape: tuple[int, int]) -> plt.Figure:
    """Above, draws of q(z) over draws of p(z); below, what each model makes up."""
    figure, axes = plt.subplots(2, len(models), figsize=(20, 8), layout="constrained")
    for (name, model), (above, below) in zip(models.items(), axes.T, strict=True):
        q, p = aggregate(model, x), from_prior(model, len(x))
        _, _, directions = torch.linalg.svd(q - q.mean(0), full_matrices=False)
        for z, colour, label in ((p, "0.75", "p(z)"), (q, "C0", "q(z)")):
            plane = ((z - q.mean(0)) @ directions[:2].T).cpu()
            above.scatter(*plane.T, s=4, color=colour, label=label)
        above.set(title=f"{name}: along the widest directions of q(z)", aspect="equal")
        above.legend(loc="upper right", markerscale=3)
        lvm.plots.plot_images(made_up(model), image_shape=image_shape, columns=10, ax=below)
        below.set_title("one row, one component" if has_rows(model) else "E[x | z], z ~ p(z)")
    return figure


@torch.no_grad()
def aggregate(model: Any, x: Tensor) -> Tensor:
    """One draw of the (lower) latent for each image."""
    samples = lvm.compute_terms(model.model, model.guide, x).samples
    return samples["z1" if "z1" in samples else "z"][0]


@torch.no_grad()
def from_prior(model: Any, num_samples: int) -> Tensor:
    z = model.prior_distribution()((num_samples,))  # drawn as Pyro draws
    if isinstance(model, lvm.models.HierarchicalVAE):
        return model.downwards[1](z).sample()
    return z


def has_rows(model: Any) -> bool:
    return isinstance(model, lvm.models.MixtureVAE)


def made_up(model: Any) -> Tensor:
    """A hundred images; of a mixture the ten largest components, ten images of each."""
    if not has_rows(model):
        return model.sample(100, mean=True)
    largest = model.weights.detach().argsort(descending=True)[:10]
    return model.sample(100, largest.repeat_interleave(10), mean=True)


if __name__ == "__main__":
    main()
