"""The scale of each term of a pair: read from a minibatch, and measured over a partition.

The latents are drawn once, for all data, and each minibatch sees its slice of them. So the terms of
the minibatches and those of all data are about the same numbers, and their ratio has no noise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lvm.pair import Program, device_of, untouched_random_state

__all__ = ["Call", "Kind", "ProgramName", "ScaledTerm", "alike", "scaled_terms"]

Kind = Literal["observed", "local latent", "global latent", "auxiliary"]
ProgramName = Literal["model", "guide"]
Sites = dict[tuple[ProgramName, str], dict[str, Any]]

# of numbers that are products and quotients of a few scales, in single precision
_ROUNDING = 1e-4
# of a sum of log-probabilities: matrix products of other sizes round otherwise, on GPUs more so
_NOISE = 1e-2
_MOST_MINIBATCHES = 64  # the comparison is exact for each, so that a part of them will do


@dataclass(frozen=True)
class Call:
    """What a pair is called with, and what its data plate sees.

    Attributes:
        args: Positional arguments of both programs.
        kwargs: Keyword arguments of both programs.
        indices: What the data plate draws if it subsamples by itself; None where it does not.
    """

    args: tuple
    kwargs: dict
    indices: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ScaledTerm:
    """One term of the loss, and how it is scaled; ``B`` of ``N`` data are in a minibatch.

    Attributes:
        program: Whose site it is.
        site: Its name.
        kind: What it is to the pair.
        is_local: Whether it is in the data plate.
        scale: All scales around the site in a minibatch, multiplied; their mean if they differ.
        by_hand: What of that is no plate's.
        stated_size: The number of all data that the data plate knows of; None if it knows none.
        weight: How many times a datum counts in expectation over minibatches: ``scale B / N`` for
            a local term, ``scale`` for another.
        own: What of it the program means: the scale beside those of the site's plates when the pair
            sees all data.
        measured: Expectation over minibatches / value on all data, from log-probabilities; None if
            it can't be measured.
        is_as_expected: Whether it agrees with `expected`.
        counts: Scale and mask of each element of the log-probability in a minibatch.
    """

    program: ProgramName
    site: str
    kind: Kind
    is_local: bool
    scale: float
    by_hand: float
    stated_size: int | None
    weight: float
    own: float
    measured: float | None
    is_as_expected: bool
    counts: Tensor

    @property
    def expected(self) -> float:
        """Expectation over minibatches / value on all data, from the scales."""
        return self.weight / self.own if self.own else 1.0

    def with_own(self, own: float) -> "ScaledTerm":
        """The same term of a program that means another scale."""
        measured = None if self.measured is None else self.measured * self.own / own
        return replace(self, own=own, measured=measured)


def alike(a: float, b: float) -> bool:
    """Whether two scales are the same number, but for rounding."""
    return math.isclose(a, b, rel_tol=_ROUNDING)


@torch.no_grad()
def scaled_terms(
    model: Program,
    guide: Program,
    minibatches: Sequence[Call],
    everything: Call | None,
    *,
    plate: str,
    num_data: int,
    batch_size: int,
) -> tuple[list[ScaledTerm], str]:
    """The terms of a pair with their scales, and why they were not measured if they were not.

    Args:
        model: The model.
        guide: The guide.
        minibatches: Calls with the first ``B`` data, the next ``B``, and so on.
        everything: The call with all data; None if there is nothing to compare.
        plate: Name of the data plate.
        num_data: ``N``.
        batch_size: ``B``.

    Raises:
        ValueError: If the plate does not have all data when the pair is called with them.
    """
    args, kwargs = minibatches[0].args, minibatches[0].kwargs
    with (
        poutine.block(),
        untouched_random_state(args, kwargs),
        device_of(args, kwargs),
    ):
        pair = _Pair(model, guide, plate)
        full, reason = _attempt(pair, everything)
        _check_plate(full, plate, num_data)
        minibatches = minibatches[:_MOST_MINIBATCHES] if full else minibatches[:1]
        starts = range(0, num_data, batch_size)
        parts = [
            pair.run(call, pair.latents(full, rows=(start, batch_size)))
            for call, start in zip(minibatches, starts, strict=False)
        ]
        read = _Reading(parts, full, plate, num_data, batch_size)
        terms = [read.term(*key) for key, site in parts[0].items() if _is_term(site)]
        if everything is not None and not all(t.is_as_expected for t in terms):
            again = pair.run(everything, pair.latents(full))
            terms = [_unless_random(t, full, again) for t in terms]
    return terms, reason


def _attempt(pair: "_Pair", everything: Call | None) -> tuple[Sites, str]:
    """All data at once if the pair permits it, or why not."""
    if everything is None:
        return {}, "every step has all data"
    try:
        return pair.run(everything, {}), ""
    except Exception as error:  # whatever a program raises: its scales can be read without
        reason = f"{type(error).__name__}: " + str(error).split("\n")[0].rstrip(".")
        if "subsample_size does not match" in reason:
            reason = f"plate '{pair.plate}' has a fixed subsample_size"
        return {}, f"the pair can't see all data at once ({reason})"


def _check_plate(full: Sites, plate: str, num_data: int) -> None:
    sizes = {int(f.size) for site in full.values() for f in _frames(site) if f.name == plate}
    if sizes - {num_data}:
        raise ValueError(
            f"Expected plate '{plate}' to hold all {num_data} data when the pair is called with "
            f"them; got a plate of {min(sizes)}. Leave batch_size out for a pair that subsamples "
            f"by itself."
        )


def _unless_random(term: ScaledTerm, full: Sites, again: Sites) -> ScaledTerm:
    """A term that is another number in a second run with the same latents can't be measured."""
    first, second = (sites[term.program, term.site]["log_prob"] for sites in (full, again))
    if torch.allclose(first, second, rtol=_ROUNDING, equal_nan=True):
        return term
    return replace(term, measured=None, is_as_expected=True)


class _Pair:
    """Runs a pair without enumeration: each site has one value, those of the model's sums too."""

    def __init__(self, model: Program, guide: Program, plate: str) -> None:
        self.model, self.guide, self.plate = model, guide, plate

    def run(self, call: Call, latents: Mapping[str, Tensor]) -> Sites:
        """The sample sites of a call, with log-probabilities, some latents given."""
        drawn = {} if call.indices is None else {self.plate: call.indices}
        with _Hold({**latents, **drawn}):
            guide = poutine.trace(self.guide).get_trace(*call.args, **call.kwargs)
            replayed = poutine.replay(self.model, trace=guide)
            model = poutine.trace(replayed).get_trace(*call.args, **call.kwargs)
        return {**_sites("model", model), **_sites("guide", guide)}

    def latents(self, full: Sites, rows: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """The latents of a run with all data, or some rows of them.

        Indices that plates inside the data plate draw are among them, those of the data plate not.
        """
        return {
            name: site["value"] if rows is None else _rows_of(site, self.plate, rows)
            for (_, name), site in full.items()
            if not site["is_observed"] and name != self.plate
        }


class _Hold(Messenger):
    """Gives latent sites their values; unlike a replay it leaves what else they hold alone."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class _Reading:
    """Reads terms from the runs with minibatches and, if there is one, the run with all data."""

    def __init__(
        self, parts: Sequence[Sites], full: Sites, plate: str, num_data: int, batch_size: int
    ) -> None:
        self.parts, self.full, self.plate = parts, full, plate
        self.num_data, self.batch_size = num_data, batch_size
        self.modelled = {name for program, name in parts[0] if program == "model"}

    def term(self, program: ProgramName, name: str) -> ScaledTerm:
        """What there is to know of one site."""
        sites = [part[program, name] for part in self.parts]
        whole = self.full.get((program, name))
        frame = _frame(sites[0], self.plate)
        scale = sum(self._scale(s) for s in sites) / len(sites)
        # E over minibatches of sum_{i in batch} scale f_i = scale B / N sum_i f_i
        weight = scale if frame is None else scale * self.batch_size / self.num_data
        term = ScaledTerm(
            program=program,
            site=name,
            kind=self._kind(program, name, sites[0]),
            is_local=frame is not None,
            scale=float(torch.as_tensor(sites[0]["scale"], dtype=torch.double).mean()),
            by_hand=self._own(sites[0]),
            stated_size=_stated_size(frame),
            weight=weight,
            own=self._own(whole or sites[0]),
            measured=None,
            is_as_expected=True,
            counts=_counts(sites[0]),
        )
        return term if whole is None else self._measured(term, sites, whole)

    def _measured(self, term: ScaledTerm, sites: list[dict], whole: dict) -> ScaledTerm:
        kept = len(sites) * self.batch_size if term.is_local else self.num_data
        log_prob = _rows(whole["log_prob"], whole, self.plate, (0, kept)).double()
        # the value on all data, each of them once
        to_all = self.num_data / kept / self._plate_scale(whole)
        value, magnitude = float(log_prob.sum()) * to_all, float(log_prob.abs().sum()) * to_all
        mean = sum(float(s["log_prob"].double().sum()) for s in sites) / len(sites)
        # terms of both signs that cancel leave nothing to compare
        if not abs(value) > 2 * _NOISE * magnitude or not math.isfinite(mean):
            return term
        agrees = abs(mean - term.expected * value) <= _NOISE * term.expected * magnitude
        return replace(term, measured=mean / value, is_as_expected=agrees)

    def _kind(self, program: ProgramName, name: str, site: dict) -> Kind:
        if program == "guide" and name not in self.modelled:
            return "auxiliary"
        if site["is_observed"]:
            return "observed"
        return "global latent" if _frame(site, self.plate) is None else "local latent"

    def _scale(self, site: dict) -> float:
        """The scale of a site, without that of other plates than the data's."""
        others = math.prod(_scale_of(f) for f in _frames(site) if f.name != self.plate)
        return float(torch.as_tensor(site["scale"], dtype=torch.double).mean()) / others

    def _plate_scale(self, site: dict) -> float:
        frame = _frame(site, self.plate)
        return 1.0 if frame is None else _scale_of(frame)

    def _own(self, site: dict) -> float:
        return self._scale(site) / self._plate_scale(site)


def _sites(program: ProgramName, trace: Any) -> Sites:
    trace.compute_log_prob()
    return {(program, n): s for n, s in trace.nodes.items() if s["type"] == "sample"}


def _is_term(site: dict) -> bool:
    return not site_is_subsample(site) and not site["infer"].get("_deterministic")


def _frames(site: dict) -> tuple:
    return site["cond_indep_stack"]


def _frame(site: dict, plate: str) -> Any:
    return next((f for f in _frames(site) if f.name == plate), None)


def _scale_of(frame: Any) -> float:
    return float(frame.full_size or frame.size) / float(frame.size)


def _stated_size(frame: Any) -> int | None:
    if frame is None or frame.full_size in (None, frame.size):
        return None
    return int(frame.full_size)


def _rows_of(site: dict, plate: str, rows: tuple[int, int]) -> Tensor:
    """Some rows of a site's value; all of it where data share it."""
    if site_is_subsample(site):
        return site["value"]
    return _rows(site["value"], site, plate, rows, site["fn"].event_dim)


def _rows(x: Tensor, site: dict, plate: str, rows: tuple[int, int], event_dim: int = 0) -> Tensor:
    """``start, length`` of a tensor along the data plate, if it has that dimension."""
    frame = _frame(site, plate)
    if frame is None:
        return x
    dim = x.dim() - event_dim + frame.dim
    return x if dim < 0 or x.shape[dim] != frame.size else x.narrow(dim, *rows)


def _counts(site: dict) -> Tensor:
    return scale_and_mask(torch.ones_like(site["unscaled_log_prob"]), site["scale"], site["mask"])
