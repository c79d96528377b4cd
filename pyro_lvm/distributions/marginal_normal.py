"""Gaussians of which some features are observed: their densities, and what the rest is then.

With o the observed features of a datum and m the missing ones,

    p(x_o) = N(x_o; loc_o, S_oo),    E[x_m | x_o] = loc_m + S_mo S_oo^-1 (x_o - loc_o).

Every datum keeps its D features: in the place of S stands S_oo beside as many features of variance
1 as are missing, which change neither determinant nor inverse of the rest. It is factorised in
double precision, as S = L L^T has the square of the condition of L.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.distributions.recorded import is_recorded

__all__ = [
    "covariance_of",
    "dense_log_prob",
    "diagonal_log_prob",
    "low_rank_log_prob",
    "low_rank_regression",
    "regression",
]

_LOG_2_PI = math.log(2 * math.pi)


def covariance_of(scale: Tensor, tril: Tensor) -> Tensor:
    """S = L L^T, L = diag(scale) (I + tril), ``... x D x D``, float64.

    Args:
        scale: ``... x D``.
        tril: Strictly lower triangular, ``... x D x D``.
    """
    scale, tril = scale.double(), tril.double()
    factor = scale.unsqueeze(-1) * (tril + torch.eye(tril.shape[-1]).to(tril))
    return factor @ factor.mT


def dense_log_prob(columns: Tensor, loc: Tensor, covariance: Tensor, mask: Tensor) -> Tensor:
    """Log N(x_o; loc_o, S_oo), ``... x C x n``, nats; 0 where no feature is observed.

    Args:
        columns: Data, ``... x D x n``, finite at missing features too.
        loc: Means, ``... x C x D``.
        covariance: S, ``... x C x D x D``, float64, where ``C`` may be 1.
        mask: Which features are observed, ``... x D``, the same in all ``n`` columns.
    """
    if is_recorded():
        return _dense_log_prob(columns, loc, covariance, mask)
    return _Dense.apply(columns, loc, covariance, mask)


def diagonal_log_prob(x: Tensor, loc: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    """Log N(x_o; loc_o, diag(scale_o^2)), ``... x C``, nats.

    Args:
        x: ``... x D``, finite at missing features too.
        loc: Means, ``... x C x D``.
        scale: Standard deviations, broadcastable to the means.
        mask: Which features are observed, ``... x D``.
    """
    mask = mask.unsqueeze(-2)
    white = torch.where(mask, (x.unsqueeze(-2) - loc) / scale, 0.0)
    log_det = torch.where(mask, scale.log(), 0.0).sum(-1)
    return -0.5 * (white.square().sum(-1) + _LOG_2_PI * mask.sum(-1)) - log_det


def regression(columns: Tensor, covariance: Tensor, mask: Tensor) -> Tensor:
    """S_.o S_oo^-1 r_o, ``... x D x n``: what is to be expected of all features given some.

    Args:
        columns: r = x - loc, ``... x D x n``, finite.
        covariance: S, ``... x D x D``, float64.
        mask: Which features are observed, ``... x D``.
    """
    residual = torch.where(mask.unsqueeze(-1), columns.double(), 0.0)
    solved = torch.cholesky_solve(residual, _observed_factor(covariance, mask))
    return (covariance @ solved).to(columns)


def low_rank_log_prob(residual: Tensor, factor: Tensor, diagonal: Tensor, mask: Tensor) -> Tensor:
    """Log N(r_o; 0, S_oo) of S = W W^T + diag(d), ``...``, nats, by Woodbury's identity.

    Args:
        residual: r = x - loc, ``... x D``, finite.
        factor: W, ``... x D x R``.
        diagonal: d, ``... x D``.
        mask: Which features are observed, ``... x D``.
    """
    observed, factor, diagonal, inner = _low_rank(residual, factor, diagonal, mask)
    weighted = observed / diagonal
    inward = factor.mT @ weighted.unsqueeze(-1)  # ... x R x 1
    inward = torch.linalg.solve_triangular(inner, inward, upper=False)
    lengths = (observed * weighted).sum(-1) - inward.square().sum((-2, -1))
    log_det = diagonal.log().sum(-1) + 2 * inner.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (lengths + log_det + mask.sum(-1) * _LOG_2_PI).to(residual)


def low_rank_regression(residual: Tensor, factor: Tensor, diagonal: Tensor, mask: Tensor) -> Tensor:
    """W W_o^T S_oo^-1 r_o, ``... x D``: what `regression` is at missing features.

    It is W (I + W_o^T diag(1/d_o) W_o)^-1 W_o^T r_o / d_o; arguments as for `low_rank_log_prob`.
    """
    observed, own, variances, inner = _low_rank(residual, factor, diagonal, mask)
    inward = torch.cholesky_solve(own.mT @ (observed / variances).unsqueeze(-1), inner)
    return (factor.double() @ inward).squeeze(-1).to(residual)


def _low_rank(
    residual: Tensor, factor: Tensor, diagonal: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Missing features at 0 with variance 1, and the Cholesky factor of I + W^T diag(1/d) W."""
    residual = torch.where(mask, residual, 0.0).double()
    factor = torch.where(mask.unsqueeze(-1), factor, 0.0).double()
    diagonal = torch.where(mask, diagonal, 1.0).double()
    inner = factor.mT @ (factor / diagonal.unsqueeze(-1))
    inner = torch.linalg.cholesky(inner + torch.eye(inner.shape[-1]).to(inner))
    return residual, factor, diagonal, inner


def _observed_factor(covariance: Tensor, mask: Tensor) -> Tensor:
    """The Cholesky factor of S_oo beside I, ``... x D x D``."""
    identity = torch.eye(mask.shape[-1]).to(covariance)
    factor, failed = torch.linalg.cholesky_ex(torch.where(_both(mask), covariance, identity))
    # a loss that is not finite ends a run as it does elsewhere
    return factor.where((failed == 0)[..., None, None], torch.nan)


def _both(mask: Tensor) -> Tensor:
    """Whether row and column of a covariance are observed."""
    return mask.unsqueeze(-1) & mask.unsqueeze(-2)


def _residual(columns: Tensor, loc: Tensor, mask: Tensor) -> Tensor:
    """What x is beyond loc at observed features, 0 at others: ``... x C x D x n``, float64."""
    residual = (columns.unsqueeze(-3) - loc.unsqueeze(-1)).double()
    return torch.where(mask.unsqueeze(-2).unsqueeze(-1), residual, 0.0)


def _dense_log_prob(columns: Tensor, loc: Tensor, covariance: Tensor, mask: Tensor) -> Tensor:
    factor = _observed_factor(covariance, mask.unsqueeze(-2))
    residual = _residual(columns, loc, mask)
    factor = factor.expand(*residual.shape[:-2], *factor.shape[-2:])
    lengths = torch.linalg.solve_triangular(factor, residual, upper=False).square().sum(-2)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_normaliser = log_det + 0.5 * _LOG_2_PI * mask.sum(-1, keepdim=True)
    return (-0.5 * lengths - log_normaliser.unsqueeze(-1)).to(columns)


class _Dense(torch.autograd.Function):
    """`_dense_log_prob`, of which a gradient keeps the arguments alone.

    With a = S_oo^-1 (x_o - loc_o) it is a by loc, -a by x and (a a^T - S_oo^-1) / 2 by S_oo, which
    takes less time than to differentiate a Cholesky factor. It can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor, loc: Tensor, covariance: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(columns, loc, covariance, mask)
        return _dense_log_prob(columns, loc, covariance, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        columns, loc, covariance, mask = ctx.saved_tensors
        of_columns, of_loc, of_covariance, _ = ctx.needs_input_grad
        factor = _observed_factor(covariance, mask.unsqueeze(-2))
        residual, weight = _residual(columns, loc, mask), gradient.unsqueeze(-2).double()
        solved = torch.cholesky_solve(
            residual, factor.expand(*residual.shape[:-2], *factor.shape[-2:])
        )
        slope = weight * solved  # ... x C x D x n
        by_columns = -slope.sum(-3).sum_to_size(columns.shape).to(columns) if of_columns else None
        by_loc = slope.sum(-1).sum_to_size(loc.shape).to(loc) if of_loc else None
        by_covariance = None
        if of_covariance:
            total = weight.sum(-1, keepdim=True)
            inverse = torch.cholesky_inverse(factor).where(_both(mask.unsqueeze(-2)), 0.0)
            by_covariance = 0.5 * (slope @ solved.mT - total * inverse)
            by_covariance = by_covariance.sum_to_size(covariance.shape)
        return by_columns, by_loc, by_covariance, None
