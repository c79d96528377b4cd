"""Data that a story makes up by itself, with the latents behind them."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lvm.pair import Program, device_of
from pyro_lvm.terms.sites import sample_table

__all__ = ["Simulation", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """One draw of a story for each datum, from the joint distribution p(x, z | g).

    Attributes:
        latents: Site -> ``N x (nested plates) x event``, latents in the data plate.
        drawn: Site -> likewise, what has been drawn in place of the observations.
        observed: Site -> likewise, these observations.
        global_latents: Site -> ``(plates) x event``, latents outside of it.
    """

    latents: dict[str, Tensor]
    drawn: dict[str, Tensor]
    observed: dict[str, Tensor]
    global_latents: dict[str, Tensor]


@torch.no_grad()
def simulate(
    model: Program,
    args: tuple = (),
    kwargs: dict | None = None,
    *,
    plate: str = "data",
    sites: Collection[str] | None = None,
) -> Simulation:
    """Run a story forward, its observations drawn and not observed.

    Args:
        model: The model.
        args: Its positional arguments, which say how many data to draw and given what.
        kwargs: Its keyword arguments.
        plate: Name of the data plate.
        sites: Observed sites to draw, all in the data plate if None. Others stay as observed, so
            that x can be drawn given y.

    Returns:
        The draw.

    Raises:
        ValueError: If no observed site in the plate is drawn.
    """
    kwargs = kwargs or {}
    simulated = _Simulated(plate, sites)
    with poutine.block(), device_of(args, kwargs):
        nodes = poutine.trace(simulated(model)).get_trace(*args, **kwargs).nodes
    replaced = simulated.observed
    if not replaced or not replaced.keys() >= set(sites or ()):
        raise ValueError(
            f"Expected observed sites in plate '{plate}' to draw; got {sorted(sites or ())}, and "
            f"of these the story has {sorted(replaced)}."
        )
    drawn = {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    }
    tables = {name: sample_table(site, plate)[0] for name, site in drawn.items()}
    local = [n for n, s in drawn.items() if any(f.name == plate for f in s["cond_indep_stack"])]
    return Simulation(
        latents={n: tables[n] for n in local if n not in replaced},
        drawn={n: tables[n] for n in replaced},
        observed={
            n: sample_table({**drawn[n], "value": value}, plate)[0] for n, value in replaced.items()
        },
        global_latents={n: table for n, table in tables.items() if n not in local},
    )


class _Simulated(Messenger):
    """Draws what a story observes in the data plate."""

    def __init__(self, plate: str, sites: Collection[str] | None) -> None:
        super().__init__()
        self.plate, self.sites = plate, sites
        self.observed: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        wanted = self.sites is None or msg["name"] in self.sites
        is_local = any(f.name == self.plate for f in msg["cond_indep_stack"])
        is_deterministic = msg["infer"].get("_deterministic")
        if msg["is_observed"] and wanted and is_local and not is_deterministic:
            self.observed[msg["name"]] = msg["value"]
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
