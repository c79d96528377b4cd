"""Stories whose observations have no density, or none to be compared, under a stated noise."""

import functools
from collections.abc import Collection
from typing import Any

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lvm.checks import check_positive
from pyro_lvm.pair import Program

__all__ = ["assumption_of", "with_gaussian_noise"]


def with_gaussian_noise(
    model: Program, scale: float, *, sites: Collection[str] | None = None, plate: str = "data"
) -> Program:
    """A story whose observations are normal around what it computes.

        x ~ N(m(z), scale^2),    m(z) = E[x | z] in the story as it was

    A generator x = G(z), written as ``pyro.sample("x", dist.Delta(G(z), event_dim=1), obs=x)``, has
    no density; with an observation noise it has one, which `annealed_importance_sampling`
    estimates (Wu et al. 2017). The value is that of the story with the noise, and depends on it:
    estimates print the assumption that they rest on.

    Args:
        model: The story.
        scale: The standard deviation of the noise, in the units of the data.
        sites: Observed sites that get it; all in the data plate if None.
        plate: Name of the data plate.

    Returns:
        A program with the model's arguments.

    Raises:
        ValueError: If the scale is not positive.
    """
    check_positive("scale", scale)
    noisy: Any = _Noisy(scale, sites, plate)(model)
    noisy.assumption = f"Gaussian observation noise of {scale:g}"
    return noisy


def assumption_of(model: Program) -> str | None:
    """What the density of a story rests on beside the story, in words."""
    program: Any = model
    while isinstance(program, functools.partial) and not hasattr(program, "assumption"):
        program = program.args[-1] if program.args else program.func
    return getattr(program, "assumption", None)


class _Noisy(Messenger):
    def __init__(self, scale: float, sites: Collection[str] | None, plate: str) -> None:
        super().__init__()
        self.scale, self.sites, self.plate = scale, sites, plate

    def _pyro_sample(self, msg: Any) -> None:
        is_local = any(frame.name == self.plate for frame in msg["cond_indep_stack"])
        wanted = self.sites is None or msg["name"] in self.sites
        if msg["is_observed"] and is_local and wanted and not msg["infer"].get("_deterministic"):
            mean = _mean(msg["fn"])
            msg["fn"] = dist.Normal(mean, self.scale).to_event(msg["fn"].event_dim)


def _mean(fn: Any) -> Tensor:
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return fn.v if isinstance(fn, dist.Delta) else fn.mean
