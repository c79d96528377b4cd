"""A conditional VAE: digits by class, and the rest of an image from a part of it.

The story of x given y (Sohn, Lee and Yan 2015) has a latent vector for what y leaves open:

    z ~ N(0, I),   x ~ Bernoulli(decoder(z, y));   q(z | x, y) = encoder(x, y)

First y is the label of a digit, and z is its style: a grid has one z in each column and one digit
in each row. A classifier of real digits reads off what was written, and log p(x | y) is estimated
by importance sampling.

Then y is a part of the image, one, two or three of its quadrants, and x is the rest. A network
that predicts x from y without a z (the baseline) must answer with the mean of all images that
would do; the conditional VAE draws one of them.

    python examples/conditional_vae.py                          # 8 x 8 digits, a few minutes
    python examples/conditional_vae.py --data folder/of/MNIST   # some twenty minutes
"""

import argparse
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import torch
from common import arguments, images, save
from digit_classifier import agreement, train_classifier
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import pyro_lvm as lvm

CLASSES = 10


def main() -> None:
    args = arguments(__doc__, epochs=100)
    data = images(args.data)
    vae = build(data)
    print(f"{train(vae, data, args)}\n")
    print(f"given the label, {score(vae, (data.test, data.test_labels), args)}\n")
    wanted = torch.arange(CLASSES).repeat(100)
    classifier = train_classifier(data, device=args.device)
    share = agreement(classifier, vae.sample(wanted, mean=True), wanted)
    print(f"a classifier of real digits agrees with the label of {share:.1%} of {len(wanted)}\n")

    quadrants = {n: predict_rest(n, data, args) for n in (1, 2, 3)}
    print("log p(rest | quadrants), nats per image:")
    print(pd.DataFrame({n: q.row for n, q in quadrants.items()}).T.round(2).to_string())
    save(draw(vae, quadrants, data), args, "conditional_vae")


def build(data: lvm.datasets.Split) -> lvm.ConditionalVAE:
    """p(x | z, y) and q(z | x, y) of a label y."""
    return conditional(data.train.shape[1], CLASSES)


def conditional(size: int, conditions: int) -> lvm.ConditionalVAE:
    """Networks that see x, or z, and y side by side; a label as an indicator vector."""
    hidden, latents = ([400, 400], 20) if size > 100 else ([128, 128], 8)
    normal, binary = lvm.nn.NormalHead(latents), lvm.nn.BernoulliHead(size)
    encoder = lvm.nn.MLP(size + conditions, hidden, head=normal)
    decoder = lvm.nn.MLP(latents + conditions, hidden, head=binary)
    return lvm.ConditionalVAE(
        lvm.nn.Joined(encoder, [size, conditions]), lvm.nn.Joined(decoder, [latents, conditions])
    )


def train(vae: lvm.ConditionalVAE, data: lvm.datasets.Split, args: argparse.Namespace) -> lvm.Fit:
    """As the VAE of vae.py, with the labels beside the images."""
    return fit(
        vae.model,
        vae.guide,
        (data.train, data.train_labels),
        (data.validation, data.validation_labels),
        args,
        epochs=args.epochs,
        transform=lambda x, y: (torch.bernoulli(x), y),
    )


def fit(
    model: object,
    guide: object,
    data: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    args: argparse.Namespace,
    *,
    epochs: int,
    transform: object,
) -> lvm.Fit:
    """One rise and fall of the learning rate."""
    steps = epochs * -(-len(data[0]) // 128)
    return lvm.fit(
        model,
        guide,
        data,
        transform=transform,
        validation=validation,
        epochs=epochs,
        batch_size=128,
        scheduler=partial(OneCycleLR, max_lr=3e-3, total_steps=steps),
        device=args.device,
        seed=args.seed,
    )


def score(
    vae: lvm.ConditionalVAE, batch: tuple[Tensor, Tensor], args: argparse.Namespace
) -> lvm.LogMarginal:
    """Log p(x | y) of held-out images, on the device."""
    vae.to(args.device)
    x, y = (t[: args.images].to(args.device) for t in batch)
    found = lvm.marginal.importance_sampling(
        vae.model, vae.guide, x, y, num_samples=args.samples, batch_size=100
    )
    vae.cpu()
    return found


# ------------------------------------------------------------------------------- from a part


class Rest:
    """Images cut into the quadrants that are given and the rest, which is to be found.

    The quadrants are given in the order lower left, upper left, upper right.
    """

    def __init__(self, num_given: int, image_shape: tuple[int, int]) -> None:
        rows, columns = torch.meshgrid(*map(torch.arange, image_shape), indexing="ij")
        lower, left = rows >= image_shape[0] // 2, columns < image_shape[1] // 2
        quadrants = [lower & left, ~lower & left, ~lower & ~left]
        given = torch.stack(quadrants[:num_given]).any(0).flatten()
        self.given, self.hidden = given.nonzero()[:, 0], (~given).nonzero()[:, 0]

    def cut(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The rest x, and the condition y."""
        return images[:, self.hidden], images[:, self.given]

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """Whole images again."""
        whole = x.new_zeros(len(x), x.shape[1] + y.shape[1])
        whole[:, self.hidden], whole[:, self.given] = x, y
        return whole


class Baseline(nn.Module):
    """x from y without a latent: every pixel of x is on its own, once y is known."""

    def __init__(self, size: int, conditions: int) -> None:
        super().__init__()
        hidden = [400, 400] if size + conditions > 100 else [128, 128]
        self.network = lvm.nn.MLP(conditions, hidden, head=lvm.nn.BernoulliHead(size))

    def model(self, x: Tensor, y: Tensor) -> None:
        """A story that is a plain Pyro program."""
        with pyro.plate("data", len(x)):
            pyro.sample("x", self.network(y), obs=x)


class Prediction:
    """Two models of the rest of an image, fitted, and their scores."""

    def __init__(self, rest: Rest, baseline: Baseline, vae: lvm.ConditionalVAE, row: dict) -> None:
        self.rest, self.baseline, self.vae, self.row = rest, baseline, vae, row


def predict_rest(num_given: int, data: lvm.datasets.Split, args: argparse.Namespace) -> Prediction:
    """Fit the baseline and the conditional VAE, and score the rest of held-out images."""
    rest = Rest(num_given, data.image_shape)
    sizes = len(rest.hidden), len(rest.given)
    torch.manual_seed(args.seed)
    baseline, vae = Baseline(*sizes), conditional(*sizes)
    parts = {"data": rest.cut(data.train), "validation": rest.cut(data.validation)}
    epochs = max(1, args.epochs // 5)
    both = {"epochs": epochs, "transform": lambda x, y: (torch.bernoulli(x), torch.bernoulli(y))}
    fit(baseline.model, None, **parts, args=args, **both)
    fit(vae.model, vae.guide, **parts, args=args, **both)
    x, y = rest.cut(data.test[: args.images])
    exact = lvm.marginal.exact(baseline.model, None, x, y)
    found = score(vae, (x, y), args)
    row = {"baseline": exact.mean, "conditional VAE": found.mean}
    return Prediction(rest, baseline, vae, {**row, "error": found.mean_std_error})


# --------------------------------------------------------------------------------- the picture


def draw(
    vae: lvm.ConditionalVAE, quadrants: dict[int, Prediction], data: lvm.datasets.Split
) -> plt.Figure:
    """Digits by class, and what the models make of a part of an image."""
    figure, axes = plt.subplots(1, 4, figsize=(20, 5.6), layout="constrained")
    z = torch.randn(12, vae.encoder.head.event_shape[0])
    y = torch.arange(CLASSES)
    with torch.no_grad():
        grid = vae.decode(z, y[:, None]).mean  # label x z x pixels
    shape = {"image_shape": data.image_shape}
    lvm.plots.plot_images(grid.flatten(0, 1), **shape, columns=12, ax=axes[0])
    axes[0].set_title("a label for each row, a z for each column")
    for ax, (n, found) in zip(axes[1:], quadrants.items(), strict=True):
        lvm.plots.plot_images(completions(found, data.test[:10]), **shape, columns=7, ax=ax)
        ax.set_title(f"{n} of 4 quadrants given: what is seen,\nbaseline, four draws, the image")
    return figure


@torch.no_grad()
def completions(found: Prediction, images: Tensor) -> Tensor:
    """For each image: what is given, the baseline's answer, four draws, the whole image."""
    x, y = found.rest.cut(images)
    join = found.rest.join
    columns = [join(0.5 * torch.ones_like(x), y), join(found.baseline.network(y).mean, y)]
    columns += [join(found.vae.sample(y, mean=True), y) for _ in range(4)]
    return torch.stack([*columns, images], 1).flatten(0, 1)


if __name__ == "__main__":
    main()
