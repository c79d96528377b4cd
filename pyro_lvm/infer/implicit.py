"""A divergence between a story's own draws and the data, for stories without a likelihood."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lvm.infer.comparison import (
    ComparisonInParts,
    compare_in_parts,
    joint,
    needs_density,
    takes_conditions,
)
from pyro_lvm.infer.objective import Call, Objective
from pyro_lvm.infer.prior import learned_choices
from pyro_lvm.pair import (
    PairStructure,
    Program,
    data_plate,
    device_of,
    inspect_pair,
    untouched_random_state,
)
from pyro_lvm.terms import observed_table, sample_table

__all__ = ["ImplicitDivergence"]


class ImplicitDivergence(Objective):
    """Trains a story by a divergence between its draws and the data, at its observed sites.

    To be minimised, with as many draws x' of the story as there are data x in the minibatch::

        N D(p_model, p_data),    x'_i ~ p(x),  i = 1 .. B

    No density of x is needed, only draws that its parameters can be differentiated through: the
    generator of a GAN is a story whose x is ``pyro.sample("x", dist.Delta(G(z), event_dim=1),
    obs=x)``. With `Adversarial` that is a generative adversarial network (Goodfellow et al. 2014),
    with `MMD` a generative moment matching network (Li, Swersky and Zemel 2015).

    All selected sites are drawn and compared jointly. Observed sites that are not selected stay
    what was observed, so that the story is given them; ``conditions`` names those of them that the
    divergence is to see beside the draws, and beside the data: x given y is learnt from pairs
    (x', y) and (x, y). A divergence with ``takes_conditions`` (`Adversarial`) is called with y as
    it is observed, ``divergence(x', x, y)``; for others y is further columns of both samples.

    The parts of `loss_and_parts` are ``loss``, what the story minimises per datum; ``divergence``,
    which is the same but for what the divergence reports by itself; ``discriminator``, the loss of
    the divergence's own player, if it has one; and what the divergence reports
    (``players_and_parts``), such as the accuracy of a discriminator.

    Args:
        divergence: Module or function of two tensors, draws from the story ``B x D`` and data
            ``B x D``, that returns a scalar. A player of its own (`Adversarial`) is trained by the
            same gradient step.
        sites: Observed sites to draw; all but the conditions if None.
        conditions: Observed sites that stay as observed, and that the divergence sees too.
        plate: Name of the data plate.
        retain_graph: As in ``pyro.infer.ELBO``.

    Raises:
        TypeError: If the divergence can't be called.
        ValueError: If it needs a density.
    """

    def __init__(
        self,
        divergence: Any,
        *,
        sites: Sequence[str] | None = None,
        conditions: Sequence[str] = (),
        plate: str = "data",
        retain_graph: bool | None = None,
    ) -> None:
        if not callable(divergence):
            raise TypeError(
                f"Expected a divergence between two samples; got {divergence!r}. Try MMD()."
            )
        if needs_density(divergence):
            raise ValueError(
                f"Expected a divergence between two samples; got {type(divergence).__name__}, "
                f"which needs a density, and the data have none. Use MMD, SlicedWasserstein or "
                f"Adversarial."
            )
        super().__init__(divergence=divergence, plate=plate, retain_graph=retain_graph)
        self.sites, self.conditions = sites, tuple(conditions)

    def _inspect(self, call: Call) -> PairStructure:
        model, guide, args, kwargs = call
        _check_guide(guide, args, kwargs)
        structure = inspect_pair(model, self.guide_of(model), args, kwargs, plate=self.plate)
        self._check_names(structure)
        with torch.enable_grad(), untouched_random_state(args, kwargs), device_of(args, kwargs):
            drawn = self._draw(call, self._selected(structure)).nodes
        for name in self._selected(structure):
            _check_drawn(name, drawn[name], self.plate)
        choices = [n for n in learned_choices(drawn) if n not in self._selected(structure)]
        if choices:
            raise ValueError(
                f"Expected a story whose draws have a pathwise gradient; got {choices}, whose "
                f"probabilities are learned and would have none. Fix these, or relax them, by a "
                f"RelaxedOneHotCategorical for one."
            )
        return structure

    def guide_of(self, model: Program, guide: Program | None = None) -> Program:
        """What samples the latents of a story: the story itself, from their prior."""
        return poutine.block(model, hide_fn=lambda site: site["is_observed"])

    def _evaluate(
        self, call: Call, *, differentiable: bool, parts: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        names = self._selected(self._prepared_for(call))
        with device_of(call.args, call.kwargs):
            trace = self._draw(call, names)
            divergence, player, found = self._compare(trace.nodes, names)
        frame = data_plate([trace], self.plate)
        loss = (frame.full_size or frame.size) * divergence
        if player is not None:
            loss = loss + (frame.full_size or frame.size) * (player - player.detach())
        if not parts:
            return loss, {}
        whole = {"loss": divergence, "divergence": divergence, "discriminator": player}
        parts_by_name = {name: part.detach() for name, part in whole.items() if part is not None}
        return loss, {**parts_by_name, **found}

    def _compare(self, nodes: Mapping[str, Any], names: Sequence[str]) -> ComparisonInParts:
        """The draws at some sites against what was observed there, under the conditions."""
        apart = takes_conditions(self.divergence)
        sites = {n: nodes[n] for n in (*names, *(() if apart else self.conditions))}
        observed = {n: {**s, "value": _observed(s)} for n, s in sites.items()}
        given = [sample_table(nodes[n], self.plate) for n in self.conditions] if apart else []
        draws, data = joint(sites, self.plate), joint(observed, self.plate)
        return compare_in_parts(self.divergence, draws, data, given)

    def _draw(self, call: Call, names: Sequence[str]) -> Trace:
        return poutine.trace(_Drawn(names)(call.model)).get_trace(*call.args, **call.kwargs)

    def _selected(self, structure: PairStructure) -> list[str]:
        if self.sites is not None:
            return list(self.sites)
        return [name for name in structure.observed if name not in self.conditions]

    def _check_names(self, structure: PairStructure) -> None:
        names = [*self._selected(structure), *self.conditions]
        unknown = [name for name in names if name not in structure.observed]
        if unknown or not self._selected(structure):
            raise ValueError(
                f"Expected observed sites in plate '{self.plate}' to draw and compare; got "
                f"{unknown or names}. This story has {list(structure.observed)}."
            )


class _Drawn(Messenger):
    """Draws some observed sites, and keeps what was observed beside the draw."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["name"] in self.names:
            msg["infer"] = {**msg["infer"], "observed": msg["value"]}
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def _observed(site: dict[str, Any]) -> Tensor:
    return site["infer"].get("observed", site["value"])


def _check_drawn(name: str, site: dict[str, Any], plate: str) -> None:
    """Refuse a site whose draws can't be compared with what was observed there."""
    if site["infer"].get("_deterministic"):
        raise ValueError(
            f"Expected observed sites that the story draws; got '{name}', which is given. Let the "
            f"divergence see it by conditions=['{name}'], or name the others by sites=."
        )
    if observed_table(site, plate) is not None:
        raise ValueError(
            f"Expected observations to compare with whole draws; got a mask at site '{name}'. Use "
            f"an objective with a likelihood, or complete data."
        )
    if not site["fn"].has_rsample:
        raise ValueError(
            f"Expected observed sites with reparameterised draws; got '{name}' with "
            f"{type(site['fn']).__name__}, whose draws have no gradient. Let it be a Delta at what "
            f"the story computes, or name others by sites=."
        )


def _check_guide(guide: Program | None, args: tuple, kwargs: dict) -> None:
    """Refuse a guide that samples: the latents of the story come from their prior."""
    if guide is None:
        return
    with (
        torch.no_grad(),
        poutine.block(),
        untouched_random_state(args, kwargs),
        device_of(args, kwargs),
    ):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    names = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    ]
    if names:
        raise ValueError(
            f"Expected no guide, since a story is compared with the data by draws from its own "
            f"prior; got one that samples {names}. Pass None."
        )
