"""Draws of a pair's latents, all at once, and their values as ArviZ's variables."""

from collections.abc import Callable, Iterable
from typing import Any

import pyro
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_lvm.inference_data.containers import Arrays, Variable, to_numpy
from pyro_lvm.pair import PairStructure, Program, device_of, unmasked
from pyro_lvm.terms import PARTICLES, Terms, sample_table, terms_from_traces

__all__ = ["Draws", "PosteriorDraws", "dims_of"]


class Draws:
    """Vectorised runs of programs on the arguments of a pair.

    Args:
        structure: The structure of the pair.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        num_draws: ``S``, draws of each chain.
        num_chains: ``C``; all programs run with ``K = C S`` particles.
    """

    def __init__(
        self,
        structure: PairStructure,
        args: tuple,
        kwargs: dict,
        *,
        num_draws: int,
        num_chains: int = 1,
    ) -> None:
        self.structure, self.args, self.kwargs = structure, args, kwargs
        self.num_chains, self.num_particles = num_chains, num_chains * num_draws
        self.plate = str(structure.plate)

    def trace(self, program: Program, latents: Any = None) -> Any:
        """A run of all draws at once, replayed on the latents of a trace."""
        program = self.vectorized(program)
        if latents is not None:
            program = poutine.replay(program, trace=latents)
        return self.run(program)

    def run(self, program: Program) -> Any:
        """A run on the pair's arguments, traced."""
        with device_of(self.args, self.kwargs):
            return poutine.trace(program).get_trace(*self.args, **self.kwargs)

    def vectorized(self, program: Program) -> Program:
        """The program within a plate over draws, left of all others."""
        dim = -1 - self.structure.max_plate_nesting

        def vectorized(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate(PARTICLES, self.num_particles, dim=dim):
                return program(*args, **kwargs)

        return vectorized

    @property
    def first_free_dim(self) -> int:
        """The dimension left of the draws."""
        return -2 - self.structure.max_plate_nesting

    def latents(self, trace: Any) -> Arrays:
        """The latents in a trace of the model."""
        structure = self.structure
        sampled = (*structure.local_latents, *structure.model_enumerated)
        return self.local(trace, sampled) | {
            name: self.variable(name, sample_table(trace.nodes[name], self.plate), is_local=False)
            for name in structure.global_latents
        }

    def predicted(self, trace: Any) -> Arrays:
        """What is observed in the data plate, in a trace that has drawn it."""
        return self.local(trace, self._predicted_in(trace))

    def local(self, trace: Any, names: Iterable[str]) -> Arrays:
        """Sites in the data plate."""
        return {n: self.variable(n, sample_table(trace.nodes[n], self.plate)) for n in names}

    def variable(self, name: str, value: Tensor, *, is_local: bool = True) -> Variable:
        """A table ``K x (N) x ...`` with the dimensions chain, draw, and so on."""
        leading = (self.plate,) * is_local
        value = value.expand(self.num_particles, *value.shape[1:])
        dims = ("chain", "draw", *leading, *dims_of(name, value, 1 + is_local))
        return dims, to_numpy(value).reshape(self.num_chains, -1, *value.shape[1:])

    def _predicted_in(self, trace: Any) -> list[str]:
        nodes = trace.nodes
        return [
            n
            for n in self.structure.observed
            if not nodes[n].get("infer", {}).get("_deterministic") and nodes[n]["value"].numel() > 0
        ]


class PosteriorDraws(Draws):
    """Draws from a guide, and the model replayed on them.

    Args:
        model: The model.
        guide: The guide.
        outermost: What the guide is wrapped in outside of the plate over draws; nothing if None.
        *args: What `Draws` takes.
        **settings: Likewise.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *args: Any,
        outermost: Callable[[Program], Program] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.model, self.guide = model, guide
        # run without enumeration: what the guide enumerates is drawn
        guide = self.vectorized(guide)
        self.guide_trace = self.run(guide if outermost is None else outermost(guide))
        self.model_trace = self.trace(model, self._with_enumerated_latents())

    def terms(self) -> Terms:
        """The terms of the draws: those of the guide's own run, the model's sums taken."""
        model = EnumMessenger(first_available_dim=self.first_free_dim)(self.vectorized(self.model))
        model_trace = self.run(poutine.replay(model, trace=self.guide_trace))
        model_trace, guide_trace = map(prune_subsample_sites, (model_trace, self.guide_trace))
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        return terms_from_traces(model_trace, guide_trace, plate=self.plate)

    def posterior(self, terms: Terms) -> Arrays:
        """Latents of guide and model."""
        arrays = {name: self.variable(name, value) for name, value in terms.samples.items()}
        for name, value in terms.global_samples.items():
            arrays[name] = self.variable(name, value, is_local=False)
        return arrays | self.local(self.model_trace, self.structure.model_enumerated)

    def predictive(self) -> Arrays:
        """Observed sites drawn anew, given the latents."""
        latents, observed = self.model_trace.copy(), self._predicted_in(self.model_trace)
        for name in [
            n for n, s in latents.nodes.items() if s["type"] == "sample" and s["is_observed"]
        ]:
            latents.remove_node(name)
        return self.local(self.trace(poutine.uncondition(self.model), latents), observed)

    def global_values(self, draw: int) -> dict[str, Tensor]:
        """Global latents of one draw, as they would be in a run without particles."""
        nodes = self.guide_trace.nodes
        return {n: self._one_draw(nodes[n], draw) for n in self.structure.global_latents}

    def _one_draw(self, site: dict, draw: int) -> Tensor:
        value, event_dim = site["value"], site["fn"].event_dim
        rank = value.dim() - event_dim
        if rank <= self.structure.max_plate_nesting:  # all draws share it
            return value
        frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
        plates = -min((f.dim for f in frames), default=0)
        row = value[draw if len(value) > 1 else 0]
        return row.reshape(row.shape[rank - 1 - plates :])

    def _with_enumerated_latents(self) -> Any:
        """The guide's trace, with what the model enumerates drawn from its exact posterior."""
        names = self.structure.model_enumerated
        if not names:
            return self.guide_trace
        latents = prune_subsample_sites(self.guide_trace)
        values = {n: s["value"] for n, s in latents.nodes.items() if s["type"] == "sample"}
        # conditioned, not replayed: of replayed sites infer_discrete would not see what they
        # depend on
        story = poutine.condition(self.vectorized(unmasked(self.model, names)), data=values)
        drawn = self.run(infer_discrete(story, first_available_dim=self.first_free_dim))
        for name in names:
            latents.add_node(name, **drawn.nodes[name])
        return latents


def dims_of(name: str, value: Tensor, leading: int) -> tuple[str, ...]:
    """Names of a variable's dimensions behind the leading ones."""
    return tuple(f"{name}_dim_{i}" for i in range(value.dim() - leading))
