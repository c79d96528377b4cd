"""What the examples share: their arguments, their images, and where their pictures go."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

import pyro_lvm as lvm

mpl.use("Agg")

__all__ = ["arguments", "grey_images", "images", "parser", "ready", "save"]


def parser(
    doc: str | None, *, epochs: int, of_digits: int | None = None
) -> argparse.ArgumentParser:
    """The options that every example has; its first line of documentation says what it does.

    An epoch of MNIST has forty times the steps of one ``of_digits``, where more of them are needed.
    """
    options = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    options.add_argument(
        "--data", type=Path, help="a folder with MNIST; scikit-learn's digits if none"
    )
    options.add_argument("--epochs", type=int)
    options.set_defaults(default_epochs=(epochs, epochs if of_digits is None else of_digits))
    options.add_argument("--images", type=int, default=1000, help="held-out images to score")
    options.add_argument("--samples", type=int, default=5000, help="for log p(x) of each image")
    options.add_argument("--device", default="auto", help="cpu, cuda, ...; a GPU if there is one")
    options.add_argument("--out", type=Path, default=Path("out"), help="where the picture goes")
    options.add_argument("--seed", type=int, default=0)
    return options


def arguments(doc: str | None, *, epochs: int) -> argparse.Namespace:
    """The options of the command line."""
    return ready(parser(doc, epochs=epochs).parse_args())


def ready(args: argparse.Namespace) -> argparse.Namespace:
    """Name device and epochs, seed the generator, and make the folder for pictures."""
    if args.epochs is None:
        args.epochs = args.default_epochs[args.data is None]
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def grey_images(folder: Path | None) -> lvm.datasets.Split:
    """MNIST from a folder, or scikit-learn's digits: grey values in [0, 1], N x D."""
    return lvm.datasets.digits() if folder is None else lvm.datasets.mnist(folder)


def images(folder: Path | None) -> lvm.datasets.Split:
    """Images to be binary: the held-out ones are, once and for all; those to train on are grey.

    ``fit(..., transform=torch.bernoulli)`` draws the latter afresh for every batch (dynamic
    binarisation, Burda et al. 2016).
    """
    data, generator = grey_images(folder), torch.Generator().manual_seed(0)
    validation, test = (
        lvm.datasets.binarize(x, generator=generator) for x in (data.validation, data.test)
    )
    return replace(data, validation=validation, test=test)


def save(figure: Any, args: argparse.Namespace, name: str) -> Path:
    """Write a picture, and say where it is."""
    path = args.out / f"{name}.png"
    figure.savefig(path, dpi=80)
    print(f"\nopen {path}")
    return path
