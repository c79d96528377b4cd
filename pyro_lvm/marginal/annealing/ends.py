"""Both ends of an annealed path: what a pair is made into, so that latents of the reals are left.

The end is the model with its discrete latents summed out; the start is the prior or the guide.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from pyro import poutine
from torch import Tensor

from pyro_lvm.infer.prior import prior_guide, sample_prior_sites
from pyro_lvm.marginal.annealing.coordinates import support_of
from pyro_lvm.pair import (
    PairStructure,
    Program,
    device_of,
    hold_subsamples,
    inspect_pair,
    no_guide,
    untouched_random_state,
)
from pyro_lvm.terms import Terms, compute_terms, terms_at

__all__ = ["Ends", "Start", "ends_of", "sites_of"]

Start = Literal["prior", "guide"]


@dataclass(frozen=True)
class Ends:
    """What chains go between, for a pair.

    Attributes:
        model: The model, its discrete latents summed out.
        guide: A guide over ``latents`` and ``global_latents`` that draws the start.
        original: The pair, its minibatch held if it draws one. Global latents are from its guide.
        latents: Local latents in some real space, which the chains move.
        global_latents: Latents outside of the plate, one draw of them for each chain.
        start: Which of the two the start is.
        structure: What the pair is made of.
    """

    model: Program
    guide: Program
    original: tuple[Program, Program | None]
    latents: tuple[str, ...]
    global_latents: tuple[str, ...]
    start: Start
    structure: PairStructure

    def draw_globals(self, num_chains: int, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        """Draws of the global latents for each chain, site -> ``K x (plates) x event``."""
        if not self.global_latents:
            return {}
        terms = self._terms(*self.original, num_chains, args, kwargs)
        return {name: terms.global_samples[name].detach() for name in self.global_latents}

    def draw(
        self, num_chains: int, given: Mapping[str, Tensor], args: tuple, kwargs: dict
    ) -> Terms:
        """The terms at latents drawn from the start, given the global ones."""
        if given:
            return self.at(given, args, kwargs)
        return self._terms(self.model, self.guide, num_chains, args, kwargs)

    def at(self, values: Mapping[str, Tensor], args: tuple, kwargs: dict) -> Terms:
        """The terms at these values of the latents."""
        return terms_at(self.model, self.guide, values, *args, **self._settings, **kwargs)

    def log_densities(self, terms: Terms) -> tuple[Tensor, Tensor]:
        """The start's log f_0(z), and log f_1(z) / f_0(z), both ``K x N``."""
        prior = sum(terms.log_prior.values(), torch.zeros_like(terms.log_likelihood))
        if self.start == "prior":
            return prior, terms.log_likelihood
        drawn = (terms.log_guide[name] for name in self.latents)
        log_guide = sum(drawn, torch.zeros_like(prior))
        return log_guide, terms.log_likelihood + prior - log_guide

    def _terms(
        self, model: Program, guide: Program | None, num_chains: int, args: tuple, kwargs: dict
    ) -> Terms:
        settings = self._settings
        return compute_terms(model, guide, *args, num_particles=num_chains, **settings, **kwargs)

    @property
    def _settings(self) -> dict[str, Any]:
        structure = self.structure
        return {"plate": structure.plate, "max_plate_nesting": structure.max_plate_nesting}


def ends_of(
    model: Program,
    guide: Program | None,
    args: tuple,
    kwargs: dict,
    *,
    plate: str,
    start: Start,
) -> Ends:
    """Sort the latents of a pair, and refuse one that has no path.

    Args:
        model: The model.
        guide: The guide; None if the start is the prior and there are no global latents.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        plate: Name of the data plate.
        start: Where chains start.

    Raises:
        ValueError: If it is refused, with the site and the remedy.
    """
    if start not in get_args(Start):
        raise ValueError(f"Expected start in {get_args(Start)}; got {start!r}.")
    itself = poutine.block(model, hide_fn=_is_observed)
    alone = inspect_pair(model, itself, args, kwargs, plate=plate)
    structure = alone if guide is None else inspect_pair(model, guide, args, kwargs, plate=plate)
    if guide is None:
        _check_no_guide(start, alone)
    if structure.subsampled:
        model, held = hold_subsamples(model, guide or no_guide, args, kwargs)
        guide = None if guide is None else held
    (sites,) = sites_of(model, alone.local_latents, args, kwargs)
    marked = alone.guide_enumerated
    summed = frozenset(n for n, s in sites.items() if n in marked or _is_discrete(s))
    latents = tuple(name for name in sites if name not in summed)
    _check_sums({name: sites[name] for name in summed})
    if start == "guide":
        _check_guide(structure, summed)
    _check_latents(latents, summed)
    _check_scales({name: sites[name] for name in latents}, plate)
    moved = (*latents, *structure.global_latents)
    return Ends(
        model=_summing(model, summed) if summed else model,
        guide=prior_guide(model, moved) if start == "prior" else guide or no_guide,
        original=(model, guide),
        latents=latents,
        global_latents=structure.global_latents,
        start=start,
        structure=structure,
    )


def sites_of(
    model: Program, names: Iterable[str], args: tuple, kwargs: dict, *, num_runs: int = 1
) -> list[dict[str, dict]]:
    """Latent sites of a model in some runs of it; random numbers are as they were afterwards."""
    names = tuple(names)
    with torch.no_grad(), untouched_random_state(args, kwargs), device_of(args, kwargs):
        return [
            sample_prior_sites(model, names, args, kwargs, given={}) if names else {}
            for _ in range(num_runs)
        ]


def _is_observed(msg: Any) -> bool:
    return msg["type"] == "sample" and msg["is_observed"]


def _is_discrete(site: dict) -> bool:
    return bool(support_of(site).is_discrete)


def _summing(model: Program, names: frozenset[str]) -> Program:
    """A model that sums out these sites."""

    def config(site: dict) -> dict:
        return {"enumerate": "parallel"} if site["name"] in names else {}

    return poutine.infer_config(model, config_fn=config)


def _check_no_guide(start: Start, alone: PairStructure) -> None:
    if start == "guide":
        raise ValueError("Expected a guide to start from; got None. Use start='prior'.")
    if alone.global_latents:
        raise ValueError(
            f"Expected a guide that draws the latents outside of plate '{alone.plate}'; got None "
            f"with {list(alone.global_latents)} in the model. Pass the guide that was fitted."
        )


def _check_guide(structure: PairStructure, summed: frozenset[str]) -> None:
    """Refuse a guide that has no density over the latents that move."""
    masses = [n for n in structure.local_latents if n in structure.point_masses]
    reasons = {
        "auxiliary sites": structure.auxiliary,
        "point masses": masses,
        "discrete sites": [n for n in structure.local_latents if n in summed],
    }
    for reason, names in reasons.items():
        if names:
            raise ValueError(
                f"Expected a guide with a density over the continuous local latents alone to start "
                f"from; got {reason}, {list(names)}. Use start='prior', which needs no guide for "
                f"the latents in the plate."
            )


def _check_sums(sites: dict[str, dict]) -> None:
    for name, site in sites.items():
        if not getattr(site["fn"], "has_enumerate_support", False):
            raise ValueError(
                f"Expected discrete latents with finitely many values, which can be summed out; "
                f"got {type(site['fn']).__name__} at site '{name}'. Use importance_sampling."
            )


def _check_latents(latents: tuple[str, ...], summed: frozenset[str]) -> None:
    if not latents:
        others = f"discrete ones alone, {sorted(summed)}" if summed else "none"
        raise ValueError(
            f"Expected a continuous latent in the data plate, to be annealed; got {others}. Use "
            f"marginal.exact with the discrete ones enumerated, or importance_sampling."
        )


def _check_scales(sites: dict[str, dict], plate: str) -> None:
    for name, site in sites.items():
        frames = [f for f in site["cond_indep_stack"] if f.name == plate]
        plate_scale = (frames[0].full_size or frames[0].size) / frames[0].size
        scale = torch.as_tensor(site["scale"]) / plate_scale
        if not torch.allclose(scale, torch.ones_like(scale)):
            raise ValueError(
                f"Expected latents whose log-probability is not scaled, since chains start at "
                f"draws from it; got poutine.scale, or a subsampled plate, at site '{name}'. "
                f"Remove it for this estimate."
            )
