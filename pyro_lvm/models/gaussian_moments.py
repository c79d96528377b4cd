"""What maximum likelihood has to know of data shared out among Gaussians, and makes of it.

A step from data to Gaussians is the same whether a datum belongs to one component, as after
k-means, or to each in part, as in expectation-maximisation: moments, and from these the parameters
with the greatest likelihood. The data are passed over in their own precision, in chunks, in the
white coordinates of Gaussians that are near them; all else is in float64.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_lvm.distributions.whitening import (
    columns_at_once,
    inverse_factor,
    log_normaliser,
    middle,
    whiten,
    whitened_means,
)

__all__ = ["Covariance", "Moments", "Table", "maximum_likelihood", "moments_given"]

Covariance = Literal["full", "tied", "diagonal", "spherical"]

# of a component in a datum: far below rounding, but no weight becomes 0, and no product is so near
# underflow that processors are slow at it
_LEAST_LOG_SHARE = -80.0
_ROUNDING = torch.finfo(torch.float64).eps


class Table(NamedTuple):
    """A mixture's parameters, in the shapes that its kind of covariance has, float64."""

    weights: Tensor
    loc: Tensor
    scale: Tensor
    tril: Tensor | None = None

    def factor(self) -> Tensor:
        """L, ``C x D x D``; its diagonal, ``C x D``, without ``tril``; C is 1 if it is tied."""
        if self.tril is None:
            return self.scale.expand(len(self.scale), self.loc.shape[1])
        unit = self.tril + torch.eye(self.loc.shape[1]).to(self.loc)
        return self.scale.unsqueeze(-1) * unit

    def covariances(self) -> Tensor:
        """S = L L^T, ``C x D x D``, or its diagonal, ``C x D``, as for `factor`."""
        factor = self.factor()
        return factor.square() if self.tril is None else factor @ factor.mT


class Moments(NamedTuple):
    """How much of the data each component has, and where.

    Attributes:
        counts: Sums of the shares, ``C``.
        loc: Means, ``C x D``.
        scatter: Sums of shares times (x - loc) (x - loc)^T, ``C x D x D``; over all components,
            ``1 x D x D``, if the covariance is tied; diagonals, ``C x D``, if it has no others.
    """

    counts: Tensor
    loc: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, table: Table) -> "Moments":
        """Those of a mixture itself; the counts add up to 1."""
        counts, covariances = table.weights, table.covariances()
        shared = table.tril is not None and len(covariances) == 1
        return cls(counts, table.loc, covariances if shared else _times(counts, covariances))

    def merged(self, other: "Moments", share: float) -> "Moments":
        """Those of 1 - share of these data and ``share`` of others."""
        a, b = (1 - share) * self.counts, share * other.counts
        counts = a + b
        part = b / counts.clamp(min=torch.finfo(counts.dtype).tiny)
        apart = other.loc - self.loc
        between = _pooled(_squares(a * part, apart, self.scatter), self.scatter)
        scatter = (1 - share) * self.scatter + share * other.scatter + between
        return Moments(counts, self.loc + _times(part, apart), scatter)


def moments_given(
    x: Tensor,
    table: Table,
    *,
    labels: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Moments, float]:
    """The moments of data that have labels, or else of their expectation given the parameters.

    Components without data stay where they were.

    Args:
        x: ``N x D``.
        table: The parameters; given labels, any with means and scales near the data's.
        labels: ``N``, or None for p(z_i = c | x_i).
        chunk_size: How many data at a time; a number that suits the device if None.

    Returns:
        The moments, and the sum of log p(x_i), nats; 0 given labels.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    view = _View(table, dtype)
    chunk_size = chunk_size or columns_at_once(view.means.shape, table.loc.device)
    counts, first, total = (
        torch.zeros_like(t) for t in (table.weights, table.loc, table.loc[0, 0])
    )
    second = torch.zeros_like(table.covariances())
    # all chunks share memory: to get it from the system again takes longer than to fill it
    buffers = torch.empty(2, min(chunk_size, len(x)) * view.means.numel()).to(view.means)
    for start in range(0, len(x), chunk_size):
        chunk = x[start : start + chunk_size].to(table.loc.device, dtype)  # n x D
        spaces = buffers[:, : len(chunk) * view.means.numel()]
        white, spare = spaces.reshape(2, *view.means.shape, len(chunk))  # C x D x n
        view.whiten(chunk, out=white)
        if labels is None:
            shares, log_prob = view.share_out(torch.square(white, out=spare).sum(1))
            total += log_prob.sum(dtype=total.dtype)
        else:
            here = labels[start : start + chunk_size]
            shares = torch.nn.functional.one_hot(here, len(table.loc)).to(white).T  # C x n
        weighted = torch.mul(white, shares.unsqueeze(1), out=spare)
        counts += shares.sum(-1)
        first += weighted.sum(-1)
        diagonal = table.tril is None
        squares = weighted.mul_(white).sum(-1) if diagonal else weighted @ white.mT
        second += _pooled(squares, second)
    sums = Moments(counts, first, second)
    return _in_data_space(sums, table, torch.finfo(dtype).eps), float(total)


def maximum_likelihood(
    moments: Moments, previous: Table, least: Tensor, *, spherical: bool = False
) -> Table:
    """The parameters with the greatest likelihood among those with ``scale >= least``.

    A scale is a feature's deviation from its regression on the features before it. One that would
    be too small is the least one then, and no regression changes: that is the exact maximum.

    Args:
        moments: Those of the data.
        previous: What components without data keep.
        least: ``1 x D``, or ``1 x 1``.
        spherical: Whether a component's features have one scale.
    """
    counts, total = moments.counts, moments.counts.sum()
    occupied = counts > _ROUNDING * total
    loc = torch.where(occupied.unsqueeze(-1), moments.loc, previous.loc)
    if len(moments.scatter) == 1:  # tied, or one component
        covariances = moments.scatter / total
    else:
        covariances = _times(1 / counts.where(occupied, 1.0), moments.scatter)
        keep = (~occupied).reshape(-1, *[1] * (covariances.dim() - 1))
        covariances = torch.where(keep, previous.covariances(), covariances)
    if previous.tril is None:
        if spherical:
            covariances = covariances.mean(-1, keepdim=True)
        return Table(counts / total, loc, covariances.sqrt().maximum(least))
    return Table(counts / total, loc, *_regressions(covariances, least))


class _View:
    """Data as the Gaussians of a table see them."""

    def __init__(self, table: Table, dtype: torch.dtype) -> None:
        loc, num_features = table.loc, table.loc.shape[1]
        self.centre = middle(loc).to(dtype)
        inverse = inverse_factor(table.scale, table.tril)
        self.means = whitened_means(loc - self.centre, inverse).to(dtype)
        self.inverse = inverse.to(dtype)
        constant = table.weights.log() - log_normaliser(table.scale, num_features)
        self.constant = constant.to(dtype).unsqueeze(-1)  # C x 1

    def whiten(self, x: Tensor, out: Tensor) -> None:
        """L^-1 (x - loc), ``C x D x N``."""
        whiten((x - self.centre).T, self.means, self.inverse, out=out)

    def share_out(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """p(z = c | x), ``C x N``, and log p(x), ``N``, nats, given |L^-1 (x - loc)|^2."""
        joint = self.constant - 0.5 * lengths
        greatest = joint.amax(0)
        shares = (joint - greatest).clamp_(min=_LEAST_LOG_SHARE).exp_()
        total = shares.sum(0)
        return shares.div_(total), greatest + total.log()


def _in_data_space(sums: Moments, table: Table, rounding: float) -> Moments:
    """From sums of powers of white data to moments about the means of the data."""
    counts, first, second = sums
    mean = first / counts.clamp(min=torch.finfo(counts.dtype).tiny).unsqueeze(-1)  # C x D
    scatter = second - _pooled(_squares(counts, mean, second), second)
    factor = table.factor()
    if table.tril is None:
        return Moments(counts, table.loc + factor * mean, factor.square() * scatter.clamp(min=0))
    # rounding may have left it indefinite, by so much of its own scale
    scatter = scatter + 8 * rounding * torch.diag_embed(second.diagonal(dim1=-2, dim2=-1))
    loc = table.loc + (factor @ mean.unsqueeze(-1)).squeeze(-1)
    return Moments(counts, loc, factor @ ((scatter + scatter.mT) / 2) @ factor.mT)


def _regressions(covariances: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The scale, at least ``least``, and tril of L = diag(scale) (I + tril), S = L L^T."""
    # a variance of 0 may be less by rounding
    variances = covariances.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    spread = variances.sqrt().maximum(least)  # C x D
    correlations = covariances / (spread.unsqueeze(-1) * spread.unsqueeze(-2))
    factor = spread.unsqueeze(-1) * _cholesky(correlations)
    scale = factor.diagonal(dim1=-2, dim2=-1)
    bounded = scale.maximum(least)
    factor = factor * (bounded / scale).unsqueeze(-2)  # L diag(scale)^-1 holds the regressions
    return bounded, (factor / bounded.unsqueeze(-1)).tril(-1)


def _cholesky(correlations: Tensor) -> Tensor:
    """Of matrices that rounding, or features that determine each other, left without an inverse."""
    identity = torch.eye(correlations.shape[-1]).to(correlations)
    ridge = torch.full_like(correlations[..., :1, :1], 1e3 * _ROUNDING)
    for _ in range(6):
        factor, failed = torch.linalg.cholesky_ex(correlations + ridge * identity)
        if not failed.any():
            break
        ridge = torch.where(failed.bool()[..., None, None], 100 * ridge, ridge)  # up to 2e-3
    return factor


def _times(numbers: Tensor, table: Tensor) -> Tensor:
    """``C`` times ``C x ...``."""
    return numbers.reshape(-1, *[1] * (table.dim() - 1)) * table


def _squares(counts: Tensor, vectors: Tensor, like: Tensor) -> Tensor:
    """Counts times v v^T, ``C x D x D``, or its diagonal, ``C x D``."""
    weighted = counts.unsqueeze(-1) * vectors
    return weighted * vectors if like.dim() == 2 else weighted.unsqueeze(-1) * vectors.unsqueeze(-2)


def _pooled(squares: Tensor, like: Tensor) -> Tensor:
    """Summed over the components if these share a covariance."""
    return squares.sum(0, keepdim=True) if len(like) < len(squares) else squares
