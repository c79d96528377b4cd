"""Run a pair, or take traces that an objective has drawn, and return the terms."""

from collections.abc import Callable
from typing import Any

from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.poutine import unwrap
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import Trace
from torch import Tensor

from pyro_lvm.pair import Program, device_of, inspect_pair, no_guide
from pyro_lvm.terms.particles import sharing_globals
from pyro_lvm.terms.reader import TraceReader
from pyro_lvm.terms.record import Terms

__all__ = ["compute_terms", "log_prior_from_traces", "run_once", "terms_from_traces"]

Variant = tuple[Callable[[Any], Any] | None, dict[str, Any]]


def compute_terms(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_particles: int = 1,
    plate: str = "data",
    max_plate_nesting: int | None = None,
    shared_globals: bool = False,
    **kwargs: Any,
) -> Terms:
    """Run a pair and return its terms.

    With more than one particle the pair runs once, inside an outermost vectorised plate, so that
    its tensors get one more dimension on the left of those of the plates.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise; None for one that samples nothing.
        *args: The pair's arguments.
        num_particles: ``K``.
        plate: Name of the data plate.
        max_plate_nesting: Dimensions that the plates use; found by one more run if None.
        shared_globals: Whether all particles have one draw of the global latents in common, and not
            each its own.
        **kwargs: The pair's keyword arguments.

    Returns:
        The terms.

    Raises:
        ValueError: If the pair is refused by `inspect_pair`, or if an enumerated site has no value
            per datum.
    """
    guide = no_guide if guide is None else guide
    if max_plate_nesting is None:
        max_plate_nesting = inspect_pair(model, guide, args, kwargs, plate=plate).max_plate_nesting
    variant: Variant = (sharing_globals, {"plate": plate}) if shared_globals else (None, {})
    return run_once(
        model,
        guide,
        args,
        kwargs,
        num_particles=num_particles,
        plate=plate,
        max_plate_nesting=max_plate_nesting,
        variant=variant,
    )


def run_once(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    *,
    num_particles: int,
    plate: str,
    max_plate_nesting: int,
    variant: Variant = (None, {}),
) -> Terms:
    """Run a pair by one of Pyro's objectives, or by a variant of it, and return its terms.

    Args:
        model: The model.
        guide: The guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        num_particles: ``K``.
        plate: Name of the data plate.
        max_plate_nesting: Dimensions that the plates use.
        variant: What makes a subclass of the objective, and that subclass's own settings.
    """
    make, settings = variant
    # a guide that is a messenger makes its own traces, which Pyro's enumeration can't wrap
    host_class = Trace_ELBO if isinstance(unwrap(guide), Messenger) else TraceEnum_ELBO
    host = (make(host_class) if make else host_class)(
        num_particles=num_particles,
        max_plate_nesting=max_plate_nesting,
        vectorize_particles=num_particles > 1,
        strict_enumeration_warning=False,
        **settings,
    )
    with device_of(args, kwargs):
        model_trace, guide_trace = next(iter(host._get_traces(model, guide, args, kwargs)))
    return terms_from_traces(model_trace, guide_trace, plate=plate)


def terms_from_traces(
    model_trace: Trace, guide_trace: Trace, *, plate: str = "data", analytic: bool = False
) -> Terms:
    """Read the terms of traces that a Pyro objective has drawn.

    Args:
        model_trace: The trace of the model, replayed on the guide's, with log-probabilities.
        guide_trace: The trace of the guide.
        plate: Name of the data plate, which must be in the traces.
        analytic: Whether ``kl`` has closed forms where Pyro knows them. They are expectations given
            what comes before a site, right under the mean-field condition.

    Returns:
        The terms.

    Raises:
        ValueError: If an enumerated site has no value per datum.
    """
    return TraceReader(model_trace, guide_trace, plate).terms(analytic)


def log_prior_from_traces(
    model_trace: Trace, guide_trace: Trace, *, plate: str = "data"
) -> dict[str, Tensor]:
    """Read the priors of local latents, from a run of the model that may have been left early.

    Args:
        model_trace: The trace of the model so far, with log-probabilities, packed.
        guide_trace: The trace of the guide, packed.
        plate: Name of the data plate.

    Returns:
        Site -> ``K x N``, with what the model enumerates summed out; their sum is the joint prior.
    """
    return TraceReader(model_trace, guide_trace, plate).log_prior()
