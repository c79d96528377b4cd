"""A classifier from a few labels and many images without one: the semi-supervised VAE.

The story of an image has its class y and all else that there is to say of it, z (Kingma et al.
2014, their model M2):

    y ~ Categorical(1/10),   z ~ N(0, I),   x ~ Bernoulli(decoder(z, y))
    q(y | x) = classifier(x),   q(z | x, y) = N(mean(x, y), diag(sd(x, y)^2))

Labelled images train it by a bound of log p(x, y), the others by one of log p(x), in which the
classes are summed out; and the classifier by its own error at the labels:

    J = sum_labelled L(x, y) + sum_unlabelled U(x) + weight sum_labelled log q(y | x)

Both kinds of images are in one tensor, with label -1 where there is none. Labelled ones are
repeated there, since among tens of thousands a hundred would hardly be met. The classifier has
convolutions (the paper's had none), so that errors are to be compared with those of the same
classifier trained by the labels alone. The settings were chosen on validation images. With a
hundred labels the other images of MNIST halve that error; 1300 of 8 x 8 pixels do not lower it.

    python examples/semi_supervised.py                                      # 8 x 8 digits
    python examples/semi_supervised.py --data folder/of/MNIST --labels 100  # a quarter of an hour
    python examples/semi_supervised.py --data folder/of/MNIST --labels 3000 --weight 10
"""

import argparse
import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F  # noqa: N812
from common import grey_images, parser, ready, save
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import pyro_lvm as lvm

CLASSES = 10


def main() -> None:
    options = parser(__doc__, epochs=12, of_digits=100)
    options.add_argument("--labels", type=int, default=100, help="as many of each class")
    options.add_argument("--weight", type=float, default=50.0, help="of a label's classification")
    args = ready(options.parse_args())
    data = grey_images(args.data)
    vae, alone = build(data, args.weight), build(data).classifier
    history = Errors(data.validation, data.validation_labels)
    print(f"{train(vae, data, args, callbacks=[history])}\n")
    vae.to(args.device)
    by_labels_alone(alone.to(args.device), data, args)
    x, y = data.test.to(args.device), data.test_labels.to(args.device)
    rows = {
        "classifier, labels alone": error_of(alone(x).probs, y),
        "semi-supervised VAE": error_of(vae.classify(x), y),
    }
    print(f"Test error with {args.labels} labels, in percent")
    print(pd.DataFrame(rows).T.to_string(float_format="{:.2f}".format))
    save(draw(vae, x, y, history, data.image_shape), args, "semi_supervised")


# the model


def build(data: lvm.datasets.Split, label_weight: float = 50.0) -> lvm.models.SemiSupervisedVAE:
    """One hidden layer in encoder and decoder, as in the paper; the classifier has convolutions."""
    pixels = data.train.shape[1]
    hidden, latents = (256, 50) if pixels > 100 else (64, 8)
    encoder = WithLabel(pixels, hidden, lvm.nn.NormalHead(latents))
    decoder = WithLabel(latents, hidden, lvm.nn.BernoulliHead(pixels))
    return lvm.models.SemiSupervisedVAE(
        Classifier(data.image_shape),
        encoder,
        decoder,
        num_classes=CLASSES,
        label_weight=label_weight,
    )


class Classifier(nn.Sequential):
    """Two convolutions, each followed by the largest of 2 x 2 values, and a hidden layer."""

    def __init__(self, image_shape: tuple[int, int], channels: int = 16, hidden: int = 128) -> None:
        height, width = (size // 4 for size in image_shape)
        super().__init__(
            nn.Unflatten(-1, (1, *image_shape)),
            nn.Conv2d(1, channels, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(2 * channels * height * width, hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, CLASSES),
            lvm.nn.LabelHead(CLASSES),
        )


class WithLabel(nn.Module):
    """A hidden layer that sees an image (or z) and a label, and a head behind it.

    It is `lvm.nn.Joined` of an MLP, written as a sum: an image meets the weights once, and not
    once for each of the ten labels that it may have.
    """

    def __init__(self, in_features: int, hidden: int, head: Any) -> None:
        super().__init__()
        self.inputs, self.label = nn.Linear(in_features, hidden), nn.Embedding(CLASSES, hidden)
        self.out = nn.Linear(hidden, head.params_per_value * head.event_shape[0])
        self.head = head

    def forward(self, x: Tensor, y: Tensor) -> Any:
        """Return the distribution at x and y."""
        return self.head(self.out(F.relu(self.inputs(x) + self.label(y))))


# training


def train(
    vae: lvm.models.SemiSupervisedVAE,
    data: lvm.datasets.Split,
    args: argparse.Namespace,
    batch_size: int = 64,
    callbacks: tuple | list = (),
) -> lvm.Fit:
    """All images, with the labelled ones repeated until they are a fifth of them."""
    rows = few_of_each_class(data.train_labels, getattr(args, "labels", 100), args.seed)
    repeats = max(1, len(data.train) // (4 * len(rows)))
    labels = torch.full_like(data.train_labels, -1)
    x = torch.cat([data.train, data.train[rows].repeat(repeats, 1)])
    y = torch.cat([labels, data.train_labels[rows].repeat(repeats)])
    steps = args.epochs * math.ceil(len(x) / batch_size)
    return lvm.fit(
        vae.supervised_model,
        vae.guide,
        (x, y),
        elbo=lvm.TraceInfo_ELBO(max_plate_nesting=1),
        transform=lambda x, y: (torch.bernoulli(x), y),
        epochs=args.epochs,
        batch_size=batch_size,
        scheduler=partial(OneCycleLR, max_lr=2e-3, total_steps=steps),
        callbacks=callbacks,
        device=args.device,
        seed=args.seed,
    )


def few_of_each_class(labels: Tensor, number: int, seed: int) -> Tensor:
    """Rows of ``number`` images, as many of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels[order]
    rows = [order[shuffled == c][: number // CLASSES] for c in range(CLASSES)]
    return torch.cat(rows)


class Errors(pl.Callback):
    """The classifier's error on held-out images after each epoch."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.found = x, y, []

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Look at the classifier as it is used, without dropout."""
        classifier = module.given[0].__self__.classifier
        device = next(classifier.parameters()).device
        was_training = classifier.training
        with torch.no_grad():
            probs = classifier.eval()(self.x.to(device)).probs
        classifier.train(was_training)
        self.found.append(error_of(probs, self.y.to(device))["error"])


def by_labels_alone(
    classifier: nn.Module, data: lvm.datasets.Split, args: argparse.Namespace, steps: int = 3000
) -> None:
    """The same classifier, trained on the labelled images and nothing else."""
    rows = few_of_each_class(data.train_labels, args.labels, args.seed)
    x, y = data.train[rows].to(args.device), data.train_labels[rows].to(args.device)
    optimizer = torch.optim.Adam(classifier.parameters())
    for _ in range(min(steps, 100 * args.epochs)):
        chosen = torch.randint(len(rows), (100,), device=x.device)
        loss = -classifier(torch.bernoulli(x[chosen])).log_prob(y[chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    classifier.eval()


# what comes of it


def error_of(probs: Tensor, y: Tensor) -> dict[str, float]:
    """How many images in a hundred get the wrong class, and the standard error of that."""
    share = float((probs.argmax(-1) != y).double().mean())
    return {"error": 100 * share, "+-": 100 * math.sqrt(share * (1 - share) / len(y))}


def draw(
    vae: lvm.models.SemiSupervisedVAE,
    x: Tensor,
    y: Tensor,
    history: Errors,
    image_shape: tuple[int, int],
) -> plt.Figure:
    """Analogies, draws by class, and the error as it fell."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    shape = {"image_shape": image_shape, "columns": CLASSES + 1}
    lvm.plots.plot_images(analogies(vae, x[:10], y[:10]), **shape, ax=axes[0])
    axes[0].set_title("a test image, and its z with every class")
    classes = torch.arange(CLASSES, device=x.device)
    draws = vae.sample(100, classes.repeat(10), mean=True)
    lvm.plots.plot_images(draws, image_shape=image_shape, columns=CLASSES, ax=axes[1])
    axes[1].set_title("E[x | z, y], z ~ N(0, I), a class in each column")
    axes[2].plot(range(1, len(history.found) + 1), history.found)
    axes[2].set(
        title="error on validation images", xlabel="epoch", ylabel="percent", ylim=(0, None)
    )
    return figure


@torch.no_grad()
def analogies(vae: lvm.models.SemiSupervisedVAE, x: Tensor, y: Tensor) -> Tensor:
    """Rows of an image, and of E[x | z, y] at its z for all y."""
    z = vae.encode(x, y).mean
    classes = torch.arange(CLASSES, device=x.device)
    others = vae.decode(z.unsqueeze(1), classes.expand(len(x), CLASSES)).mean
    return torch.cat([x.unsqueeze(1), others], 1).flatten(0, 1)


if __name__ == "__main__":
    main()
