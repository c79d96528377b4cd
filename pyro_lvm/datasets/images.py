"""Images of digits, in grey values or binary, split into training, validation and test."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_lvm.checks import check_data
from pyro_lvm.datasets.checks import check_file
from pyro_lvm.datasets.idx import read_idx

__all__ = ["Split", "binarize", "binarized_mnist", "digits", "mnist"]


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Images in three parts that share none: ``N x D`` each, one row an image.

    Attributes:
        train: Images to fit to, ``N x D``.
        validation: Images to choose by.
        test: Images to report on.
        train_labels: The class of each image, ``N``, int64; None where the data have none.
        validation_labels: The same for ``validation``.
        test_labels: The same for ``test``.
        image_shape: Height and width of an image, ``D = H W``.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    train_labels: Tensor | None
    validation_labels: Tensor | None
    test_labels: Tensor | None
    image_shape: tuple[int, int]

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{name}={' x '.join(map(str, getattr(self, name).shape))}"
            for name in ("train", "validation", "test")
        )
        labels = "none" if self.train_labels is None else "int64"
        return f"Split({parts}, labels={labels}, image_shape={self.image_shape})"


def digits(
    *,
    validation: int = 250,
    test: int = 250,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Split:
    """Handwritten digits of 8 x 8 pixels from scikit-learn, uniformly dequantised.

    The 1797 images have grey levels x in {0, ..., 16}; what is returned is

        y = (x + u) / 17,    u ~ U[0, 1) for every pixel,

    so that a density of y on [0, 1]^64 is meaningful: on the levels themselves it could be made as
    high as one likes. Such a density bounds the probability of the levels from below (Theis et
    al. 2016, equation 7),

        log P(x) >= E_u[log p(y)] - 64 log 17,

    where 64 log 17 = 181.33 nats go from a density on [0, 1] to one in units of grey levels.

    Args:
        validation: How many images to hold out for validation.
        test: How many images to hold out for testing. They depend on ``seed`` and ``test`` alone.
        seed: Seed of the shuffle and of u; the global random state is neither read nor changed.
        dtype: Floating point type of the images.

    Returns:
        1797 images and labels, ``N x 64``, 1297 of them for training unless asked otherwise.

    Raises:
        ValueError: If the held-out sizes are negative or leave nothing to train on.

    Reference:
        Theis, van den Oord, Bethge (2016), A note on the evaluation of generative models.
    """
    from sklearn.datasets import load_digits

    levels, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(seed)
    parts = _partition(len(levels), (validation, test), generator)
    images = _dequantize(levels, 17, dtype, generator)
    return _split([images[part] for part in parts], [labels[part] for part in parts], (8, 8))


def _split(images: Sequence[Tensor], labels: Sequence[Tensor], shape: tuple[int, int]) -> Split:
    train, validation, test = images
    train_labels, validation_labels, test_labels = (part.long() for part in labels)
    return Split(train, validation, test, train_labels, validation_labels, test_labels, shape)


def _dequantize(
    levels: Tensor, num_levels: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    noise = torch.rand(levels.shape, dtype=torch.float64, generator=generator)
    # 16.9999999 is 17 in float32. This margin outlasts the rounding of y, and of 17 y again.
    margin = 2 * num_levels * torch.finfo(dtype).eps
    return ((levels.double() + noise.clamp(margin, 1 - margin)) / num_levels).to(dtype)


def _partition(
    num_data: int, held_out: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Indices of a random partition: what is left over first, then the held-out parts."""
    num_train = num_data - sum(held_out)
    if min(held_out) < 0 or num_train < 1:
        raise ValueError(
            f"Expected held-out sizes >= 0 that leave some of the {num_data} data to train on; "
            f"got {', '.join(map(str, held_out))}."
        )
    return torch.randperm(num_data, generator=generator).split([num_train, *held_out])


def mnist(path: str | Path, *, validation: int = 10_000, seed: int = 0) -> Split:
    """MNIST, or other images in its format, in grey values of [0, 1].

    The files ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-images-idx3-ubyte``
    and ``t10k-labels-idx1-ubyte`` are read from ``path/MNIST/raw`` (the layout of torchvision),
    unpacked or with the ending ``.gz``.

    Args:
        path: The folder that holds ``MNIST/raw``.
        validation: How many of the training images to hold out, drawn at random.
        seed: Seed of that draw; the global random state is neither read nor changed.

    Returns:
        Images ``N x 784`` (float32, the bytes divided by 255) and labels; the test set is
        MNIST's own, in its order.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, files do not belong together, or ``validation`` leaves
            nothing to train on.
    """
    folder = Path(path) / "MNIST" / "raw"
    images, labels = _read_labelled(folder, "train")
    test, test_labels = _read_labelled(folder, "t10k")
    if test.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"Expected training and test images of one size in {folder}; got "
            f"{tuple(images.shape[1:])} and {tuple(test.shape[1:])}."
        )
    parts = _partition(len(images), (validation,), torch.Generator().manual_seed(seed))
    return _split(
        [*(_unit_interval(images[part]) for part in parts), _unit_interval(test)],
        [*(labels[part] for part in parts), test_labels],
        (images.shape[1], images.shape[2]),
    )


def _unit_interval(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 255


def _read_labelled(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = read_idx(folder / f"{part}-images-idx3-ubyte", ndim=3)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte", ndim=1)
    if len(images) != len(labels):
        raise ValueError(
            f"Expected one label for each image of {part} in {folder}; got {len(images)} images "
            f"and {len(labels)} labels."
        )
    return images, labels


def binarize(x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw binary images afresh from grey values: Bernoulli(x) for every pixel.

    Called once per minibatch it gives dynamically binarised data (Burda et al. 2016); their
    log p(x) are not to be compared with those of the fixed binarisation.

    Args:
        x: Grey values in [0, 1], of any shape.
        generator: Source of randomness, on the device of ``x``; the global one if None.

    Returns:
        Zeros and ones, of the shape and type of ``x``.

    Raises:
        TypeError: If ``x`` is no tensor of a floating point type.
        ValueError: If ``x`` leaves [0, 1].
    """
    check_data("x", x, floating=True)
    if x.min() < 0 or x.max() > 1:
        raise ValueError(
            f"Expected grey values in [0, 1]; got {x.min():.4g} to {x.max():.4g}. Divide bytes "
            f"by 255."
        )
    return torch.bernoulli(x, generator=generator)


def binarized_mnist(path: str | Path) -> Split:
    """The fixed binarisation of MNIST that the literature reports log p(x) on.

    It is read from ``path/BinarizedMNIST/binarized_mnist_packed.npz``, with the arrays ``train``,
    ``valid`` and ``test`` of 98 bytes a row: 784 pixels, eight to a byte (``numpy.packbits``).

    Args:
        path: The folder that holds ``BinarizedMNIST``.

    Returns:
        50000, 10000 and 10000 images ``N x 784`` of zeros and ones (float32), in the order of
        the file (the test images are sorted by digit), without labels.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file is damaged.

    Reference:
        Salakhutdinov and Murray (2008), On the quantitative analysis of deep belief networks.
    """
    file = Path(path) / "BinarizedMNIST" / "binarized_mnist_packed.npz"
    check_file(file, "BinarizedMNIST/binarized_mnist_packed.npz")
    try:
        with np.load(file) as arrays:
            packed = [arrays[name] for name in ("train", "valid", "test")]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"Expected {file} to hold arrays train, valid and test; got: {error}. Fetch it again."
        ) from error
    train, validation, test = (_unpack(file, rows) for rows in packed)
    return Split(train, validation, test, None, None, None, image_shape=(28, 28))


def _unpack(file: Path, rows: np.ndarray) -> Tensor:
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 98:
        raise ValueError(
            f"Expected rows of 98 bytes (uint8) in {file}; got {rows.dtype} of shape {rows.shape}."
        )
    return torch.from_numpy(np.unpackbits(rows, axis=1, count=784)).float()
