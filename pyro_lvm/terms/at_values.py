"""The terms of a pair at values of its latents that are given, and not drawn."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lvm.pair import Program
from pyro_lvm.terms.compute import run_once
from pyro_lvm.terms.record import Terms
from pyro_lvm.terms.sites import PARTICLES, site_value

__all__ = ["terms_at"]


def terms_at(
    model: Program,
    guide: Program,
    values: Mapping[str, Tensor],
    *args: Any,
    max_plate_nesting: int,
    plate: str = "data",
    **kwargs: Any,
) -> Terms:
    """The terms of a pair at given values of its latents, differentiable by them.

    The guide runs as well, so that ``log_guide`` is log q(z | x) at these values. Latents that are
    not given are drawn, or enumerated as ever.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise.
        values: Site -> value, with the dimensions that `Terms` has: ``K x N x (nested plates) x
            event`` for local latents, ``K x (plates) x event`` for global ones.
        *args: The pair's arguments.
        max_plate_nesting: Dimensions that the plates of the pair use.
        plate: Name of the data plate.
        **kwargs: The pair's keyword arguments.

    Returns:
        The terms, of ``K`` particles.
    """
    return run_once(
        model,
        guide,
        args,
        kwargs,
        num_particles=len(next(iter(values.values()))),
        plate=plate,
        max_plate_nesting=max_plate_nesting,
        variant=(_at_values, {"given": _GivenTables(values, plate)}),
    )


@cache
def _at_values(base: Any) -> Any:
    return type(f"At{base.__name__}", (_AtValues, base), {})


class _AtValues:
    """Mixin for subclasses of ``pyro.infer.ELBO``."""

    def __init__(self, *, given: "_GivenTables", **settings: Any) -> None:
        super().__init__(**settings)
        self.given = given

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Any:
        # outside of the plate over particles, which has to expand a distribution before it is done
        return super()._get_trace(model, self.given(guide), args, kwargs)  # type: ignore[misc]


class _GivenTables(Messenger):
    """Lets a program have these values at its latents, which come as tables."""

    def __init__(self, values: Mapping[str, Tensor], plate: str) -> None:
        super().__init__()
        self.values, self.plate = values, plate

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.values or msg["is_observed"]:
            return
        table = self.values[msg["name"]]
        frames = {f.name: f.dim for f in msg["cond_indep_stack"] if f.vectorized}
        first = [frames.pop(name) for name in (PARTICLES, self.plate) if name in frames]
        # a single particle has no plate
        table = table if any(f.name == PARTICLES for f in msg["cond_indep_stack"]) else table[0]
        msg["value"] = site_value(table, [*first, *sorted(frames.values())], msg["fn"].event_dim)
        msg["done"] = True
