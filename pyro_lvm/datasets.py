"""Real data, two-dimensional toys, and a problem whose log p(x) and p(z | x) are known exactly."""

import gzip
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lvm.checks import check_data, check_positive

__all__ = [
    "LinearGaussian",
    "Split",
    "binarize",
    "binarized_mnist",
    "digits",
    "linear_gaussian",
    "mnist",
    "old_faithful",
    "pinwheel",
    "ring_of_gaussians",
    "ring_of_gaussians_log_prob",
    "two_moons",
]


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


# ---------------------------------------------------------------------------------------- images


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
    images = _read_idx(folder / f"{part}-images-idx3-ubyte", ndim=3)
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte", ndim=1)
    if len(images) != len(labels):
        raise ValueError(
            f"Expected one label for each image of {part} in {folder}; got {len(images)} images "
            f"and {len(labels)} labels."
        )
    return images, labels


def _read_idx(file: Path, ndim: int) -> Tensor:
    """The bytes of an IDX file: a magic number, the sizes (big-endian), then the values."""
    content = _read_bytes(file)
    header = 4 * (1 + ndim)
    magic = 0x0800 + ndim  # 08: unsigned bytes; then the rank
    if len(content) < header or int.from_bytes(content[:4], "big") != magic:
        raise ValueError(
            f"Expected {file} to begin with the IDX magic number {magic}; got "
            f"{int.from_bytes(content[:4], 'big')}. Fetch it again."
        )
    shape = np.frombuffer(content, ">u4", count=ndim, offset=4).tolist()
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"Expected {math.prod(shape)} values in {file} for its shape {tuple(shape)}; got "
            f"{len(content) - header}. Fetch it again."
        )
    return torch.tensor(np.frombuffer(content, np.uint8, offset=header)).reshape(shape)


def _read_bytes(file: Path) -> bytes:
    packed = file.with_name(f"{file.name}.gz")
    if file.is_file():
        return file.read_bytes()
    if not packed.is_file():
        raise FileNotFoundError(
            f"Expected {file} or {packed.name} beside it; got neither. The files of MNIST belong "
            f"in the folder MNIST/raw under the path that is given, as torchvision lays them out."
        )
    try:
        return gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"Expected {packed} to be gzipped; got: {error}. Fetch it again."
        ) from error


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
    _check_file(file, "BinarizedMNIST/binarized_mnist_packed.npz")
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


def _check_file(file: Path, layout: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected the file {layout} under the path that is given; there is no {file}."
        )


# ---------------------------------------------------------------------------------- low dimension


def old_faithful(path: str | Path) -> Tensor:
    """Eruptions of the Old Faithful geyser, from ``path/faithful/faithful.csv``.

    Args:
        path: The folder that holds ``faithful``.

    Returns:
        ``272 x 2`` (float64): duration of an eruption, waiting time to the next, in minutes.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is not a header and 272 rows of two numbers.
    """
    file = Path(path) / "faithful" / "faithful.csv"
    _check_file(file, "faithful/faithful.csv")
    try:
        x = np.genfromtxt(file, delimiter=",", skip_header=1, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"Expected 272 rows of two numbers in {file}; got: {error}") from error
    if x.shape != (272, 2):
        raise ValueError(f"Expected 272 rows of two numbers in {file}; got {x.shape}.")
    return check_data(str(file), torch.from_numpy(x))


def two_moons(num_data: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Two interleaved half circles of radius 1, drawn alike, with Gaussian noise of 0.1.

    Args:
        num_data: How many points, N.
        generator: Source of randomness, which also says the device; the global one if None.

    Returns:
        ``N x 2``.

    Raises:
        ValueError: If ``num_data`` is below one.
    """
    check_positive("num_data", num_data, minimum=1)
    source = _source(generator)
    lower = torch.rand(num_data, **source) < 0.5
    angle = math.pi * torch.rand(num_data, **source)
    upper_moon = torch.stack([angle.cos(), angle.sin()], -1)
    # The same arc upside down, its end in the middle of the other one.
    lower_moon = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
    moons = torch.where(lower.unsqueeze(-1), lower_moon, upper_moon)
    return moons + 0.1 * torch.randn(num_data, 2, **source)


def _source(generator: torch.Generator | None) -> dict[str, Any]:
    """How to draw from the generator, on its own device."""
    return {} if generator is None else {"generator": generator, "device": generator.device}


def pinwheel(num_data: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Five arms that wind about the origin.

    Along an arm the radius is r ~ N(1, 0.3), across it the offset is t ~ N(0, 0.1); the point
    (r, t) is turned by 2 pi k / 5 + exp(r) / 4 for the arm k (Johnson et al. 2016).

    Args:
        num_data: How many points, N.
        generator: Source of randomness, which also says the device; the global one if None.

    Returns:
        ``N x 2``.

    Raises:
        ValueError: If ``num_data`` is below one.
    """
    check_positive("num_data", num_data, minimum=1)
    source = _source(generator)
    arm = torch.randint(5, (num_data,), **source)
    radius = 1 + 0.3 * torch.randn(num_data, **source)
    offset = 0.1 * torch.randn(num_data, **source)
    angle = 2 * math.pi * arm / 5 + radius.exp() / 4
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * radius - sin * offset, sin * radius + cos * offset], -1)


_RING_COMPONENTS, _RING_RADIUS, _RING_SCALE = 8, 2.0, 0.2


def ring_of_gaussians(num_data: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Eight Gaussians of scale 0.2 and equal weight, evenly on a circle of radius 2.

    Their density is :func:`ring_of_gaussians_log_prob`.

    Args:
        num_data: How many points, N.
        generator: Source of randomness, which also says the device; the global one if None.

    Returns:
        ``N x 2``.

    Raises:
        ValueError: If ``num_data`` is below one.
    """
    check_positive("num_data", num_data, minimum=1)
    source = _source(generator)
    noise = torch.randn(num_data, 2, **source)
    component = torch.randint(_RING_COMPONENTS, (num_data,), **source)
    return _ring_locs(noise)[component] + _RING_SCALE * noise


def _ring_locs(like: Tensor) -> Tensor:
    angle = 2 * math.pi * torch.arange(_RING_COMPONENTS).to(like) / _RING_COMPONENTS
    return _RING_RADIUS * torch.stack([angle.cos(), angle.sin()], -1)  # 8 x 2


def ring_of_gaussians_log_prob(x: Tensor) -> Tensor:
    """Exact log density of :func:`ring_of_gaussians`.

        log p(x) = log (1/8) sum_k N(x; m_k, 0.2^2 I)

    Args:
        x: Points, ``N x 2``.

    Returns:
        ``N``, in nats.

    Raises:
        TypeError: If ``x`` is no tensor of a floating point type.
        ValueError: If ``x`` is not ``N x 2`` or not finite.
    """
    _check_features(x, 2)
    per_component = dist.Normal(_ring_locs(x), _RING_SCALE).log_prob(x.unsqueeze(-2)).sum(-1)
    return per_component.logsumexp(-1) - math.log(_RING_COMPONENTS)


def _check_features(x: Tensor, num_features: int) -> None:
    check_data("x", x, ndim=2, floating=True)
    if x.shape[1] != num_features:
        raise ValueError(f"Expected x of shape N x {num_features}; got {tuple(x.shape)}.")


# ------------------------------------------------------------------------------ reference problem


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """A linear Gaussian latent variable model, everything about which is known.

        z ~ N(0, I_L),    x = W z + b + scale * eps,    eps ~ N(0, I_D)

    Factor analysis; probabilistic PCA where all scales are equal (Tipping and Bishop 1999). Its
    ``model`` and ``guide`` are a Pyro pair with the exact posterior as the guide, so that every
    importance weight p(x, z) / q(z | x) is p(x) itself.

    Attributes:
        W: Loadings, ``D x L``.
        loc: The offset b, ``D``.
        scale: Standard deviations of the noise, ``D``.

    Raises:
        TypeError: If a field is no tensor of a floating point type.
        ValueError: If the shapes do not fit together or a scale is not positive.

    Reference:
        Tipping and Bishop (1999), Probabilistic principal component analysis, equations 2 to 9.
    """

    W: Tensor
    loc: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        check_data("W", self.W, ndim=2, floating=True)
        for name in ("loc", "scale"):
            value = check_data(name, getattr(self, name), ndim=1, floating=True)
            if len(value) != len(self.W):
                raise ValueError(
                    f"Expected {name} with an entry for each of the {len(self.W)} rows of W; got "
                    f"{len(value)}."
                )
        check_positive("scale.min()", self.scale.min().item())

    def to(self, *args: Any, **kwargs: Any) -> "LinearGaussian":
        """The same problem on another device or in another precision, as ``Tensor.to``."""
        moved = {f.name: getattr(self, f.name).to(*args, **kwargs) for f in fields(self)}
        return replace(self, **moved)

    def sample(self, num_data: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw data.

        Args:
            num_data: How many, N.
            generator: Source of randomness, on the device of ``W``; the global one if None.

        Returns:
            ``N x D``.

        Raises:
            ValueError: If ``num_data`` is below one.
        """
        check_positive("num_data", num_data, minimum=1)
        num_features, num_latents = self.W.shape
        z, noise = (
            torch.randn(
                num_data, size, generator=generator, dtype=self.W.dtype, device=self.W.device
            )
            for size in (num_latents, num_features)
        )
        return z @ self.W.T + self.loc + self.scale * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact marginal log-likelihood, log N(x; b, W W' + diag(scale^2)).

        Args:
            x: Data, ``N x D``.

        Returns:
            log p(x) of each datum, ``N``, in nats.

        Raises:
            TypeError: If ``x`` is no tensor of a floating point type.
            ValueError: If ``x`` is not ``N x D`` or not finite.
        """
        _check_features(x, len(self.W))
        return dist.LowRankMultivariateNormal(self.loc, self.W, self.scale**2).log_prob(x)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Exact posterior, p(z | x) = N(z; m, C) with C = (I + W' S W)^-1 and m = C W' S (x - b).

        S = diag(scale^-2) is the precision of the noise.

        Args:
            x: Data, ``N x D``.

        Returns:
            The means m, ``N x L``, and the Cholesky factor of C, ``L x L``, common to all data.

        Raises:
            TypeError: If ``x`` is no tensor of a floating point type.
            ValueError: If ``x`` is not ``N x D`` or not finite.
        """
        _check_features(x, len(self.W))
        return self._posterior(x)

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # No look at the values: the guide has to run under a tracer as well.
        weighted = self.W / self.scale.unsqueeze(-1) ** 2  # S W, D x L
        precision = self.W.new_ones(self.W.shape[1]).diag() + self.W.T @ weighted
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        return (x - self.loc) @ weighted @ covariance, torch.linalg.cholesky(covariance)

    def model(self, x: Tensor) -> None:
        """The story as a Pyro program: plate ``data``, local latent ``z``, observed ``x``.

        Args:
            x: Data, ``N x D``.
        """
        prior = dist.Normal(self.W.new_zeros(self.W.shape[1]), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ self.W.T + self.loc, self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The exact posterior as a Pyro program, site ``z`` in the plate ``data``.

        Args:
            x: Data, ``N x D``.
        """
        loc, scale_tril = self._posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))


def linear_gaussian(
    num_features: int,
    num_latents: int,
    *,
    scale: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LinearGaussian:
    """A random :class:`LinearGaussian`: loadings and offset standard normal, one noise scale.

    Args:
        num_features: D.
        num_latents: L.
        scale: Standard deviation of the noise in every feature.
        seed: Seed of the draw; the global random state is neither read nor changed.
        dtype: Floating point type.

    Returns:
        The problem, on the CPU.

    Raises:
        ValueError: If a size is below one or the scale is not positive.
    """
    check_positive("num_features", num_features, minimum=1)
    check_positive("num_latents", num_latents, minimum=1)
    generator = torch.Generator().manual_seed(seed)
    # In double precision always, so that one seed is one problem.
    loadings = torch.randn(num_features, num_latents, dtype=torch.float64, generator=generator)
    loc = torch.randn(num_features, dtype=torch.float64, generator=generator)
    return LinearGaussian(loadings, loc, torch.full_like(loc, scale)).to(dtype)
