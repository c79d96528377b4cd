"""Kernels: functions of a squared distance, positive definite.

``kernel(squared_distance, dim) -> Tensor`` is all that a kernel is: any function like that will do.
``dim`` is the number of features D. Squared distances grow with it (2 D between two draws of a
standard normal), so widths are counted in that unit and one default fits every D.

A kernel of several widths is the sum of one kernel for each, as in the code that published weights
of the discrepancy go with; ``k(x, x)`` is then the number of widths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_lvm.checks import check_positive

__all__ = [
    "IMQ",
    "RBF",
    "Kernel",
    "centred",
    "check_kernel",
    "distances_of_centred",
    "squared_distances",
]

Kernel: TypeAlias = Callable[[Tensor, int], Tensor]
"""Squared distances (any shape) and the number of features, to kernel values (same shape)."""


@dataclass(frozen=True)
class IMQ:
    """Inverse multiquadratics, summed over several scales.

        k(x, y) = sum_s C_s / (C_s + |x - y|^2),    C_s = 2 D s

    At s = 1, C_s is the mean squared distance of two draws from a standard normal. The tails fall
    as a power of the distance, so that samples far from the prior still feel a pull.

    Args:
        scales: The values of s, all positive.

    Raises:
        ValueError: If there is none, or one is not positive.

    Reference:
        Tolstikhin et al. 2018, "Wasserstein auto-encoders", arXiv 1711.01558, section 4: their
        constant C = 2 D sigma^2 for the prior's variance sigma^2 = 1. The scales are those of
        their code.
    """

    scales: Sequence[float] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", _widths("scales", self.scales))

    def __call__(self, squared_distance: Tensor, dim: int) -> Tensor:
        """Return the kernel's values.

        Args:
            squared_distance: ``|x - y|^2``, of any shape.
            dim: The number of features D.

        Returns:
            Positive values, of the same shape.
        """
        constants = (2 * dim * s for s in self.scales)
        values = [c / (c + squared_distance) for c in constants]
        return sum(values[1:], values[0])


@dataclass(frozen=True)
class RBF:
    """Gaussian kernels, summed over several bandwidths.

        k(x, y) = sum_h exp(-|x - y|^2 / (2 D h^2))

    Two draws from a standard normal are 2 D apart (squared), where the default bandwidths give
    exp(-1/h^2) = 0.02, 0.37, 0.78 and 0.94: none of them is flat there, however large D is and the
    more the squared distances concentrate around 2 D (h = 0.25 would give 1e-7 and no gradient),
    and the widest still pulls on samples several standard deviations away.

    Args:
        bandwidths: The values of h, all positive.

    Raises:
        ValueError: If there is none, or one is not positive.

    Reference:
        Gretton et al. 2012, "A kernel two-sample test", JMLR 13, section 2.2 (Gaussian kernels are
        characteristic: the discrepancy is 0 only if the distributions are the same).
    """

    bandwidths: Sequence[float] = (0.5, 1.0, 2.0, 4.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "bandwidths", _widths("bandwidths", self.bandwidths))

    def __call__(self, squared_distance: Tensor, dim: int) -> Tensor:
        """Return the kernel's values.

        Args:
            squared_distance: ``|x - y|^2``, of any shape.
            dim: The number of features D.

        Returns:
            Values from 0 on, of the same shape.
        """
        values = [torch.exp(-squared_distance / (2 * dim * h**2)) for h in self.bandwidths]
        return sum(values[1:], values[0])


def _widths(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """The widths as a tuple of floats: hashable, whatever sequence they came in."""
    widths = tuple(float(value) for value in values)
    if not widths:
        raise ValueError(f"Expected {name} with at least one value; got {values!r}.")
    for width in widths:
        check_positive(f"every one of {name}", width)
    return widths


def check_kernel(kernel: object) -> None:
    """Refuse what can't be called.

    Raises:
        TypeError: If it can't.
    """
    if not callable(kernel):
        raise TypeError(
            f"Expected kernel to be callable as kernel(squared_distance, dim); got {kernel!r}. "
            f"Try lvm.divergences.IMQ()."
        )


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances between all rows of ``x`` and all rows of ``y``.

    The two are first shifted by their common mean, see :func:`centred`.

    Args:
        x: ``B1 x D``.
        y: ``B2 x D``.

    Returns:
        ``B1 x B2``, none of them negative.
    """
    return distances_of_centred(*centred(x, y))


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Shift both samples by their common mean, which leaves distances as they are.

    Returns:
        ``B1 x D`` and ``B2 x D``, one and the same tensor if ``x`` and ``y`` are.
    """
    if x is y:
        shifted = x - x.detach().mean(0)
        return shifted, shifted
    centre = torch.cat([x, y]).detach().mean(0)  # detached: the result does not depend on it
    return x - centre, y - centre


def distances_of_centred(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances of rows that lie around the origin.

        |x_i - y_j|^2 = |x_i|^2 + |y_j|^2 - 2 x_i . y_j

    From one matrix product, which is fast but subtracts large numbers: 1e4 away from the origin
    float32 would keep no digit of distances of order 1, hence :func:`centred`. There is no square
    root, so the gradient is finite where points coincide.

    Args:
        x: ``B1 x D``.
        y: ``B2 x D``.

    Returns:
        ``B1 x B2``, none of them negative.
    """
    squares = x.square().sum(-1)[:, None] + y.square().sum(-1)
    return torch.addmm(squares, x, y.mT, alpha=-2).clamp(min=0)  # rounding may go below 0
