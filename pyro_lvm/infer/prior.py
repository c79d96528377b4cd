"""Draws of local latents from a model's prior, and its density, at the cost of the prior alone."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lvm.pair import Given, Program, device_of, untouched_random_state
from pyro_lvm.terms import log_prior_from_traces

__all__ = [
    "choices_of_prior",
    "latent_story",
    "learned_choices",
    "prior_guide",
    "prior_log_prob",
    "sample_prior_sites",
]


def sample_prior_sites(
    model: Program,
    sites: Iterable[str],
    args: tuple,
    kwargs: dict,
    *,
    given: Mapping[str, Any],
) -> dict[str, dict]:
    """Run a model forward as far as the last of some latent sites, and return these sites.

    The run stops right behind the last site, so no decoder is evaluated. What the model conditions
    on stays as it is: its arguments, the observed sites on the way, and the values in ``given``
    (global latents, the indices of subsampled plates). So the draws are from p(z | given), for
    conditional stories and learned priors too, with gradients where the prior is reparameterised.

    Args:
        model: The model.
        sites: Names of the latent sites to draw.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        given: Site -> value for sites that are not to be drawn.

    Returns:
        Site -> the site as Pyro's trace would hold it, with ``value``, ``fn`` and plates.

    Raises:
        ValueError: If the model ends before all sites are drawn.
    """
    draws = _UntilDrawn(frozenset(sites))
    with poutine.block(), Given(given):
        draws.run(model, args, kwargs)
    return draws.sites


def prior_guide(model: Program, sites: Iterable[str]) -> Program:
    """A guide that draws latents as the model does before it sees any data.

        q(z) = p(z),    so that p(x, z) / q(z) = p(x | z)

    It runs the model as far as the last of the sites, and takes the model's arguments. Sites that
    the model would enumerate are drawn; latents that are not among ``sites`` are drawn as well, and
    are no part of the guide.

    Args:
        model: The model.
        sites: Names of latent sites.

    Returns:
        The guide.
    """
    wanted = frozenset(sites)

    def hidden(msg: Any) -> bool:
        return msg["type"] == "sample" and msg["name"] not in wanted and not site_is_subsample(msg)

    def guide(*args: Any, **kwargs: Any) -> None:
        with poutine.block(hide_fn=hidden), poutine.infer_config(config_fn=_drawn):
            _UntilDrawn(wanted).run(model, args, kwargs)

    return guide


def latent_story(model: Program, sites: Iterable[str]) -> Program:
    """A model as far as the last of some latent sites: the prior alone, without a decoder.

    Args:
        model: The model.
        sites: Names of latent sites.

    Returns:
        A program with the model's arguments.
    """
    wanted = frozenset(sites)

    def story(*args: Any, **kwargs: Any) -> None:
        _UntilDrawn(wanted).run(model, args, kwargs)

    return story


def _drawn(site: dict) -> dict:
    return {**site["infer"], "enumerate": None}


def choices_of_prior(model: Program, sites: Iterable[str], args: tuple, kwargs: dict) -> list[str]:
    """The `learned_choices` on a model's way to some latent sites."""
    run = _UntilDrawn(frozenset(sites))
    with (
        torch.enable_grad(),
        untouched_random_state(args, kwargs),
        device_of(args, kwargs),
        poutine.block(),
        poutine.trace() as tracing,
    ):
        run.run(model, args, kwargs)
    return learned_choices(tracing.trace.nodes)


def prior_log_prob(
    model: Program,
    values: Mapping[str, Tensor],
    args: tuple,
    kwargs: dict,
    *,
    given: Mapping[str, Any],
    guide_trace: Trace,
    plate: str,
    max_plate_nesting: int,
) -> Tensor:
    """The log-density of a model's prior at values of some local latents, ``K x N``.

        log p(z_i | given) = log sum_y p(z_i, y | given),    y: what the model enumerates

    The run stops behind the last of the sites, as that of `sample_prior_sites`.

    Args:
        model: The model.
        values: Site -> value, as the guide has it.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        given: Site -> value for other sites that are not to be drawn.
        guide_trace: A trace of the guide, packed, whose plates the result is along.
        plate: Name of the data plate.
        max_plate_nesting: Dimensions that the plates use, particles included.

    Raises:
        ValueError: If the model ends before all sites have come.
    """
    run = _UntilDrawn(frozenset(values))
    enumeration = EnumMessenger(first_available_dim=-1 - max_plate_nesting)
    with poutine.block(), poutine.trace() as tracing, Given({**given, **values}), enumeration:
        run.run(model, args, kwargs)
    trace = tracing.trace
    for name in [n for n, site in trace.nodes.items() if site_is_subsample(site)]:
        trace.remove_node(name)
    trace.compute_log_prob()
    trace.pack_tensors(guide_trace.plate_to_symbol)
    log_prior = log_prior_from_traces(trace, guide_trace, plate=plate)
    first, *others = (log_prior[name] for name in values)
    return sum(others, first)


@torch.enable_grad()
def learned_choices(nodes: Mapping[str, Any]) -> list[str]:
    """Latent sites of a run that learn by what they choose without a pathwise gradient.

    What is drawn behind them has no gradient by the probabilities of the choice. The run must have
    had gradients enabled.
    """
    return [
        name
        for name, site in nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not site_is_subsample(site)
        and not getattr(site["fn"], "has_rsample", False)
        and site["fn"].log_prob(site["value"]).requires_grad
    ]


class _AllDrawn(Exception):  # noqa: N818 - not an error: it leaves the model early
    """Leaves the model behind the last site that is wanted."""


class _UntilDrawn(Messenger):
    """Runs a model until the sites that are wanted have their values."""

    def __init__(self, wanted: frozenset[str]) -> None:
        super().__init__()
        self.wanted = wanted
        self.sites: dict[str, dict] = {}

    def run(self, model: Program, args: tuple, kwargs: dict) -> None:
        """Run the model that far.

        Raises:
            ValueError: If it ends before.
        """
        with contextlib.suppress(_AllDrawn), self:
            model(*args, **kwargs)
        missing = sorted(self.wanted - set(self.sites))
        if missing:
            raise ValueError(f"Expected latent sites {missing} in the model; it has none such.")

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.wanted and not site_is_subsample(msg):
            self.sites[msg["name"]] = msg.copy()
            if len(self.sites) == len(self.wanted):
                raise _AllDrawn
