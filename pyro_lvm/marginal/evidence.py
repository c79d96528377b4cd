"""The evidence: log p of all data together, global latents averaged over."""

import math
from functools import partial
from typing import Any

import pyro
import torch

from pyro_lvm.checks import check_count
from pyro_lvm.marginal.importance import check_proposal
from pyro_lvm.marginal.log_marginal import LogMarginal, Observations
from pyro_lvm.marginal.progress import progress_bar
from pyro_lvm.marginal.sampling import samples_at_once
from pyro_lvm.marginal.weights import StreamingWeights
from pyro_lvm.pair import PairStructure, Program, inspect_pair, no_guide
from pyro_lvm.terms import compute_terms

__all__ = ["evidence"]

_ADVICE = (
    "Take more samples of the global latents, more num_local if there are local ones, widen the "
    "guide (marginal.widened(guide, latents='all')), or fit a better one."
)


@torch.no_grad()
def evidence(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int = 1000,
    num_local: int = 1,
    plate: str = "data",
    progress: bool = True,
    **kwargs: Any,
) -> LogMarginal:
    """Log p(x_1, ..., x_N), by importance sampling of global and local latents.

        log p(x) ~ log (1/K) sum_k  p(g_k) / q(g_k)  prod_i (1/M) sum_m w_ikm,
        w_ikm = p(x_i, z_ikm | g_k) / q(z_ikm | x_i, g_k),    g_k ~ q(g)

    The mean is unbiased for p(x), and its logarithm too low on average. The product over data makes
    the weights of pairs with many data and local latents vary wildly, unless ``num_local`` grows
    with the number of data. Local latents that are enumerated are summed out.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise.
        *args: The pair's arguments.
        num_samples: ``K``, draws of the global latents.
        num_local: ``M``, draws of the local latents for each of them, ``M x N`` at a time.
        plate: Name of the data plate.
        progress: Whether a terminal shows a progress bar for runs longer than two seconds.
        **kwargs: The pair's keyword arguments.

    Returns:
        The estimate, as that of a single datum: nats in all.

    Raises:
        ValueError: If the pair subsamples its data, or its guide is a point mass at a latent.
    """
    check_count("num_samples", num_samples)
    check_count("num_local", num_local)
    guide = no_guide if guide is None else guide
    structure = inspect_pair(model, guide, args, kwargs, plate=plate)
    check_proposal(structure, [*structure.local_latents, *structure.global_latents])
    _check_complete(structure)
    chunk = samples_at_once(structure, args, kwargs) if num_local == 1 else 1
    run = partial(
        compute_terms,
        model,
        guide,
        *args,
        plate=plate,
        max_plate_nesting=structure.max_plate_nesting,
        **kwargs,
    )
    weights = StreamingWeights(num_samples)
    with progress_bar("evidence", num_samples, progress) as tick, pyro.validation_enabled(False):
        for start in range(0, num_samples, chunk):
            size = min(chunk, num_samples - start)
            if num_local == 1:  # a draw of the global latents for each of the local ones
                terms = run(num_particles=size)
                log_local = terms.log_weight.double()  # size x N
            else:
                terms = run(num_particles=num_local, shared_globals=True)
                log_local = terms.log_weight.double().logsumexp(0, keepdim=True)
                log_local = log_local - math.log(num_local)
            log_global = (terms.global_log_prior - terms.global_log_guide).double()
            weights.add((log_local.sum(1) + log_global[:size]).unsqueeze(1))
            tick(size)
    return weights.summary("evidence", Observations.of(terms).together(), advice=_ADVICE)


def _check_complete(structure: PairStructure) -> None:
    if structure.subsampled:
        raise ValueError(
            f"Expected a pair that sees all data; got one that subsamples plate "
            f"'{structure.plate}'. Remove subsample_size."
        )
