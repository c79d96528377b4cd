"""The divergence between the aggregate posterior of a pair and its prior."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lvm.infer.comparison import (
    Comparison,
    compare,
    joint,
    needs_density,
    of_the_whole_batch,
)
from pyro_lvm.infer.gathering import batch_is_shared
from pyro_lvm.infer.host import Run
from pyro_lvm.infer.objective import Call
from pyro_lvm.infer.prior import prior_log_prob, sample_prior_sites
from pyro_lvm.pair import PairStructure, Program

__all__ = ["aggregate_divergence", "check_compared"]


class _Prior(NamedTuple):
    """The model as a story of latents.

    Attributes:
        story: The model, with the plate over particles that the host has around it.
        given: What is not drawn afresh: global latents, the indices of subsampled plates.
    """

    story: Program
    given: dict[str, Tensor]
    call: Call


def aggregate_divergence(
    divergence: Any, names: Sequence[str], host: Any, structure: PairStructure, call: Call
) -> Comparison:
    """D between the latents of a minibatch and the prior, averaged over particles.

    Args:
        divergence: A divergence.
        names: The latents to compare, jointly.
        host: The objective of Pyro's whose runs have the latents.
        structure: What the pair is made of.
        call: The pair and its arguments.

    Raises:
        ValueError: If a latent has more than one value per datum and particle.
    """
    if len(host.runs) > host.num_particles:
        raise ValueError(
            f"Expected one run per particle for the divergence; got sequential enumeration in "
            f"the guide at {list(structure.guide_enumerated)}. Enumerate it in parallel."
        )
    story = call.model
    if host.vectorize_particles:
        story = host._vectorized_num_particles(story)
    by = _by_density if needs_density(divergence) else _by_samples
    found = []
    for run in host.runs:
        shared = {n: run.guide_trace.nodes[n]["value"] for n in structure.global_latents}
        prior = _Prior(story, {**shared, **run.indices}, call)
        found.append(by(divergence, names, host, run, prior))
    values, losses = zip(*found, strict=True)
    player = None if losses[0] is None else torch.stack(losses).mean()
    return torch.stack(values).mean(), player


def check_compared(divergence: Any, names: Sequence[str], structure: PairStructure) -> None:
    """Refuse latents that a divergence can't compare.

    Raises:
        ValueError: What was expected, what came, which site, and the remedy.
    """
    unknown = [n for n in names if n not in structure.local_latents]
    if not names or unknown:
        raise ValueError(
            f"Expected the divergence on local latents that the guide samples; got sites "
            f"{unknown or list(names)}. This pair has {list(structure.local_latents)}."
        )
    for names_of_kind, kind in (
        (structure.not_reparameterised, "not reparameterised in the guide"),
        (structure.masked, "masked"),
    ):
        for name in set(names).intersection(names_of_kind):
            raise ValueError(
                f"Expected latents with a value for every datum and a pathwise gradient for "
                f"the divergence; got site '{name}', which is {kind}. Name others by sites=."
            )
    choices = [n for n in structure.not_reparameterised if n not in structure.guide_enumerated]
    if choices:
        raise ValueError(
            f"Expected a guide whose draws all have a pathwise gradient, for a divergence, whose "
            f"latents may depend on any of them; got {choices} without one. Enumerate them in the "
            f"model and leave them out of the guide, or relax them."
        )
    if structure.num_data < 2 and not batch_is_shared():
        raise ValueError(
            f"Expected at least two data in plate '{structure.plate}', to compare the aggregate "
            f"posterior with the prior; got {structure.num_data}. Use a larger batch."
        )
    if needs_density(divergence):
        _check_density(names, structure)


def _check_density(names: Sequence[str], structure: PairStructure) -> None:
    """Refuse latents whose joint prior has no density in the reals that a run can tell."""
    order = structure.local_latents
    last = max(order.index(name) for name in names)
    skipped = [name for name in order[:last] if name not in names]
    if skipped:
        raise ValueError(
            f"Expected all local latents up to '{order[last]}' for a divergence by the prior's "
            f"density, which is that of all of them; got {list(names)} without {skipped}. Name "
            f"them in sites=, or use a divergence between samples."
        )
    bounded = [name for name in names if name in structure.constrained]
    if bounded:
        raise ValueError(
            f"Expected latents in the reals for a divergence by the prior's density, whose score "
            f"knows no bounds; got {bounded}. Use a divergence between samples, such as MMD."
        )


def _by_samples(
    divergence: Any, names: Sequence[str], host: Any, run: Run, prior: _Prior
) -> Comparison:
    drawn = sample_prior_sites(
        prior.story, names, prior.call.args, prior.call.kwargs, given=prior.given
    )
    q = joint({n: run.guide_trace.nodes[n] for n in names}, host.weight.plate)
    return compare(divergence, q, joint(drawn, host.weight.plate))


def _by_density(
    divergence: Any, names: Sequence[str], host: Any, run: Run, prior: _Prior
) -> Comparison:
    """By the score of the prior at the latents; its parameters learn by the log-density."""
    nodes, plate = {n: run.guide_trace.nodes[n] for n in names}, host.weight.plate
    q = joint(nodes, plate)
    if not hasattr(run.guide_trace, "plate_to_symbol"):
        run.guide_trace.pack_tensors()
    with torch.enable_grad():
        leaves = {n: s["value"].detach().requires_grad_() for n, s in nodes.items()}
        log_prior = prior_log_prob(
            prior.story,
            leaves,
            prior.call.args,
            prior.call.kwargs,
            given=prior.given,
            guide_trace=run.guide_trace,
            plate=plate,
            max_plate_nesting=host.max_plate_nesting,
        )
        score = torch.autograd.grad(
            log_prior.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
        )
    scores = {n: {**s, "value": g} for (n, s), g in zip(nodes.items(), score, strict=True)}
    pairs = zip(*of_the_whole_batch(q, joint(scores, plate)), strict=True)
    value = torch.stack([divergence.from_score(q_k, s_k) for q_k, s_k in pairs]).mean()
    # KL(q || p) by the parameters of p: of - E_q log p alone
    cross_entropy = -log_prior.mean()
    return value + (cross_entropy - cross_entropy.detach()), None
