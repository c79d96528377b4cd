"""The objective of Pyro's that ours build on: chosen for a pair, weighed, and overheard.

A host keeps the traces that it draws, so that an objective can read latents and terms from the very
run that gave the loss, and multiplies the scale of the local latents in model and guide alike, so
that a KL weight has Pyro's own machinery: analytic KL where it exists, score-function gradients,
enumeration.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lvm.pair import PairStructure, Program
from pyro_lvm.terms import Terms, terms_from_traces

__all__ = ["LocalWeight", "Run", "TraceTerms_ELBO", "host_class", "recorded"]


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

    Its instances take the KL weights of local latents from ``weight``, a `LocalWeight`.
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

    Attributes:
        of: From a site's name to its weight.
    """

    def __init__(self, plate: str, spared: tuple[str, ...]) -> None:
        super().__init__()
        self.plate, self.spared = plate, spared
        self.of: Callable[[str], float | Tensor] = lambda _: 1.0
        self._indices: dict[str, Tensor] = {}

    def take_indices(self) -> dict[str, Tensor]:
        """The indices of subsampled plates since the last call."""
        indices, self._indices = self._indices, {}
        return indices

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["name"] in self.spared:
            return
        if not any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            return
        weight = self.of(msg["name"])
        if isinstance(weight, Tensor) or weight != 1:
            msg["unweighted_scale"] = msg["scale"]
            msg["scale"] = msg["scale"] * weight

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._indices[msg["name"]] = msg["value"]


class TraceTerms_ELBO(TraceEnum_ELBO):
    """The weighted objective as a function of the terms, pathwise.

        sum_i { log p(x_i | z_i) - sum_s weight_s log q(z_is | x_i) / p(z_is) }  -  KL(q(g) || p(g))

    Pyro takes a sum over a site that the model enumerates only if all that touches it has one
    scale. In the terms such a sum is taken first: the prior of a sampled latent that depends on the
    site is its marginal, and the weight is that of a log-density. It holds for guides whose sites
    are all reparameterised.
    """

    weight: LocalWeight

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, nats over all data."""
        return self.differentiable_loss(model, guide, *args, **kwargs)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss, nats over all data."""
        losses = [
            self._loss_of(terms_from_traces(*traces, plate=self.weight.plate))
            for traces in self._get_traces(model, guide, args, kwargs)
        ]
        return torch.stack(losses).mean()

    def _loss_of(self, terms: Terms) -> Tensor:
        kl = sum(self.weight.of(name) * value for name, value in terms.kl.items())
        per_datum = (terms.log_likelihood - kl).mean(0)
        return terms.global_kl.mean() - terms.plate_scale * per_datum.sum()
