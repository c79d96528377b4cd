"""log p(x) by importance sampling, with the guide as the proposal."""

from collections.abc import Sequence
from typing import Any

import torch

from pyro_lvm.checks import check_count
from pyro_lvm.marginal.log_marginal import LogMarginal
from pyro_lvm.marginal.sampling import averaged_weights
from pyro_lvm.pair import PairStructure, Program, inspect_pair, no_guide

__all__ = ["check_proposal", "importance_sampling"]

_ADVICE = (
    "The guide misses mass of the posterior: take more samples, widen the guide "
    "(marginal.widened), fit a better one, or use annealed_importance_sampling."
)


@torch.no_grad()
def importance_sampling(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int = 1000,
    chunk_size: int | None = None,
    batch_size: int | None = None,
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
        chunk_size: Samples in one vectorised run of the pair; chosen by the size of the data if
            None. With 1 the pair runs sample by sample without a dimension for particles, which
            suits programs that can't broadcast.
        batch_size: Data in one run of the pair; all if None. The tensors among the arguments that
            have a row for each datum are taken apart.
        plate: Name of the data plate.
        progress: Whether a terminal shows a progress bar for runs longer than two seconds.
        **kwargs: The pair's keyword arguments.

    Returns:
        The estimate per datum, with standard error, effective sample size and Pareto k. Memory
        grows with the square root of ``num_samples``, for the tail that Pareto k is fitted to, by
        24 bytes per datum and unit of that root.

    Raises:
        ValueError: If the pair has no plate of that name, or the guide is a point mass at a local
            latent, so that its weights say nothing of p(x).
    """
    check_count("num_samples", num_samples)
    guide = no_guide if guide is None else guide
    structure = inspect_pair(model, guide, args, kwargs, plate=plate)
    check_proposal(structure, structure.local_latents)
    return averaged_weights(
        model,
        guide,
        args,
        kwargs,
        structure,
        num_samples=num_samples,
        chunk_size=chunk_size,
        batch_size=batch_size,
        method="importance sampling",
        advice=_ADVICE,
        progress=progress,
    )


def check_proposal(structure: PairStructure, latents: Sequence[str]) -> None:
    """Refuse a guide that is a point mass at one of some latents.

    Raises:
        ValueError: If it is.
    """
    masses = [n for n in latents if n in structure.point_masses]
    if masses and not structure.auxiliary:
        raise ValueError(
            f"Expected a guide with a density at these latents; got a point mass at {masses}, "
            f"whose weights say nothing of p(x). Use a guide that samples, an AutoNormal for one."
        )
