"""Why a loss is not finite: the first site of a pair to which that can be traced."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_messenger import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lvm.pair import Program, device_of

__all__ = ["NOTHING_FOUND", "Culprit", "explain", "first_not_finite"]

NOTHING_FOUND = "every site is finite in runs of the pair, but not what is made of them"
_ATTEMPTS = 10  # draws of the latents, where the first ones show nothing


class Culprit(NamedTuple):
    """What is not finite, in words, and the data that it concerns.

    Attributes:
        reason: A site and what it has, or what a program raises.
        rows: Positions in the batch; none if it is not about single data.
    """

    reason: str
    rows: list[int]


def explain(
    model: Program,
    guide: Program,
    batch: tuple[Tensor, ...],
    not_finite: Sequence[str],
    *,
    plate: str = "data",
    rows: Sequence[int] | None = None,
) -> str:
    """Why the loss of a batch is not finite, in words.

    Args:
        model: The model.
        guide: The guide.
        batch: The arguments of both.
        not_finite: Names of parameters that are not finite.
        plate: Name of the data plate.
        rows: The numbers of the data in the batch, where they are known.
    """
    culprit = first_not_finite(model, guide, batch, plate=plate)
    reasons = []
    if not_finite:
        names = ", ".join(f"'{name}'" for name in not_finite[:3])
        more = f" and {len(not_finite) - 3} more" if len(not_finite) > 3 else ""
        reasons.append(f"parameters are not finite since the step before ({names}{more})")
    if culprit is not None:
        reasons.append(f"{culprit.reason}{_at(culprit.rows, rows, len(batch[0]))}")
    if not reasons:
        reasons.append(NOTHING_FOUND)
    return "; ".join(reasons)


def first_not_finite(
    model: Program, guide: Program, batch: tuple[Tensor, ...], *, plate: str = "data"
) -> Culprit | None:
    """The first site that is not finite: the guide's before the model's, in the order of their run.

    Of a site its distribution's parameters are looked at first, then the value, then the
    log-probability. The latents are drawn, so that a loss that is not finite for some draws only
    may leave no trace here.

    Args:
        model: The model.
        guide: The guide.
        batch: The arguments of both.
        plate: Name of the data plate.

    Returns:
        What was found; None if all is finite.
    """
    for _ in range(_ATTEMPTS):
        with torch.no_grad(), poutine.block(), device_of(batch), pyro.validation_enabled(False):
            culprit = _in_one_run(model, guide, batch, plate)
        if culprit is not None:
            return culprit
    return None


def _in_one_run(
    model: Program, guide: Program, batch: tuple[Tensor, ...], plate: str
) -> Culprit | None:
    guide_trace, error = _run(guide, batch)
    culprit = _in_program("guide", guide_trace, error, plate)
    if culprit is None:
        model_trace, error = _run(poutine.replay(model, trace=guide_trace), batch)
        culprit = _in_program("model", model_trace, error, plate)
    return culprit


def _at(positions: Sequence[int], rows: Sequence[int] | None, size: int) -> str:
    """Which data of a batch, by their numbers among all data if those are known."""
    if not positions:
        return ""
    first = f"datum {rows[positions[0]]}" if rows else f"position {positions[0]} of the batch"
    return (
        f" at {first}"
        if len(positions) == 1
        else f" at {len(positions)} of {size} data, {first} the first"
    )


def _run(program: Program, batch: tuple[Tensor, ...]) -> tuple[Trace, Exception | None]:
    """The trace of a run, as far as it came."""
    with poutine.trace() as tracing:
        try:
            program(*batch)
        except (ValueError, RuntimeError) as error:  # no distribution has these parameters
            return tracing.trace, error
    return tracing.trace, None


def _in_program(kind: str, trace: Trace, error: Exception | None, plate: str) -> Culprit | None:
    last = None
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        last = name
        for what, value, event_dim in _quantities(site):
            bad = ~torch.isfinite(value)
            if bad.any():
                reason = f"site '{name}' of the {kind} has {what} {float(value[bad][0])}"
                return Culprit(reason, _rows(bad, site, plate, event_dim))
    if error is None:
        return None
    after = f" after site '{last}'" if last else ""
    first_line = str(error).split("\n")[0].rstrip(".")
    return Culprit(f"the {kind} raises {type(error).__name__}{after}: {first_line}", [])


def _quantities(site: dict[str, Any]) -> Iterator[tuple[str, Tensor, int]]:
    """What a site is made of, in words, as tensors, and how many dimensions are not plates."""
    fn, value = site["fn"], site["value"]
    for name, argument in _arguments(fn):
        yield f"the parameter {name} =", argument, argument.dim() - len(fn.batch_shape)
    if isinstance(value, Tensor) and not site["is_observed"]:
        yield "the value", value, fn.event_dim
    log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
    yield "a log-probability of", scale_and_mask(log_prob, 1.0, site["mask"]), 0


def _arguments(fn: Any) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a distribution, or of the one that it wraps."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    for name in fn.arg_constraints:
        if isinstance(vars(fn).get(name), Tensor):  # others are computed when they are asked for
            yield name, getattr(fn, name)


def _rows(bad: Tensor, site: dict[str, Any], plate: str, event_dim: int) -> list[int]:
    """The data for which something is bad."""
    frame = next((f for f in site["cond_indep_stack"] if f.name == plate), None)
    if frame is None or frame.dim is None:
        return []
    dim = bad.dim() - max(event_dim, 0) + frame.dim
    if dim < 0 or bad.shape[dim] != frame.size:  # the same for all data
        return []
    per_datum = bad.movedim(dim, 0).reshape(frame.size, -1).any(1)
    return per_datum.nonzero().flatten().tolist()
