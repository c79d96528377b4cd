"""log p(x) by enumeration."""

from typing import Any

import torch

from pyro_lvm.marginal.log_marginal import LogMarginal, Observations
from pyro_lvm.pair import PairStructure, Program, inspect_pair
from pyro_lvm.terms import compute_terms

__all__ = ["exact"]


@torch.no_grad()
def exact(
    model: Program, guide: Program | None, *args: Any, plate: str = "data", **kwargs: Any
) -> LogMarginal:
    """Log p(x_i) of a pair whose local latents are all enumerated, in model or guide.

        log p(x_i) = log sum_z p(x_i, z)

    Several enumerated sites, and sites in plates inside the data plate, are summed by tensor
    variable elimination. Global latents must be point estimates (a guide of ``Delta``), since the
    value is that of log p(x_i | g).

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise; None if it samples nothing.
        *args: The pair's arguments.
        plate: Name of the data plate.
        **kwargs: The pair's keyword arguments.

    Returns:
        The value per datum, with standard error 0.

    Raises:
        ValueError: If the guide samples a latent, which has no sum.
    """
    structure = inspect_pair(model, guide, args, kwargs, plate=plate)
    _check_enumerated(structure)
    nesting = structure.max_plate_nesting
    terms = compute_terms(model, guide, *args, plate=plate, max_plate_nesting=nesting, **kwargs)
    log_prob = terms.log_weight[0]
    return LogMarginal(
        log_prob=log_prob,
        std_error=torch.zeros_like(log_prob),
        ess=torch.full_like(log_prob, torch.inf),
        pareto_k=torch.full_like(log_prob, -torch.inf),
        method="exact",
        num_samples=0,
        observations=Observations.of(terms),
    )


def _check_enumerated(structure: PairStructure) -> None:
    latents = [*structure.local_latents, *structure.auxiliary]
    sampled = [n for n in latents if n not in structure.guide_enumerated]
    random = [n for n in structure.global_latents if n not in structure.point_masses]
    if sampled or random:
        raise ValueError(
            f"Expected a pair whose latents are all enumerated, in plate '{structure.plate}', and "
            f"whose global latents are point estimates; got samples at {sampled + random}. "
            f"Use importance_sampling, which averages over them."
        )
