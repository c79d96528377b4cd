"""A pair that is annealed on some arguments: its path, a pilot run, and what chains measure."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_lvm.checks import check_count
from pyro_lvm.compiled.tracing import footprint
from pyro_lvm.marginal.annealing.acceptance import AnnealedLogMarginal
from pyro_lvm.marginal.annealing.chains import Annealed, Kernels, anneal, anneal_back, pilot_run
from pyro_lvm.marginal.annealing.ends import Ends
from pyro_lvm.marginal.annealing.hamiltonian import HMC, Densities, Point
from pyro_lvm.marginal.annealing.path import Path
from pyro_lvm.marginal.annealing.precision import check_precision, in_precision, with_precision
from pyro_lvm.marginal.annealing.temperatures import Temperatures
from pyro_lvm.marginal.log_marginal import LogMarginal, Observations
from pyro_lvm.marginal.progress import progress_bar
from pyro_lvm.marginal.sampling import samples_at_once
from pyro_lvm.marginal.weights import StreamingWeights
from pyro_lvm.pair import Program, device_of, untouched_random_state

__all__ = ["Annealer", "Settings", "ready"]

METHOD = "annealed importance sampling"
_ADVICE = (
    "Take more temperatures, more leapfrog steps (transition=HMC(num_steps=...)), or more samples."
)

_Start = Callable[[int], tuple[Densities, Point]]
_Run = Callable[..., Annealed]


@dataclass(frozen=True)
class Settings:
    """How chains are annealed, see `annealed_importance_sampling`."""

    num_samples: int
    schedule: Temperatures
    hmc: HMC
    chunk_size: int | None
    progress: bool

    def __post_init__(self) -> None:
        check_count("num_samples", self.num_samples)
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)
        if not isinstance(self.hmc, HMC):
            raise ValueError(f"Expected transition to be an HMC(...); got {self.hmc!r}.")


class Annealer:
    """A pair on some arguments, with kernels that a pilot run has fixed.

    Args:
        ends: The ends of the pair's path.
        args: Positional arguments of the pair.
        kwargs: Its keyword arguments.
        num_data: ``N``.
        settings: How chains are annealed.
        assumption: What the density of the story rests on beside the story.
        given: Values of the global latents for all chains, site -> ``(plates) x event``; each
            chain has a draw of its own from the guide if None.
    """

    def __init__(
        self,
        ends: Ends,
        args: tuple,
        kwargs: dict,
        num_data: int,
        settings: Settings,
        *,
        assumption: str | None = None,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.ends, self.args, self.kwargs, self.settings = ends, args, kwargs, settings
        self.assumption, self.given = assumption, given
        self._size = replace(ends.structure, num_data=num_data), args, kwargs
        self.path = Path(ends, args, kwargs)
        self.observations: Observations
        self.kernels = self._pilot()

    def forward(self) -> AnnealedLogMarginal:
        """From the start to the posterior: on average a lower bound of log p(x)."""
        weights, acceptance = self._weights(self._start, anneal)
        return self._record(weights.summary(METHOD, self.observations, advice=_ADVICE), acceptance)

    def back(self, values: Mapping[str, Tensor]) -> AnnealedLogMarginal:
        """From draws of the posterior to the start: on average an upper bound of log p(x).

        Args:
            values: One draw for each datum, site -> ``N x (nested plates) x event``, where all
                chains begin. Their weights share it, and say nothing of their own tail.
        """

        def start(num_chains: int) -> tuple[Densities, Point]:
            given = self._globals(num_chains)
            tables = {name: _for_all(values[name], num_chains) for name in self.ends.latents}
            return self._at(self.path.coordinates.position(tables), given)

        weights, acceptance = self._weights(start, _inverse)
        inverse = weights.summary(f"reverse {METHOD}", self.observations, advice=_ADVICE)
        upper = replace(
            inverse,
            log_prob=-inverse.log_prob,
            pareto_k=torch.full_like(inverse.pareto_k, torch.nan),
        )
        return self._record(upper, acceptance)

    def _weights(self, start: _Start, run: _Run) -> tuple[StreamingWeights, Tensor]:
        """Statistics of all chains' weights, and the acceptance of each datum's."""
        size, hmc = self.settings.num_samples, self.settings.hmc
        chunk = self.settings.chunk_size or samples_at_once(*self._size)
        weights, rates = StreamingWeights(size), []
        sizes = [min(chunk, size - first) for first in range(0, size, chunk)]
        with self._bar(self.kernels.num_steps * len(sizes)) as tick, _without_validation():
            for num_chains in sizes:
                chains = run(*start(num_chains), self.kernels, hmc, tick)
                weights.add(chains.log_weight)
                rates.append(chains.acceptance)
        return weights, torch.cat(rates).nanmean(0)

    def _pilot(self) -> Kernels:
        hmc, schedule = self.settings.hmc, self.settings.schedule
        densities, point = self._start(max(hmc.num_pilots, schedule.num_chains))
        with self._bar(None) as tick, _without_validation():
            return pilot_run(densities, point, schedule, hmc, tick)

    def _start(self, num_chains: int) -> tuple[Densities, Point]:
        """Draws from the start, and the densities that go with them."""
        given = self._globals(num_chains)
        terms = self.ends.draw(num_chains, given, self.args, self.kwargs)
        self.observations = Observations.of(terms)
        return self._at(self.path.coordinates.position(terms.samples), given)

    def _at(self, position: Tensor, given: Mapping[str, Tensor]) -> tuple[Densities, Point]:
        settings = self.settings
        num_calls = settings.hmc.num_steps * settings.schedule.num_steps
        with _without_validation():
            densities = self.path.densities(position, given, num_calls)
            return densities, densities(position)

    def _globals(self, num_chains: int) -> dict[str, Tensor]:
        if self.given is None:
            return self.ends.draw_globals(num_chains, self.args, self.kwargs)
        return {name: _for_all(value, num_chains) for name, value in self.given.items()}

    def _record(self, summary: LogMarginal, acceptance: Tensor) -> AnnealedLogMarginal:
        return AnnealedLogMarginal(
            **{**vars(summary), "assumption": self.assumption},
            acceptance=acceptance,
            aim=self.settings.hmc.acceptance,
            num_temperatures=self.kernels.num_steps,
        )

    def _bar(self, total: int | None) -> AbstractContextManager[Callable[..., object]]:
        """What is to be called at every temperature, for a progress bar."""
        name = METHOD if total else f"{METHOD}, pilot run"
        return progress_bar(name, total, self.settings.progress)


@contextmanager
def ready(
    model: Program, guide: Program | None, args: tuple, kwargs: dict, dtype: torch.dtype | None
) -> Iterator[tuple[tuple, dict]]:
    """The arguments of a pair in a precision, while the pair is in it too.

    Afterwards the pair is as it was, and so are buffers that its modules change.

    Raises:
        ValueError: If the pair does not run in that precision.
    """
    check_precision(dtype)
    programs = [model] if guide is None else [model, guide]

    def run(args: tuple, kwargs: dict) -> None:
        for program in programs:
            _run(program, args, kwargs)

    found = footprint(lambda: run(args, kwargs), *programs)
    with in_precision(found.tensors, dtype):
        args, kwargs = with_precision((args, kwargs), dtype)
        try:
            if dtype is not None:
                run(args, kwargs)
        except RuntimeError as error:
            raise ValueError(
                f"Expected a pair that runs in {dtype}; got: {error}. Give it its tensors as "
                f"parameters, buffers or arguments, or in that dtype."
            ) from error
        yield args, kwargs


def _run(program: Program, args: tuple, kwargs: dict) -> None:
    with (
        torch.no_grad(),
        poutine.block(hide_types=["sample"]),
        untouched_random_state(args, kwargs),
        device_of(args, kwargs),
    ):
        program(*args, **kwargs)


def _inverse(*args: Any) -> Annealed:
    chains = anneal_back(*args)
    return chains._replace(log_weight=-chains.log_weight)


def _for_all(value: Tensor, num_chains: int) -> Tensor:
    return value.expand(num_chains, *value.shape)


def _without_validation() -> Any:
    return pyro.validation_enabled(False)
