"""A pair that sees data which its own story has made up, of which the posterior has a draw."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_lvm.pair import Given, Program, device_of, untouched_random_state
from pyro_lvm.terms import simulate
from pyro_lvm.terms.sites import site_value

__all__ = ["SimulatedPair", "simulated_pair"]


@dataclass(frozen=True)
class SimulatedPair:
    """A pair, its observations replaced by draws of them.

    Attributes:
        model: The model, which has these observations. Its arguments are those that the draws were
            made with, so that it is the story that they come from.
        guide: The guide, which sees them in its arguments.
        latents: Site -> ``N x (nested plates) x event``, drawn together with the observations: a
            draw from their posterior.
        observed: Site -> likewise, the observations.
    """

    model: Program
    guide: Program | None
    latents: dict[str, Tensor]
    observed: dict[str, Tensor]


def simulated_pair(
    model: Program,
    guide: Program | None,
    args: tuple,
    kwargs: dict,
    *,
    plate: str,
    sites: Collection[str] | None,
    given: Mapping[str, Tensor],
    guide_sees_them: bool,
) -> SimulatedPair:
    """Draw data and latents from a model.

    Args:
        model: The model.
        guide: The guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        plate: Name of the data plate.
        sites: Observed sites to draw; all in the plate if None.
        given: Site -> value of latents outside of the plate.
        guide_sees_them: Whether the guide's arguments are to hold the draws.

    Raises:
        ValueError: If there is no such site, if one is no draw from a density, or if the guide's
            arguments do not hold its observations.
    """
    known = _observed_sites(model, args, kwargs, plate)
    names = list(known) if sites is None else list(sites)
    _check_sites(names, known, plate)
    draw = simulate(Given(given)(model), args, kwargs, plate=plate, sites=names)
    values = {
        name: site_value(draw.drawn[name], _dims(known[name], plate), known[name]["fn"].event_dim)
        for name in names
    }
    if guide is not None and guide_sees_them:
        guide = _with_arguments(guide, args, kwargs, known, values)
    return SimulatedPair(_Observing(values)(model), guide, draw.latents, draw.drawn)


class _Observing(Messenger):
    """Lets a program have observed these values."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]


class _Watch(Messenger):
    """Keeps the observed sites of a plate."""

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate
        self.sites: dict[str, dict] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        is_local = any(frame.name == self.plate for frame in msg["cond_indep_stack"])
        if msg["is_observed"] and is_local and not msg["infer"].get("_deterministic"):
            self.sites[msg["name"]] = msg.copy()


def _observed_sites(model: Program, args: tuple, kwargs: dict, plate: str) -> dict[str, dict]:
    watch = _Watch(plate)
    with (
        torch.no_grad(),
        poutine.block(),
        untouched_random_state(args, kwargs),
        device_of(args, kwargs),
        watch,
    ):
        model(*args, **kwargs)
    return watch.sites


def _check_sites(names: list[str], known: dict[str, dict], plate: str) -> None:
    if not names or not known.keys() >= set(names):
        raise ValueError(
            f"Expected observed sites in plate '{plate}' to simulate; got {names}, where the model "
            f"has {list(known)}."
        )
    for name in names:
        fn, frames = known[name]["fn"], known[name]["cond_indep_stack"]
        frame = next(f for f in frames if f.name == plate)
        scale = torch.as_tensor(known[name]["scale"]) * frame.size / (frame.full_size or frame.size)
        if isinstance(fn, Unit) or not torch.allclose(scale, torch.ones_like(scale)):
            what = "a pyro.factor" if isinstance(fn, Unit) else "a log-probability that is scaled"
            raise ValueError(
                f"Expected observations that can be drawn from their density, so that the latents "
                f"behind them are from the posterior; got {what} at site '{name}'. Remove it for "
                f"this estimate."
            )


def _dims(site: dict, plate: str) -> list[int]:
    """The dimensions of a site's table, as `sample_table` has them."""
    frames = {f.name: f.dim for f in site["cond_indep_stack"] if f.vectorized}
    return [frames.pop(plate), *sorted(frames.values())]


def _with_arguments(
    guide: Program,
    args: tuple,
    kwargs: dict,
    known: dict[str, dict],
    values: dict[str, Tensor],
) -> Program:
    """A guide whose arguments hold these values where they held the observations."""
    found: set[str] = set()

    def replaced(leaf: Any) -> Any:
        for name, value in values.items():
            if _is_same(leaf, known[name]["value"]):
                found.add(name)
                return value.expand(known[name]["value"].shape).reshape(leaf.shape).to(leaf.dtype)
        return leaf

    new_args, new_kwargs = tree_map(replaced, (args, kwargs))
    if missing := [name for name in values if name not in found]:
        raise ValueError(
            f"Expected the observations among the arguments of the guide, to be replaced by "
            f"simulated ones; found none that equals what is observed at {missing}. Hand them to "
            f"model and guide as they are observed, or use start='prior'."
        )
    return lambda *_, **__: guide(*new_args, **new_kwargs)


def _is_same(leaf: Any, value: Tensor) -> bool:
    if not isinstance(leaf, Tensor) or leaf.numel() != value.numel():
        return False
    return leaf is value or torch.equal(leaf.flatten().to(value), value.flatten())
