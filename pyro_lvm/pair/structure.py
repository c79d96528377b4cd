"""The sites of a pair, sorted relative to the data plate."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.infer.enum import get_importance_trace
from pyro.poutine.trace_messenger import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_lvm.pair.plates import data_plate, sample_sites
from pyro_lvm.pair.programs import Program, device_of, no_guide, untouched_random_state

__all__ = ["PairStructure", "inspect_pair"]


@dataclass(frozen=True)
class PairStructure:
    """The sites of a pair, sorted relative to the data plate.

    Attributes:
        plate: Name of the data plate; None if the pair has none.
        num_data: ``N``, the data of one call (the size of the minibatch).
        observed: Observed sites inside the plate, in the model's order.
        values_per_datum: How many numbers they have for each datum.
        local_latents: Latent sites inside the plate that the guide samples.
        global_latents: Latent sites outside the plate that the guide samples.
        auxiliary: Sites of the guide alone, marked ``infer={"is_auxiliary": True}``.
        model_enumerated: Latent sites that the model sums out.
        guide_enumerated: Latent sites of which the guide takes the exact expectation.
        max_plate_nesting: How many tensor dimensions the plates use.
        subsampled: Whether a plate sees only a part of what it stands for.
        not_reparameterised: Sites of the guide whose samples have no pathwise gradient.
        masked: Sites of the guide under a mask.
        point_masses: Sites of the guide whose distribution is a ``Delta``.
        constrained: Latent sites of the model that do not live in all of the reals.
        has_analytic_kl: Whether ``TraceMeanField_ELBO`` is right for this pair.
    """

    plate: str | None
    num_data: int
    observed: tuple[str, ...]
    values_per_datum: int
    local_latents: tuple[str, ...]
    global_latents: tuple[str, ...]
    auxiliary: tuple[str, ...]
    model_enumerated: tuple[str, ...]
    guide_enumerated: tuple[str, ...]
    max_plate_nesting: int
    subsampled: bool
    not_reparameterised: tuple[str, ...]
    masked: tuple[str, ...]
    point_masses: tuple[str, ...]
    constrained: tuple[str, ...]
    has_analytic_kl: bool


def inspect_pair(
    model: Program,
    guide: Program | None,
    args: tuple = (),
    kwargs: dict | None = None,
    *,
    plate: str = "data",
    require_plate: bool = True,
) -> PairStructure:
    """Run the pair once on ``args`` and ``kwargs``, and say what it is made of.

    The run takes no gradients, leaves the random state as it was, and evaluates every
    log-probability, so that data outside a site's support are refused here.

    Args:
        model: The model.
        guide: The guide, or None for one that samples nothing.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        plate: Name of the data plate.
        require_plate: Whether a pair without this plate is refused.

    Returns:
        The structure.

    Raises:
        ValueError: If the plate is missing or sequential, if the guide misses a latent of the
            model or has one that the model lacks, or if an observation is outside its support.
    """
    guide = no_guide if guide is None else guide
    model_trace, guide_trace = _plain_traces(model, guide, args, kwargs or {})
    _check_sites_match(model_trace, guide_trace)
    frame = data_plate((model_trace, guide_trace), plate, required=require_plate)

    def is_local(site: dict) -> bool:
        return any(f.name == plate for f in site["cond_indep_stack"])

    model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
    latents = [n for n, s in model_sites.items() if not s["is_observed"] and n in guide_sites]
    observed = {n: s for n, s in model_sites.items() if s["is_observed"] and is_local(s)}
    num_data = 0 if frame is None else int(frame.size)
    return PairStructure(
        plate=None if frame is None else plate,
        num_data=num_data,
        observed=tuple(observed),
        values_per_datum=sum(s["value"].numel() for s in observed.values()) // max(1, num_data),
        local_latents=tuple(n for n in latents if is_local(model_sites[n])),
        global_latents=tuple(n for n in latents if not is_local(model_sites[n])),
        auxiliary=tuple(n for n in guide_sites if n not in model_sites),
        model_enumerated=tuple(
            n for n, s in model_sites.items() if not s["is_observed"] and n not in guide_sites
        ),
        guide_enumerated=tuple(n for n, s in guide_sites.items() if s["infer"].get("enumerate")),
        max_plate_nesting=_plate_nesting((model_trace, guide_trace)),
        subsampled=any(
            f.full_size not in (None, f.size)
            for s in model_sites.values()
            for f in s["cond_indep_stack"]
        ),
        not_reparameterised=tuple(n for n, s in guide_sites.items() if not _has_rsample(s)),
        masked=tuple(n for n, s in guide_sites.items() if not _is_unmasked(s)),
        point_masses=tuple(n for n, s in guide_sites.items() if _is_point_mass(s)),
        constrained=tuple(n for n in latents if not _is_in_the_reals(model_sites[n])),
        has_analytic_kl=_is_mean_field(model_sites, guide_sites),
    )


def _plain_traces(model: Program, guide: Program, args: tuple, kwargs: dict) -> tuple[Trace, Trace]:
    with (
        torch.no_grad(),
        poutine.block(),
        untouched_random_state(args, kwargs),
        device_of(args, kwargs),
        warnings.catch_warnings(),
    ):
        # Pyro warns where sites do not match; here that is an error, with its remedy
        warnings.simplefilter("ignore")
        return get_importance_trace("flat", float("inf"), model, guide, args, kwargs)


def _check_sites_match(model_trace: Trace, guide_trace: Trace) -> None:
    model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
    for name, site in model_sites.items():
        summed_out = site["infer"].get("enumerate") == "parallel"
        if not site["is_observed"] and name not in guide_sites and not summed_out:
            raise ValueError(
                f"Expected the guide to sample every latent of the model; got none at site "
                f"'{name}'. Add pyro.sample('{name}', ...) to the guide, or, if it is discrete, "
                f"sum it out by infer={{'enumerate': 'parallel'}} in the model."
            )
    for name, site in guide_sites.items():
        known = name in model_sites and not model_sites[name]["is_observed"]
        if not known and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"Expected every site of the guide among the latents of the model; got '{name}'. "
                f"Rename it, or mark it infer={{'is_auxiliary': True}}."
            )


def _plate_nesting(traces: tuple[Trace, ...]) -> int:
    sites = [site for trace in traces for site in sample_sites(trace).values()]
    dims = [f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized]
    return -min(dims, default=0)


def _is_mean_field(model_sites: dict[str, dict], guide_sites: dict[str, dict]) -> bool:
    """A condition that suffices for the analytic KL of ``TraceMeanField_ELBO`` to be right.

    Every latent is reparameterised, model and guide have them in the same order (so that no parent
    of a latent in the model can be its descendant in the guide), and both weigh and mask them
    alike, since that objective reads scale and mask from the guide alone. None is a point mass that
    carries the log-density of what it was computed from, as autoguides have for latents that are
    constrained: Pyro's KL of a ``Delta`` leaves that out.
    """
    shared = [name for name in model_sites if name in guide_sites]
    if shared != [name for name in guide_sites if name in model_sites]:
        return False
    if any(name not in guide_sites for name, s in model_sites.items() if not s["is_observed"]):
        return False
    if not all(_has_rsample(site) for site in guide_sites.values()):
        return False
    if any(_carries_density(guide_sites[name]) for name in shared):
        return False
    return all(
        _same(model_sites[name][key], guide_sites[name][key])
        for name in shared
        for key in ("scale", "mask")
    )


def _has_rsample(site: dict) -> bool:
    return bool(getattr(site["fn"], "has_rsample", False))


def _is_point_mass(site: dict) -> bool:
    return isinstance(_innermost(site), Delta)


def _carries_density(site: dict) -> bool:
    """Whether a site is a point mass with a log-density of its own."""
    fn = _innermost(site)
    return isinstance(fn, Delta) and bool(torch.as_tensor(fn.log_density).any())


def _innermost(site: dict) -> Any:
    """The distribution of a site without what is wrapped around it."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _is_in_the_reals(site: dict) -> bool:
    try:
        support = site["fn"].support
    except NotImplementedError:  # a distribution that does not know
        return True
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support is constraints.real


def _is_unmasked(site: dict) -> bool:
    return site["mask"] is None or site["mask"] is True


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
