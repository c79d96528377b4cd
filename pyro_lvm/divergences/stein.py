"""Stein variational gradient descent, as a divergence."""

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pyro_lvm.divergences.kernel_mean import add_in_place, check_not_recorded, split_rows
from pyro_lvm.divergences.kernels import IMQ, Kernel, centred, check_kernel, distances_of_centred
from pyro_lvm.divergences.samples import check_samples, full_precision, in_one_type

__all__ = ["Stein"]


class Stein(nn.Module):
    """The direction of steepest descent of KL(q || p), from draws of q and the density of p.

        phi(z_j) = 1/n sum_i [k(z_i, z_j) s(z_i) + grad_{z_i} k(z_i, z_j)],    s = grad log p

    Of all directions in the unit ball of the kernel's space, phi is the one (but for its length)
    along which KL(q || p) falls fastest. The first term drives draws to where p is high, the second
    keeps them apart. The rate of the fall is the squared kernelised Stein discrepancy,

        KSD^2 = 1/n^2 sum_{ij} [s_i . s_j k + s_i . grad_j k + s_j . grad_i k + tr grad_i grad_j k]

    (a V-statistic: never negative, biased upwards by E[d(z, z) - d(z, z')] / n for the summand d).

    The value is KSD^2. The gradient by the draws is ``-phi(z_j) / n`` for each j: NOT the gradient
    of the value, but the direction in which KL(q || p) changes. A step against it is one of Stein
    variational gradient descent; through ``z = f(noise)`` it trains f.

    All draws are taken for draws of one q: p is compared with the aggregate of a batch. Time grows
    as n^2, memory as n.

    Args:
        kernel: Any ``kernel(squared_distance, dim)``, twice differentiable also at 0; see
            :mod:`pyro_lvm.divergences.kernels`. Its parameters, if any, get no gradient.

    Raises:
        TypeError: If the kernel can't be called.

    Reference:
        Liu and Wang 2016, "Stein variational gradient descent", arXiv 1608.04471, eq. 8; Liu, Lee
        and Jordan 2016, "A kernelized Stein discrepancy for goodness-of-fit tests", arXiv
        1602.03253; Gorham and Mackey 2017, "Measuring sample quality with kernels", arXiv
        1703.01717, on why the kernel is an inverse multiquadric: with one of light tails KSD can
        vanish although the draws do not approach p.
    """

    against: ClassVar[Literal["samples", "density"]] = "density"
    """What the second argument is: this divergence needs p's density, others draws from p."""

    def __init__(self, kernel: Kernel = IMQ((1.0,))) -> None:  # noqa: B008
        super().__init__()
        check_kernel(kernel)
        self.kernel = kernel

    def forward(self, q_samples: Tensor, log_prob: Callable[[Tensor], Tensor]) -> Tensor:
        """Return KSD^2, whose gradient by the draws is ``-phi / n``.

        What ``log_prob`` depends on besides, the parameters of a learned p, gets the gradient of
        ``-mean_j log p(z_j)``, which has that of KL(q || p) as its mean.

        Args:
            q_samples: ``n x D``, draws from q.
            log_prob: The logarithm of p's density, up to a constant (which a learned p must not
                leave out): from ``n x D`` to ``n``, row by row.

        Returns:
            A scalar.

        Raises:
            TypeError: If the sample is not a floating point tensor, or ``log_prob`` not callable.
            ValueError: If the sample is not ``n x D`` with at least one row, or ``log_prob`` does
                not return one value per row that depends on it.
        """
        check_samples("q_samples", q_samples)
        if not callable(log_prob):
            raise TypeError(
                f"Expected log_prob to be callable, from n x D to n; got "
                f"{type(log_prob).__name__}. Stein needs the density of p in place of draws."
            )
        with torch.enable_grad():
            z = q_samples.detach().requires_grad_()
            log_density = log_prob(z)
            score = _score(log_density, z)
        fit = -log_density.mean()
        return self.from_score(q_samples, score) + (fit - fit.detach())

    def from_score(self, q_samples: Tensor, score: Tensor) -> Tensor:
        """Return KSD^2, whose gradient by the draws is ``-phi / n``, where the score is known.

        Args:
            q_samples: ``n x D``, draws from q.
            score: ``n x D``, grad log p at each; taken as a constant.

        Returns:
            A scalar.

        Raises:
            TypeError: If the sample or the score is not a floating point tensor.
            ValueError: If the sample is not ``n x D`` with at least one row, or the score differs
                in shape.
        """
        check_samples("q_samples", q_samples)
        check_samples("score", score)
        if score.shape != q_samples.shape:
            raise ValueError(
                f"Expected score of the shape of q_samples, {tuple(q_samples.shape)}; got "
                f"{tuple(score.shape)}. It is the gradient of log p at each row."
            )
        with full_precision(q_samples):
            z, score = in_one_type(q_samples.detach(), score.detach())
            phi, value = _direction_and_discrepancy(self.kernel, z, score)
        still = q_samples - q_samples.detach()
        path = -(phi.detach() * still).sum() / len(z)  # 0, with the gradient -phi / n
        return value.detach() + path

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return "" if isinstance(self.kernel, nn.Module) else f"kernel={self.kernel!r}"


def _score(log_density: Tensor, z: Tensor) -> Tensor:
    """The gradient of each row's log-density by that row."""
    shape = getattr(log_density, "shape", None)
    if shape != z.shape[:1]:
        got = type(log_density).__name__ if shape is None else tuple(shape)
        raise ValueError(
            f"Expected log_prob to return one value per row, of shape ({len(z)},); got {got}. Sum "
            f"over the features, as Independent(...).log_prob does."
        )
    score = None
    if log_density.requires_grad:
        (score,) = torch.autograd.grad(log_density.sum(), z, retain_graph=True, allow_unused=True)
    if score is None:
        raise ValueError(
            "Expected log_prob to have a gradient by its argument; got a constant. Compute it with "
            "torch, without detach or no_grad, or give the score to from_score."
        )
    return score


class _Sums(NamedTuple):
    """Over all i, for the rows j of a block."""

    drive: Tensor  # sum_i k s_i, J x D
    repulsion: Tensor  # sum_i grad_i k, J x D
    trace: Tensor  # sum_i tr grad_i grad_j k, J


def _direction_and_discrepancy(kernel: Kernel, z: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """phi, ``n x D``, and KSD^2.

    Exchanging i and j turns ``s_i . grad_j k`` into ``s_j . grad_i k``: the sums of both are equal.
    """
    check_not_recorded(len(z) ** 2)
    z, _ = centred(z, z)
    n, rows, scores = len(z), split_rows(z), split_rows(score)
    totals = _Sums(torch.zeros_like(z), torch.zeros_like(z), z.new_zeros(n))
    for target, *columns in zip(rows, *map(split_rows, totals), strict=True):
        for source in zip(rows, scores, strict=True):
            add_in_place(columns, _block(kernel, *source, target))
    drive, repulsion, trace = totals
    discrepancy = ((score * (drive + 2 * repulsion)).sum(-1) + trace).sum() / n**2
    return (drive + repulsion) / n, discrepancy


def _block(kernel: Kernel, source: Tensor, score: Tensor, target: Tensor) -> _Sums:
    """The terms of the rows i of ``source`` for the rows j of ``target``.

    With k = f(r^2), r^2 = |z_i - z_j|^2:

        grad_i k = 2 f' (z_i - z_j),    tr grad_i grad_j k = -2 D f' - 4 r^2 f''
    """
    squared, dim = distances_of_centred(source, target), source.shape[1]  # I x J
    value, slope, bend = _derivatives(kernel, squared, dim)
    repulsion = 2 * (slope.mT @ source - slope.sum(0)[:, None] * target)
    return _Sums(value.mT @ score, repulsion, -(2 * dim * slope + 4 * squared * bend).sum(0))


def _derivatives(kernel: Kernel, squared: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """f, f' and f'' at each squared distance, as constants."""
    with torch.enable_grad():
        at = squared.detach().requires_grad_()
        value = kernel(at, dim)
        (slope,) = torch.autograd.grad(value.sum(), at, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), at)
    return value.detach(), slope.detach(), bend
