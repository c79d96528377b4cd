"""log p(x) by importance sampling, with the guide as the proposal."""

import math
from typing import Any

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor
from tqdm.auto import tqdm

from pyro_lvm.checks import check_count
from pyro_lvm.marginal.log_marginal import LogMarginal, Observations
from pyro_lvm.pair import PairStructure, Program, hold_subsamples, inspect_pair, no_guide
from pyro_lvm.terms import compute_terms

__all__ = ["StreamingWeights", "importance_sampling"]

# particles times data in one run of the pair: large enough for the matrix products, small enough
# for a network's activations to stay in some tens of megabytes
_ROWS_PER_CHUNK = 2**15


@torch.no_grad()
def importance_sampling(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    plate: str = "data",
    progress: bool = True,
    **kwargs: Any,
) -> LogMarginal:
    """Log p(x_i) by importance sampling from the guide.

        log p(x_i) ~ log (1/K) sum_k w_ik,    w_ik = p(x_i, z_ik) / q(z_ik | x_i)

    The mean of the weights is unbiased for p(x_i); its logarithm is too low on average, by about
    half its squared standard error (Burda et al. 2016: the bound L_K). The standard error is the
    delta method's, sd(w) / (mean(w) sqrt(K)). Enumerated sites are summed out inside each weight.

    A pair that subsamples its data by itself is scored on one minibatch, the same in all chunks.

    With global latents each sample has its own draw g_k from the guide, and the value is that of
    the density of x_i averaged over them, the posterior predictive one if the guide is exact.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise.
        *args: The pair's arguments.
        num_samples: ``K``.
        chunk_size: Samples in one vectorised run of the pair; chosen by the number of data if None.
            With 1 the pair runs sample by sample without a dimension for particles, which suits
            programs that can't broadcast.
        plate: Name of the data plate.
        progress: Whether a terminal shows a progress bar for runs longer than two seconds.
        **kwargs: The pair's keyword arguments.

    Returns:
        The estimate per datum, with standard error, effective sample size and Pareto k. Memory
        grows with the square root of ``num_samples``, for the tail that Pareto k is fitted to.

    Raises:
        ValueError: If the pair has no plate of that name, or the guide is a point mass at a local
            latent, so that its weights say nothing of p(x).
    """
    check_count("num_samples", num_samples)
    structure = inspect_pair(model, guide, args, kwargs, plate=plate)
    _check_proposal(structure)
    if structure.subsampled:
        model, guide = hold_subsamples(model, guide or no_guide, args, kwargs)
    if chunk_size is None:
        chunk_size = max(1, _ROWS_PER_CHUNK // structure.num_data)
    check_count("chunk_size", chunk_size)
    weights = StreamingWeights(num_samples)
    with tqdm(
        total=num_samples,
        desc="importance sampling",
        delay=2.0,
        disable=None if progress else True,
        leave=False,
    ) as bar:
        for start in range(0, num_samples, chunk_size):
            size = min(chunk_size, num_samples - start)
            terms = compute_terms(
                model,
                guide,
                *args,
                num_particles=size,
                plate=plate,
                max_plate_nesting=structure.max_plate_nesting,
                **kwargs,
            )
            weights.add(terms.log_weight)
            bar.update(size)
    return weights.summary("importance sampling", Observations.of(terms))


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

    def summary(self, method: str, observations: Observations) -> LogMarginal:
        """The estimate after all chunks."""
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


def _check_proposal(structure: PairStructure) -> None:
    masses = [n for n in structure.local_latents if n in structure.point_masses]
    if masses and not structure.auxiliary:
        raise ValueError(
            f"Expected a guide with a density at every local latent; got a point mass at {masses}, "
            f"whose weights say nothing of p(x). Use a guide that samples, an AutoNormal for one."
        )
