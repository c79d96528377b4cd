"""The bandwidth of a kernel density estimate, chosen by likelihood."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pyro_lvm.checks import check_positive
from pyro_lvm.distributions.kernel_density import squared_distances

__all__ = ["best_bandwidth"]

_STEPS = 40
_SPAN = (0.02, 2.0)
_FAR = torch.finfo(torch.float64).max
_LEAST_EXPONENT = -80.0  # of a point against the nearest one: far below rounding


@torch.no_grad()
def best_bandwidth(
    points: Tensor, x: Tensor | None = None, bandwidths: Sequence[float] | None = None
) -> float:
    """The bandwidth of a `KernelDensity` under which some data are most probable.

        argmax_h sum_i log (1/S) sum_s N(x_i; points_s, h^2 I)

    Without other data each point is left out in turn, and is scored by the rest (Duin 1976). Points
    that come twice make the least bandwidth the best one then.

    Args:
        points: ``S x D``.
        x: ``V x D``, other data than the points; None to leave out one point at a time, which takes
            ``S^2 D`` multiplications.
        bandwidths: Values to choose from; if None, forty between .02 and 2 times the root mean
            square deviation of the data.

    Returns:
        The best of them, in the units of the data.

    Raises:
        ValueError: If there are none, one is not positive, the data do not vary and none are given,
            or a single point is to be left out.
    """
    data = points if x is None else x
    if x is None and len(points) < 2:
        raise ValueError(f"Expected at least 2 points to leave one out; got {len(points)}.")
    widths = _candidates(data, bandwidths)
    if len(widths) == 1:
        return float(widths[0])
    tables = _of_others(points) if x is None else squared_distances(points, data)
    log_sums = _log_sums(tables, -0.5 / widths.square(), len(data))
    means = log_sums.mean(1) - data.shape[1] * widths.log()
    return float(widths[means.argmax()])


def _log_sums(tables: Iterable[Tensor], slopes: Tensor, size: int) -> Tensor:
    """Log sum_s exp(slope |points_s - x_i|^2) for all slopes from one run of tables, ``W x V``."""
    sums = slopes.new_zeros(len(slopes), size)  # relative to the nearest point's
    nearest = slopes.new_full((size,), _FAR)
    for squared in tables:
        least = torch.minimum(nearest, squared.amin(0))
        sums *= _exp(slopes.unsqueeze(1) * (nearest - least))
        nearest, squared = least, squared.sub_(least)
        for total, slope in zip(sums, slopes, strict=True):
            total += _exp(slope * squared).sum(0)
    return sums.log() + slopes.unsqueeze(1) * nearest


def _exp(x: Tensor) -> Tensor:
    """The exponential of numbers up to 0; processors take ten times as long where it underflows."""
    return x.clamp_(min=_LEAST_EXPONENT).exp_()


def _of_others(points: Tensor) -> Iterator[Tensor]:
    """`squared_distances` among points, those of each one to itself beyond all."""
    start = 0
    for squared in squared_distances(points, points):
        rows = torch.arange(len(squared), device=squared.device)
        squared[rows, start + rows] = _FAR
        start += len(squared)
        yield squared


def _candidates(x: Tensor, bandwidths: Sequence[float] | None) -> Tensor:
    if bandwidths is None:
        spread = x.var(0, unbiased=False).double().mean().sqrt()
        check_positive("the deviation of the data", float(spread))
        steps = torch.linspace(0, 1, _STEPS, dtype=torch.float64, device=x.device)
        return spread * _SPAN[0] * (_SPAN[1] / _SPAN[0]) ** steps
    if len(bandwidths) == 0:
        raise ValueError("Expected at least one bandwidth; got none.")
    for bandwidth in bandwidths:
        check_positive("every one of bandwidths", bandwidth)
    return torch.tensor([float(h) for h in bandwidths], dtype=torch.float64, device=x.device)
