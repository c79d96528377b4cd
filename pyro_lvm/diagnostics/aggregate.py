"""The aggregate posterior q(z) against the prior: covariances, and a discrepancy of draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lvm.diagnostics.estimates import Estimate
from pyro_lvm.divergences import MMD
from pyro_lvm.divergences.kernels import squared_distances
from pyro_lvm.terms.latents import LatentTables

__all__ = ["Aggregate", "compare_aggregate", "joint"]


@dataclass(frozen=True)
class Aggregate:
    """The aggregate posterior q(z) = mean_x q(z | x) of the continuous latents, and their prior.

    Attributes:
        log_det_covariance: log det Cov[q(z)], of data and draws together, without the bias of the
            logarithm to second order; -inf where the draws lie in fewer dimensions.
        prior_log_det_covariance: That of the prior, 0 for a standard normal; exact if the prior has
            independent dimensions and is the same for all data, else from draws.
        mmd: MMD^2(q(z), p(z)) by the U-statistic, in the unit of the kernel (`MMD()`).
        mmd_null_std_error: The standard error that it would have if q(z) were p(z), where its mean
            is 0.
        num_dimensions: ``D``.
        num_draws: Draws of each for the discrepancy.
    """

    log_det_covariance: Estimate
    prior_log_det_covariance: Estimate
    mmd: Estimate
    mmd_null_std_error: float
    num_dimensions: int
    num_draws: int


def compare_aggregate(
    posterior: Sequence[LatentTables], prior: Sequence[LatentTables], *, num_draws: int
) -> Aggregate | None:
    """Compare the draws of some latents with those of their prior.

    Args:
        posterior: The tables of the latents under the guide.
        prior: Their tables under the prior, for the same data.
        num_draws: Rows of each for the discrepancy, at most; chosen at random if there are more.

    Returns:
        The comparison; None if there are no latents.
    """
    if not posterior:
        return None
    q, p = joint(posterior), joint(prior)
    index = torch.randperm(q.shape[1], device=q.device)[:num_draws]
    mmd, null = discrepancy(q[0, index], p[0, index])
    exact = _log_det_if_known(prior)
    return Aggregate(
        log_det_covariance=log_det_covariance(q),
        prior_log_det_covariance=log_det_covariance(p) if exact is None else Estimate(exact, 0.0),
        mmd=mmd,
        mmd_null_std_error=null,
        num_dimensions=q.shape[2],
        num_draws=len(index),
    )


def joint(latents: Sequence[LatentTables]) -> Tensor:
    """Draws of several latents side by side, ``K x N x D``, in double precision."""
    return torch.cat([tables.values.double() for tables in latents], -1)


def log_det_covariance(draws: Tensor) -> Estimate:
    """Log det of the covariance of clustered draws, ``K`` of each of ``N`` data (``K x N x D``).

        S = mean_i A_i,    E log det S = log det C - (1/2) E tr (C^-1 (S - C))^2 + ...

    where A_i is the second moment of a datum's draws around the mean of all, plus what that mean
    takes away. Data are independent and a datum's draws are not, so that bias and error are those
    of N second moments. For one draw per datum of a normal the bias is -D (D + 1) / (2 N).
    """
    num_particles, num_data, num_dims = draws.shape
    centred = draws - draws.mean((0, 1))
    means = centred.mean(0)  # N x D
    covariance = torch.einsum("kni,knj->ij", centred, centred) / (num_particles * num_data)
    covariance = covariance + means.T @ means / (num_data * (num_data - 1))
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or num_data * num_particles <= num_dims:
        return Estimate(-math.inf, math.nan)
    white = torch.linalg.solve_triangular(factor, centred.reshape(-1, num_dims).T, upper=False)
    white = white.T.reshape(num_particles, num_data, num_dims)
    squares = white.square().sum(-1).mean(0)  # N, tr C^-1 A_i, with mean D
    products = torch.einsum("kni,lni->nkl", white, white)
    second = products.square().mean((1, 2)) - num_dims  # N, tr (C^-1 A_i - 1)^2 on average
    log_det = 2 * factor.diagonal().log().sum() + second.sum() / (2 * num_data**2)
    return Estimate(float(log_det), float(squares.std() / math.sqrt(num_data)))


def discrepancy(q: Tensor, p: Tensor) -> tuple[Estimate, float]:
    """MMD^2 of two samples ``B x D`` of paired rows, and its standard error under q = p.

        U = sum_{i != j} h_ij / (B (B - 1)),    h_ij = k(q_i, q_j) + k(p_i, p_j) - k(q_i, p_j)
                                                       - k(p_i, q_j)

    If q = p each pair (q_i, p_i) may as well be (p_i, q_i), which changes the signs of row and
    column i: over these changes the variance of U is 2 sum_{i != j} h_ij^2 / (B (B - 1))^2. In
    general the variance of the means of rows comes on top.
    """
    kernel, (count, num_dims) = MMD().kernel, q.shape
    gram = (
        kernel(squared_distances(q, q), num_dims)
        + kernel(squared_distances(p, p), num_dims)
        - kernel(squared_distances(q, p), num_dims)
        - kernel(squared_distances(p, q), num_dims)
    )
    gram.fill_diagonal_(0.0)
    pairs = count * (count - 1)
    null = math.sqrt(2 * float(gram.square().sum())) / pairs
    rows = gram.sum(1) / max(1, count - 1)
    error = math.sqrt(4 * float(rows.var()) / count + null**2)
    return Estimate(float(gram.sum() / pairs), error), null


def _log_det_if_known(prior: Sequence[LatentTables]) -> float | None:
    """Log det Cov[p(z)] where no dimension depends on another one or on the data."""
    total = 0.0
    for tables in prior:
        if tables.variance is None or tables.mean is None:
            return None
        for table in (tables.mean, tables.variance):
            if not bool((table == table[:1, :1]).all()):  # nan is not, either
                return None
        total += float(tables.variance[0, 0].double().log().sum())
    return total
