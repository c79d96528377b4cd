"""Which digit is it? A classifier of real images, to look at drawn ones with.

Draws of a generative model have no labels. A classifier f(y | x) that was trained on real digits
says which digit each is: whether the draws given y look like y (`agreement`), and whether all
classes come up among draws that were given none (`coverage`). It is as good a judge as its own
test accuracy, more than 98 % on MNIST after half a minute, and only of what looks like a digit: to
noise it gives a name as well.

    python examples/digit_classifier.py                        # 8 x 8 digits of scikit-learn
    python examples/digit_classifier.py --data folder/of/MNIST
"""

import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from common import arguments, grey_images, save
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import pyro_lvm as lvm

CLASSES = 10


def main() -> None:
    args = arguments(__doc__, epochs=0)
    data = grey_images(args.data)
    start = time.perf_counter()
    classifier = train_classifier(data, epochs=args.epochs or None, device=args.device)
    share = agreement(classifier, data.test, data.test_labels)
    print(f"test accuracy {share:.2%}, {time.perf_counter() - start:.0f} s")
    wrong = data.test[classes(classifier, data.test) != data.test_labels][:50]
    axes = lvm.plots.plot_images(wrong, image_shape=data.image_shape, columns=10)
    axes.set_title("What it takes for another digit")
    save(axes.figure, args, "digit_classifier")


def train_classifier(
    data: lvm.datasets.Split, *, epochs: int | None = None, device: str = "cpu"
) -> nn.Module:
    """A network from images ``N x D``, values in [0, 1], to logits ``N x 10``."""
    epochs = epochs or (4 if len(data.train) > 10_000 else 25)
    network = convolutions(data.image_shape)
    steps = epochs * -(-len(data.train) // 128)
    lvm.fit(
        story(network),
        None,
        (data.train, data.train_labels),
        epochs=epochs,
        batch_size=128,
        scheduler=lambda optimizer: OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps),
        device=device,
    )
    return network


def convolutions(image_shape: tuple[int, int]) -> nn.Module:
    """Two convolutions that halve the image, and two linear layers."""
    height, width = (-(-size // 4) for size in image_shape)
    return nn.Sequential(
        nn.Unflatten(-1, (1, *image_shape)),
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * height * width, 128),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(128, CLASSES),
    )


def story(network: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """A model without latents, and so without a guide: y ~ Categorical(f(x))."""

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("classifier", network)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=network(x)), obs=y)

    return model


@torch.no_grad()
def classes(classifier: nn.Module, x: Tensor) -> Tensor:
    """The class that the classifier gives to each image, ``N``, on the device of ``x``."""
    home = next(classifier.parameters()).device
    return classifier(x.to(home)).argmax(-1).to(x.device)


def agreement(classifier: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images ``N x D`` that the classifier gives the label y ``N``."""
    return float((classes(classifier, x) == y).float().mean())


def coverage(classifier: nn.Module, x: Tensor) -> Tensor:
    """The share of each class among some images, ``10``."""
    return torch.bincount(classes(classifier, x), minlength=CLASSES) / len(x)


if __name__ == "__main__":
    main()
