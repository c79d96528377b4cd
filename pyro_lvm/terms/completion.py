"""Incomplete observations, and draws of what is missing given what there is."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.plate_messenger import PlateMessenger
from pyro.poutine.trace_messenger import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_lvm.pair import Program, device_of, unmasked
from pyro_lvm.pair.plates import sample_sites
from pyro_lvm.terms.compute import terms_from_traces
from pyro_lvm.terms.particles import LocalParticles
from pyro_lvm.terms.record import Terms
from pyro_lvm.terms.sites import PARTICLES, complete_value, sample_table

__all__ = ["Completion", "complete"]


@dataclass(frozen=True)
class Completion:
    """Draws of the latents of a pair, and of the missing entries of its observations given them.

    Attributes:
        values: Site -> ``K x N x (nested plates) x event``, observed sites with masks; what was
            observed is as it was.
        terms: The terms of the latents that were drawn; what the model enumerates is summed out.
    """

    values: dict[str, Tensor]
    terms: Terms


@torch.no_grad()
def complete(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    *,
    num_particles: int,
    max_plate_nesting: int,
    summed_out: Collection[str] = (),
    shared_globals: bool = False,
    plate: str = "data",
) -> Completion:
    """Draw latents from a guide, and then what is missing from the model.

        z_k ~ q(z | x_o),    y_k ~ p(y | z_k, x_o),    x_mk ~ p(x_m | z_k, y_k, x_o)

    Args:
        model: The model.
        guide: The guide; what it enumerates is drawn.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        num_particles: ``K``.
        max_plate_nesting: Dimensions that the plates use.
        summed_out: Sites y that the model enumerates, drawn from their exact posterior.
        shared_globals: Whether all draws have one draw of the global latents in common.
        plate: Name of the data plate.

    Returns:
        The draws, and their terms.
    """
    dim = -1 - max_plate_nesting

    def repeated(program: Program) -> Program:
        if num_particles == 1:  # for programs that know no further dimension
            return program
        if shared_globals:
            return LocalParticles(num_particles, dim=dim, plate=plate)(program)
        return PlateMessenger(PARTICLES, num_particles, dim=dim)(program)

    def run(program: Program, latents: Trace | None = None) -> Trace:
        program = program if latents is None else poutine.replay(program, trace=latents)
        return poutine.trace(program).get_trace(*args, **kwargs)

    with poutine.block(), device_of(args, kwargs):
        guide_trace = run(repeated(guide))
        enumeration = EnumMessenger(first_available_dim=dim - 1)
        model_trace = run(enumeration(repeated(model)), guide_trace)
        terms = _terms(model_trace, guide_trace, plate)
        if summed_out:
            # conditioned, as infer_discrete would not see what replayed sites depend on
            story = poutine.condition(
                repeated(unmasked(model, summed_out)),
                data={n: s["value"] for n, s in sample_sites(guide_trace).items()},
            )
            drawn = run(infer_discrete(story, first_available_dim=dim - 1))
            latents = guide_trace.copy()
            for name in summed_out:
                latents.add_node(name, **drawn.nodes[name])
            model_trace = run(repeated(model), latents)
        values = {name: _completed(model_trace.nodes[name], plate) for name in terms.masks}
    return Completion(
        {name: value.expand(num_particles, *value.shape[1:]) for name, value in values.items()},
        terms,
    )


def _terms(model_trace: Trace, guide_trace: Trace, plate: str) -> Terms:
    model_trace, guide_trace = map(prune_subsample_sites, (model_trace, guide_trace))
    model_trace.compute_log_prob()
    guide_trace.compute_log_prob()
    return terms_from_traces(model_trace, guide_trace, plate=plate)


def _completed(site: dict, plate: str) -> Tensor:
    return sample_table({**site, "value": complete_value(site)}, plate)
