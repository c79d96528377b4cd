"""Runs of a pair with several particles of its local latents, and what they have for gradients."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine import unwrap
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lvm.infer.gradients import Gradients, linear
from pyro_lvm.pair import Given, Program
from pyro_lvm.terms import PARTICLES, Terms, sharing_globals, terms_from_traces

__all__ = ["Runs", "is_handler"]

_CANT_BROADCAST = (
    "Several particles are run at once, with a dimension of their own left of those of all plates. "
    "chunk_size=1 runs them one by one, for programs that don't broadcast."
)


class Runs:
    """Runs of a pair with several particles of its local latents.

    Attributes:
        live: Local latents of the last run as the guide has drawn them.
        leaves: The same values, without what they were drawn from; none if the run was not to be at
            leaves.
        device: Where random numbers are drawn.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: dict,
        plate: str,
        max_plate_nesting: int,
        global_latents: Sequence[str],
    ) -> None:
        self.programs, self.args, self.kwargs = (model, guide), args, kwargs
        self.plate, self.max_plate_nesting = plate, max_plate_nesting
        self.global_latents = global_latents
        self.live: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        self._sites: dict[str, dict] = {}
        self._globals: dict[str, Tensor] = {}  # as the guide has drawn them
        self._given: dict[str, Tensor] = {}
        self._gradients = Gradients()
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        self.device = next((t.device for t in tensors if t.is_cuda), torch.device("cpu"))

    def draw_globals(self) -> None:
        """Draw the global latents for all runs that follow."""
        if self.global_latents:
            with poutine.block():
                trace = poutine.trace(self.programs[1]).get_trace(*self.args, **self.kwargs)
            self._globals = {name: trace.nodes[name]["value"] for name in self.global_latents}
            self._given = {n: v.detach().requires_grad_() for n, v in self._globals.items()}

    def __call__(self, num_particles: int, *, at_leaves: bool = False) -> Terms:
        """Run the pair once, with so many particles.

        Args:
            num_particles: How many.
            at_leaves: Whether the terms are functions of ``leaves``, at which both programs are
                run, the guide for a second time.
        """
        host = _host_class(Trace_ELBO if is_handler(self.programs[1]) else TraceEnum_ELBO)(
            plate=self.plate,
            given=self._given,
            at_leaves=at_leaves,
            num_particles=num_particles,
            max_plate_nesting=self.max_plate_nesting,
            vectorize_particles=num_particles > 1,
            strict_enumeration_warning=False,
        )
        try:
            traces = next(iter(host._get_traces(*self.programs, self.args, self.kwargs)))
        except Exception as error:
            if num_particles > 1:
                error.add_note(_CANT_BROADCAST)
            raise
        self.live, self.leaves, self._sites = host.live, host.leaves, traces[1].nodes
        return terms_from_traces(*traces, plate=self.plate)

    def add(self, value: Tensor, stops: Sequence[Tensor] = ()) -> list[Tensor]:
        """Add the gradient of a scalar; returns those by ``stops``."""
        return self._gradients.add(value, stops)

    def surrogate(self, like: Tensor) -> Tensor:
        """Zero with the sum of all gradients, those by globals taken further to what drew them."""
        by_globals = [
            linear(drawn, self._gradients.pop(self._given[name]))
            for name, drawn in self._globals.items()
        ]
        return sum(by_globals, self._gradients.surrogate(like))

    def along(self, name: str, table: Tensor) -> Tensor:
        """A table ``K x N`` with the dimensions of a site's value."""
        site = self._sites[name]
        dims = {f.name: f.dim for f in site["cond_indep_stack"]}
        shape = [1] * -min(dims.get(PARTICLES, -1), dims[self.plate])
        shape[dims[self.plate]] = table.shape[1]
        if PARTICLES in dims:  # left of all other plates
            shape[dims[PARTICLES]] = table.shape[0]
        return table.reshape(*shape, *[1] * site["fn"].event_dim)


@cache
def _host_class(base: Any) -> Any:
    return type(f"Leaf{base.__name__}", (_AtLeaves, sharing_globals(base)), {})


class _AtLeaves:
    """Mixin for objectives of Pyro's whose particles share globals: run at leaves if wanted."""

    plate: str
    max_plate_nesting: int
    vectorize_particles: bool
    _vectorized_num_particles: Callable[[Program], Program]

    def __init__(self, *, given: Mapping[str, Tensor], at_leaves: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.given, self.at_leaves = given, at_leaves
        self.live: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    def _get_traces(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Any:
        if not self.at_leaves:
            yield from super()._get_traces(model, guide, args, kwargs)  # type: ignore[misc]
            return
        if self.vectorize_particles:
            model, guide = map(self._vectorized_num_particles, (model, guide))
        # a guide without enumerated sites, which can be run more than once
        enumeration = EnumMessenger(first_available_dim=-1 - self.max_plate_nesting)
        yield self._get_trace(enumeration(model), guide, args, kwargs)

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Any:
        values = dict(self.given)
        if self.at_leaves:
            drawn = poutine.trace(Given(values)(guide)).get_trace(*args, **kwargs)
            self._keep(drawn)
            indices = {n: s["value"] for n, s in drawn.nodes.items() if site_is_subsample(s)}
            values |= {**indices, **self.leaves}
        guide = Given(values)(guide) if values else guide
        return super()._get_trace(model, guide, args, kwargs)  # type: ignore[misc]

    def _keep(self, drawn: Trace) -> None:
        for name, site in drawn.nodes.items():
            is_latent = site["type"] == "sample" and not site_is_subsample(site)
            if is_latent and any(f.name == self.plate for f in site["cond_indep_stack"]):
                self.live[name] = site["value"]
        self.leaves = {name: v.detach().requires_grad_() for name, v in self.live.items()}


def is_handler(guide: Program) -> bool:
    """Whether a guide is a messenger, which makes its own traces."""
    return isinstance(unwrap(guide), Messenger)
