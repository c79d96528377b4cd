"""The objective of Pyro's that ours build on: chosen for a pair, weighed, and overheard.

A host keeps the traces that it draws, so that an objective can read latents and terms from the very
run that gave the loss, and multiplies the scale of the local latents in model and guide alike, so
that a KL weight has Pyro's own machinery: analytic KL where it exists, score-function gradients,
enumeration.
"""

from functools import cache
from typing import Any, NamedTuple

from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lvm.pair import PairStructure

__all__ = ["Run", "host_class", "recorded"]


class Run(NamedTuple):
    """One run of a pair: its traces, and the indices that its subsampled plates drew."""

    model_trace: Trace
    guide_trace: Trace
    indices: dict[str, Tensor]


def host_class(structure: PairStructure) -> type[ELBO]:
    """The objective of Pyro's that fits a pair best."""
    if structure.model_enumerated or structure.guide_enumerated:
        return TraceEnum_ELBO
    return TraceMeanField_ELBO if structure.has_analytic_kl else Trace_ELBO


@cache
def recorded(base: Any) -> Any:
    """A subclass of an objective that keeps its runs in ``runs``.

    Its instances take the KL weight of local latents from ``weight``, a `LocalWeight`.
    """
    return type(f"Recorded{base.__name__}", (_Recorder, base), {})


class _Recorder:
    """Mixin for subclasses of ``pyro.infer.ELBO``: every trace passes through ``_get_trace``."""

    def __init__(self, *, weight: "LocalWeight", **settings: Any) -> None:
        super().__init__(**settings)
        self.weight = weight
        self.runs: list[Run] = []

    def _get_trace(self, *args: Any) -> tuple[Trace, Trace]:
        with self.weight:
            traces = super()._get_trace(*args)  # type: ignore[misc]
        model_trace, guide_trace = traces
        self.runs.append(Run(model_trace, guide_trace, self.weight.take_indices()))
        return traces


class LocalWeight(Messenger):
    """Multiplies the scale of latent sites in the data plate, except those in ``spared``.

    The scale without the weight stays in the site, for the terms to be reported.
    """

    def __init__(self, weight: float | Tensor, plate: str, spared: tuple[str, ...]) -> None:
        super().__init__()
        self.weight, self.plate, self.spared = weight, plate, spared
        self._indices: dict[str, Tensor] = {}

    def take_indices(self) -> dict[str, Tensor]:
        """The indices of subsampled plates since the last call."""
        indices, self._indices = self._indices, {}
        return indices

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["name"] in self.spared:
            return
        if not isinstance(self.weight, Tensor) and self.weight == 1:
            return
        if any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            msg["unweighted_scale"] = msg["scale"]
            msg["scale"] = msg["scale"] * self.weight

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._indices[msg["name"]] = msg["value"]
