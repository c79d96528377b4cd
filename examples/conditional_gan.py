"""Digits to order: a generator that is told the class, and a discriminator that has to name it.

The story is z ~ N(0, I), x = G(z, y), given the label y. The discriminator has two answers to an
image: T(x), whether it is real, and f(y | x), which digit it is (AC-GAN, Odena et al. 2017). Both
players want the digit to be told,

    G minimises  -1/2 log sigmoid(T(x'))  +  -log f(y | x')
    D minimises  -log sigmoid(T(x)) - log sigmoid(-T(x'))  +  -log f(y | x) - log f(y | x'),

with x' = G(z, y), and differ on whether it is real. Whether the draws are what was ordered is
judged by another classifier, which was trained on real digits and took no part. Agreement alone is
easy, by one image of each digit; the spread is the variance of the draws within a class as a share
of that of the data.

    python examples/conditional_gan.py                        # 8 x 8 digits of scikit-learn
    python examples/conditional_gan.py --data folder/of/MNIST --seeds 5
"""

import argparse

import matplotlib.pyplot as plt
import pandas as pd
import torch
from common import grey_images, parser, ready, save
from digit_classifier import CLASSES, agreement, train_classifier
from gan import BALANCE, LATENTS, adam, discriminator, generator, plot_players
from torch import nn

import pyro_lvm as lvm

ORDERED = 200  # draws of each class that are judged


def main() -> None:
    options = parser(__doc__, epochs=30, of_digits=150)
    options.add_argument("--seeds", type=int, default=1, help="how many runs, from --seed on")
    args = ready(options.parse_args())
    data = grey_images(args.data)
    classifier = train_classifier(data, device=args.device)
    rows, shown = {}, None
    for seed in range(args.seed, args.seed + args.seeds):
        torch.manual_seed(seed)
        gan = build(data)
        fit = train(gan, data, args)
        rows[f"seed {seed}"] = measures(gan, fit, classifier, data, args)
        shown = shown or (gan, fit)
    real = agreement(classifier, data.test, data.test_labels)
    print(f"the classifier agrees with {real:.1%} of the labels of real test images\n")
    print(pd.DataFrame(rows).T.round(3).to_string())
    draw(*shown, data, args)


def build(data: lvm.datasets.Split) -> lvm.models.ConditionalGAN:
    """A generator of images with values in [0, 1] from noise and a label."""
    network = generator(LATENTS + CLASSES, data)
    return lvm.models.ConditionalGAN(lvm.nn.Joined(network, [LATENTS, CLASSES]), LATENTS)


def train(
    gan: lvm.models.ConditionalGAN, data: lvm.datasets.Split, args: argparse.Namespace
) -> lvm.Fit:
    """By a discriminator that names the class."""
    judge = discriminator(data, 1 + CLASSES)
    players = lvm.divergences.AuxiliaryClassifier(judge, CLASSES, **BALANCE)
    return lvm.fit(
        gan.model,
        gan.guide,
        (data.train, data.train_labels),
        elbo=lvm.ImplicitDivergence(players, conditions=["y"]),
        epochs=args.epochs,
        batch_size=128,
        optimizer=adam,
        device=args.device,
    )


def measures(
    gan: lvm.models.ConditionalGAN,
    fit: lvm.Fit,
    classifier: nn.Module,
    data: lvm.datasets.Split,
    args: argparse.Namespace,
) -> dict[str, float]:
    """How many of the draws are what was ordered, over all classes and of the worst one."""
    shares, spreads = [], []
    for label in range(CLASSES):
        y = torch.full((ORDERED,), label, device=args.device)
        draws, real = gan.sample(y), data.test[data.test_labels == label]
        shares.append(agreement(classifier, draws, y))
        spreads.append(float(draws.var(0).sum() / real.var(0).sum()))
    return {
        "epochs": fit.num_epochs,
        "agreement": sum(shares) / CLASSES,
        "of the worst class": min(shares),
        "spread": sum(spreads) / CLASSES,
        "classifier[draws]": fit.history["classifier[draws]"][-1],
        "classifier[data]": fit.history["classifier[data]"][-1],
        "discriminator": fit.history["discriminator"][-1],
        "seconds": fit.seconds,
    }


def draw(
    gan: lvm.models.ConditionalGAN,
    fit: lvm.Fit,
    data: lvm.datasets.Split,
    args: argparse.Namespace,
) -> None:
    """A row of draws for each class, and the players."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.5), layout="constrained")
    y = torch.arange(CLASSES, device=args.device).repeat_interleave(10)
    images = gan.sample(y).cpu()
    lvm.plots.plot_images(images, image_shape=data.image_shape, columns=10, ax=axes[0])
    axes[0].set_title("Ten draws of each digit")
    plot_players(fit.history, axes[1:])
    save(figure, args, "conditional_gan")


if __name__ == "__main__":
    main()
