"""Importance weights and what they say, per datum, without keeping them all."""

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from pyro_lvm.marginal.log_marginal import LogMarginal, Observations

__all__ = ["StreamingWeights"]


class StreamingWeights:
    """Statistics of importance weights that arrive in chunks, per datum, in double precision.

    Args:
        num_samples: ``K`` in all; it fixes how many of the largest weights are kept for Pareto k.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        # the tail of Vehtari et al. 2024, section 6, and the largest weight below it
        self.num_kept = 1 + math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples)))
        self.log_sum: Tensor | None = None
        self.log_sum_squares: Tensor | None = None
        self.largest: Tensor | None = None

    def add(self, log_weight: Tensor) -> None:
        """Take in a chunk of log-weights, ``chunk x N``."""
        log_weight = log_weight.double()
        log_sum, log_squares = log_weight.logsumexp(0), (2 * log_weight).logsumexp(0)
        if self.log_sum is None or self.log_sum_squares is None or self.largest is None:
            self.log_sum, self.log_sum_squares, kept = log_sum, log_squares, log_weight
        else:
            self.log_sum = torch.logaddexp(self.log_sum, log_sum)
            self.log_sum_squares = torch.logaddexp(self.log_sum_squares, log_squares)
            kept = torch.cat([self.largest, log_weight])
        self.largest = kept.topk(min(self.num_kept, len(kept)), dim=0).values

    def summary(
        self,
        method: str,
        observations: Observations,
        *,
        advice: str = "Take more samples.",
        assumption: str | None = None,
    ) -> LogMarginal:
        """The estimate after all chunks; the arguments are fields of `LogMarginal`."""
        assert self.log_sum is not None
        assert self.log_sum_squares is not None
        k = self.num_samples
        ess = torch.exp(2 * self.log_sum - self.log_sum_squares)
        # var(w) / (K mean(w)^2) with the unbiased variance; 0 if rounding makes it negative
        relative_variance = (1 / ess - 1 / k).clamp(min=0) * (k / (k - 1) if k > 1 else math.nan)
        return LogMarginal(
            log_prob=self.log_sum - math.log(k),
            std_error=relative_variance.sqrt(),
            ess=ess,
            pareto_k=self._pareto_k(),
            method=method,
            num_samples=k,
            observations=observations,
            advice=advice,
            assumption=assumption,
        )

    def _pareto_k(self) -> Tensor:
        assert self.largest is not None
        tails = self.largest.T.cpu()  # N x kept, descending
        return torch.tensor([_tail_shape(tail) for tail in tails]).to(self.largest)


def _tail_shape(log_weights: Tensor) -> float:
    """Pareto k of the weights above the last of these, which are in descending order."""
    if len(log_weights) < 6:  # ArviZ, too, asks for five exceedances
        return math.nan
    spread = float(log_weights[0] - log_weights[-1])
    # not nan, and more than rounding in single precision of log-weights of this size
    if spread <= 1e-6 * (1 + abs(float(log_weights[0]))):
        return -math.inf
    weights = torch.exp(log_weights - log_weights[0])
    exceedances = (weights[:-1] - weights[-1]).clamp(min=torch.finfo(weights.dtype).tiny)
    return float(fit_generalized_pareto(exceedances)[0])
