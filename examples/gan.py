"""Digits from noise: one generator, trained by an adversary (GAN) and by a kernel (GMMN).

A generator is the story

    z ~ N(0, I),    x = G(z),

in which x is a function of noise and has no density. It is trained by a comparison of its draws
with the data: by a discriminator that learns to tell them apart (a generative adversarial network)
or by the maximum mean discrepancy under a kernel (a generative moment matching network), which has
no second player. Model and training are the same; the divergence is an argument.

Are the draws digits, and all of them? A classifier of real digits says which digit each draw is,
and the spread is the variance of the draws as a share of that of the data: a generator that draws
the same few images over and over has a small one.

How good is the density? With an observation noise, x = G(z) + .2 e, there is one,

    log p(x) = log integral N(x; G(z), .2^2) p(z) dz,

and it is estimated twice: by an average over draws of z, which is a kernel density around draws of
x (a Parzen window, by which GANs were compared once), and by annealing, which looks for the z
behind each image. Both are too low on average. How far they are apart is how far the former is from
the truth at least.

The history shows the balance of the two players: at chance the discriminator's loss is 2 log 2 =
1.39 nats, and it tells half of the draws and half of the data right. Without a penalty on its slope
(R1, Mescheder et al. 2018) it wins at once here, and the generator learns nothing.

    python examples/gan.py                        # 8 x 8 digits of scikit-learn
    python examples/gan.py --data folder/of/MNIST --seeds 5
"""

import argparse
import functools
from collections.abc import Iterable

import matplotlib.pyplot as plt
import pandas as pd
import torch
from common import grey_images, parser, ready, save
from digit_classifier import coverage, train_classifier
from torch import Tensor, nn

import pyro_lvm as lvm

LATENTS, NOISE, DRAWS = 64, 0.2, 2000
BALANCE = {"learning_rate": 5e-4, "gradient_penalty": 3.0}  # half the generator's rate; R1
leaky = functools.partial(nn.LeakyReLU, 0.2)


def main() -> None:
    options = parser(__doc__, epochs=30, of_digits=150)
    options.add_argument("--seeds", type=int, default=1, help="how many runs, from --seed on")
    args = ready(options.parse_args())
    data = grey_images(args.data)
    classifier = train_classifier(data, device=args.device)
    rows, shown = {}, {}
    for seed in range(args.seed, args.seed + args.seeds):
        for name, train_it in (("GAN", train), ("GMMN", train_by_moments)):
            torch.manual_seed(seed)
            gan = build(data)
            fit = train_it(gan, data, args)
            rows[f"{name}, seed {seed}"] = measures(gan, fit, classifier, data, args)
            shown.setdefault(name, (gan, fit))
    table = pd.DataFrame(rows).T
    print(f"{table.round(2).to_string()}")
    draw(shown, data, args)


def build(data: lvm.datasets.Split) -> lvm.models.GAN:
    """A generator of images with values in [0, 1]."""
    return lvm.models.GAN(generator(LATENTS, data), LATENTS)


def generator(size: int, data: lvm.datasets.Split) -> nn.Module:
    pixels = data.train.shape[1]
    head = lvm.nn.DeltaHead(pixels, activation=nn.Sigmoid)
    return lvm.nn.MLP(size, widths(pixels)[::-1], head=head, activation=leaky)


def discriminator(data: lvm.datasets.Split, outputs: int = 1) -> nn.Module:
    pixels = data.train.shape[1]
    first, second = widths(pixels)
    return nn.Sequential(
        nn.Linear(pixels, first),
        leaky(),
        nn.Linear(first, second),
        leaky(),
        nn.Linear(second, outputs),
    )


def widths(pixels: int) -> list[int]:
    return [256, 128] if pixels > 100 else [128, 64]


def train(gan: lvm.models.GAN, data: lvm.datasets.Split, args: argparse.Namespace) -> lvm.Fit:
    """By a discriminator, whose slope at the data is penalised."""
    elbo = lvm.ImplicitDivergence(lvm.Adversarial(discriminator(data), **BALANCE))
    return lvm.fit(
        gan.model,
        gan.guide,
        data.train,
        elbo=elbo,
        epochs=args.epochs,
        batch_size=128,
        optimizer=adam,
        device=args.device,
    )


def train_by_moments(
    gan: lvm.models.GAN, data: lvm.datasets.Split, args: argparse.Namespace
) -> lvm.Fit:
    """By a kernel, which needs large batches: it compares them and remembers nothing."""
    return lvm.fit(
        gan.model,
        gan.guide,
        data.train,
        elbo=lvm.ImplicitDivergence(lvm.MMD()),
        epochs=args.epochs,
        batch_size=500,
        device=args.device,
    )


def adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """With little momentum: two players would circle each other by it."""
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.5, 0.999))


def measures(
    gan: lvm.models.GAN,
    fit: lvm.Fit,
    classifier: nn.Module,
    data: lvm.datasets.Split,
    args: argparse.Namespace,
) -> dict[str, float]:
    draws = gan.sample(DRAWS).cpu()
    shares = coverage(classifier, draws)
    few = data.test[: min(args.images, 20)].to(args.device)
    parzen, annealed = densities(gan, few, data, args)
    return {
        "epochs": fit.num_epochs,
        "loss": fit.history["loss"][-1],
        "digits": int((shares > 0.01).sum()),
        "rarest": float(shares.min()),
        "spread": float(draws.var(0).sum() / data.test.var(0).sum()),
        "log p, Parzen": parzen.mean,
        "log p, annealed": annealed.mean,
        "error": annealed.mean_std_error,
        "seconds": fit.seconds,
    }


def densities(
    gan: lvm.models.GAN, x: Tensor, data: lvm.datasets.Split, args: argparse.Namespace
) -> tuple[lvm.LogMarginal, lvm.LogMarginal]:
    """Log p(x) under Gaussian noise, by a kernel density and by annealing."""
    parzen = lvm.marginal.kernel_density(
        gan.model,
        x,
        validation=data.validation[:100].to(x.device),
        num_samples=args.samples,
        bandwidths=[NOISE],
    )
    annealed = lvm.marginal.annealed_importance_sampling(
        lvm.marginal.with_gaussian_noise(gan.model, NOISE),
        None,
        x,
        num_samples=8,
        temperatures=max(5, args.samples // 10),
    )
    return parzen, annealed


def draw(shown: dict, data: lvm.datasets.Split, args: argparse.Namespace) -> None:
    """Draws of both, and the two players of the one."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 10), layout="constrained")
    for ax, (name, (gan, _)) in zip(axes[0], shown.items(), strict=True):
        images = gan.sample(100).cpu()
        lvm.plots.plot_images(images, image_shape=data.image_shape, columns=10, ax=ax)
        ax.set_title(f"Draws of the {name}")
    history = shown["GAN"][1].history
    plot_players(history, axes[1])
    save(figure, args, "gan")


def plot_players(history: dict[str, list[float]], axes: Iterable) -> None:
    """The losses of the two players, and what the discriminator tells right."""
    losses, told = axes
    nats = [n for n in history if "/" not in n and n not in ("loss", "penalty")]
    lvm.plots.plot_history(history, terms=nats, ax=losses)
    losses.set_title("The two players")
    shares = ["accuracy/draws", "accuracy/data"]
    lvm.plots.plot_history(history, terms=shares, ax=told)
    told.axhline(0.5, color="0.6", linestyle="dotted")
    told.set(ylabel="share", ylim=(0, 1), title="What the discriminator tells right")


if __name__ == "__main__":
    main()
