"""Which scale the terms of a loss have, and whether it is the right one."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.infer import ELBO

from pyro_lvm.checks import check_count, check_data
from pyro_lvm.diagnostics.scale_findings import Finding, Minibatches, find_defects, resolved
from pyro_lvm.diagnostics.scale_terms import (
    Call,
    Kind,
    ProgramName,
    ScaledTerm,
    alike,
    scaled_terms,
)
from pyro_lvm.pair import (
    Program,
    at_rest,
    data_plate,
    device_of,
    inspect_pair,
    modules_of,
    no_guide,
    plate_size,
    untouched_random_state,
)

__all__ = ["ScaleAudit", "ScaleRow", "audit_scale"]


@dataclass(frozen=True)
class ScaleRow:
    """One term of the loss.

    Attributes:
        program: "model" or "guide".
        site: The site's name.
        kind: "observed", "local latent", "global latent", or "auxiliary" (of the guide alone).
        scale: What the site's log-probability is multiplied by in a minibatch, all scales together.
        expected: Expectation over minibatches / value on all data, from the scales; 1 is right.
        measured: The same from log-probabilities on a partition of the data; None where it can't be
            measured.
        verdict: What that means, in a few words.
    """

    program: ProgramName
    site: str
    kind: Kind
    scale: float
    expected: float
    measured: float | None
    verdict: str

    @property
    def ratio(self) -> float:
        """Expectation over minibatches / value on all data: measured if it could be."""
        return self.expected if self.measured is None else self.measured


@dataclass(frozen=True)
class ScaleAudit:
    """The terms of a loss with their scales, and what is wrong with them.

    Attributes:
        rows: One per sample site of model and guide.
        findings: What is wrong, where, what it does, and the remedy, a paragraph each.
        num_data: ``N``.
        batch_size: ``B``, the data that a step sees.
        plate: Name of the data plate.
        called_by: Whose call was audited, "SVI" or "fit".
        objective: The name of the objective's class.
        unmeasured: Why no term was measured; empty if terms were.
    """

    rows: tuple[ScaleRow, ...]
    findings: tuple[str, ...]
    num_data: int
    batch_size: int
    plate: str
    called_by: Literal["SVI", "fit"]
    objective: str
    unmeasured: str

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        lines = [self._heading(), "", *_aligned(self._table())]
        if self.unmeasured:
            lines += ["", f"Nothing was measured, since {self.unmeasured}: all is by the scales."]
        return "\n".join([*lines, "", *self._conclusion()])

    __repr__ = __str__

    def _heading(self) -> str:
        caller = {"SVI": "pyro.infer.SVI calls it", "fit": "lvm.fit calls it, with its plate_size"}
        return (
            f"Scale of each term of {self.objective}, as {caller[self.called_by]}: "
            f"{self.batch_size} of {self.num_data} data in plate '{self.plate}'"
        )

    def _table(self) -> list[list[str]]:
        head = ["program", "site", "kind", "scale", "expected", "measured", "verdict"]
        return [head, *(_cells(row) for row in self.rows)]

    def _conclusion(self) -> list[str]:
        if self.findings:
            return [f"{i}. {finding}" for i, finding in enumerate(self.findings, 1)]
        return [
            "Nothing found: over minibatches each datum counts once and so does each global "
            "latent, model and guide scale their latents alike, and no KL ends with a weight."
        ]


def audit_scale(
    model: Program,
    guide: Program | None,
    elbo: ELBO | None,
    *data: Any,
    batch_size: int | None = None,
    plate: str | None = None,
    called_by: Literal["SVI", "fit"] = "SVI",
    **kwargs: Any,
) -> ScaleAudit:
    """Compare each term of a loss on minibatches with the same term on all data.

    For each sample site with log-probabilities ``f_i``, the scale ``s`` in a minibatch of ``B`` of
    ``N`` data, and the scale ``s_0`` that it has beside the plate's when all data are there::

        ratio = E[sum_{i in minibatch} s f_i] / sum_{i <= N} s_0 f_i = s B / (N s_0)    local
        ratio = s / s_0                                                                global

    It is 1 where a minibatch stands for all data. It is read from the scales, and measured: latents
    are drawn once for all data, and each minibatch of a partition sees its slice of them, so that
    both sides are sums of the same numbers, in nats. A division by ``len(x)`` inside a site shows
    in the second alone.

    There are two ways to call it. With ``batch_size`` a step sees so many rows of ``data``; without
    it each step is called with ``data`` as they are, and the pair draws a minibatch by itself
    (``pyro.plate("data", N, subsample_size=B)``) or has all of them. A plate with a fixed
    ``subsample_size`` can't be shown all data, so there the scales alone are read.

    `fit` gives a data plate without a size the size that it lacks, and a loop of your own around
    ``pyro.infer.SVI`` does not; ``called_by`` says which of them is meant.

    The pair is run with all data, in evaluation mode and without gradients; the random state stays
    as it was. Enumerated sites are drawn once. Parameters that the pair declares are initialised.

    Args:
        model: The model.
        guide: The guide; None if it samples nothing.
        elbo: The objective, for the weight that it leaves on the KL; None for the plain ELBO.
        *data: The pair's arguments; with ``batch_size`` tensors whose first dimension is the data.
        batch_size: ``B``, rows of ``data`` in a minibatch; None if steps see ``data`` as they are.
        plate: Name of the data plate; the objective's own, or "data", if None.
        called_by: "SVI" for a pair that is called as it is, "fit" for one that `fit` calls.
        **kwargs: The pair's keyword arguments, the same in all calls.

    Returns:
        A row for each term, and the findings; it prints as a table.

    Raises:
        TypeError: If data that are to be sliced are no tensors.
        ValueError: If there are none, ``batch_size`` is not below their number, the pair has no
            plate of that name or the plate does not hold the rows of a minibatch.
    """
    guide = no_guide if guide is None else guide
    plate = plate or str(getattr(elbo, "plate", "data"))
    if called_by not in ("SVI", "fit"):
        raise ValueError(f"Expected called_by to be 'SVI' or 'fit'; got {called_by!r}.")
    if batch_size is not None:
        _check_sliced(data, batch_size)
    with at_rest(modules_of(model, guide)):
        if batch_size is not None and called_by == "fit":
            model, guide = (plate_size(p, len(data[0]), plate=plate) for p in (model, guide))
        calls = _calls(model, guide, data, kwargs, batch_size, plate)
        terms, unmeasured = scaled_terms(
            model,
            guide,
            calls.minibatches,
            calls.everything,
            plate=plate,
            num_data=calls.num_data,
            batch_size=calls.batch_size,
        )
    setting = Minibatches(calls.num_data, calls.batch_size, plate)
    terms = resolved(terms, setting)
    findings = list(find_defects(terms, setting, elbo))
    return ScaleAudit(
        rows=tuple(_row(term, findings) for term in terms),
        findings=tuple(finding.sentence for finding in findings),
        num_data=calls.num_data,
        batch_size=calls.batch_size,
        plate=plate,
        called_by=called_by,
        objective="the ELBO" if elbo is None else type(elbo).__name__,
        unmeasured=unmeasured,
    )


class _Calls(NamedTuple):
    """How a pair is called: with parts of the data, and with all of them if that can be told."""

    minibatches: list[Call]
    everything: Call | None
    num_data: int
    batch_size: int


def _calls(
    model: Program, guide: Program, data: tuple, kwargs: dict, batch_size: int | None, plate: str
) -> _Calls:
    if batch_size is None:
        return _calls_as_they_are(model, guide, data, kwargs, plate)
    size = len(data[0])
    parts = [
        tuple(t[start : start + batch_size] for t in data)
        for start in range(0, size - batch_size + 1, batch_size)
    ]
    held = inspect_pair(model, guide, parts[0], kwargs, plate=plate).num_data
    if held != batch_size:
        raise ValueError(
            f"Expected plate '{plate}' to hold the {batch_size} rows of a minibatch; got a plate "
            f"of {held}. Put the data along the first dimension of each tensor, or leave "
            f"batch_size out if each step is called with all of them."
        )
    calls = [Call(part, kwargs) for part in parts]
    return _Calls(calls, Call(data, kwargs), size, batch_size)


def _calls_as_they_are(
    model: Program, guide: Program, args: tuple, kwargs: dict, plate: str
) -> _Calls:
    """The minibatches that a pair draws by itself, if it does."""
    inspect_pair(model, guide, args, kwargs, plate=plate)
    frame = _data_plate(model, args, kwargs, plate)
    size, batch_size = int(frame.full_size or frame.size), int(frame.size)
    if size == batch_size:
        return _Calls([Call(args, kwargs)], None, size, size)
    with device_of(args, kwargs):
        indices = torch.arange(size)
    starts = range(0, size - batch_size + 1, batch_size)
    calls = [Call(args, kwargs, indices[start : start + batch_size]) for start in starts]
    return _Calls(calls, Call(args, kwargs, indices), size, batch_size)


def _data_plate(model: Program, args: tuple, kwargs: dict, plate: str) -> Any:
    with (
        torch.no_grad(),
        poutine.block(),
        untouched_random_state(args, kwargs),
        device_of(args, kwargs),
    ):
        return data_plate([poutine.trace(model).get_trace(*args, **kwargs)], plate)


def _check_sliced(data: tuple, batch_size: int) -> None:
    if not data:
        raise ValueError(
            f"Expected data to slice minibatches of {batch_size} from; got none. Pass the tensors "
            f"that the pair is called with, or leave batch_size out if it subsamples by itself."
        )
    for i, tensor in enumerate(data):
        check_data(f"data[{i}]", tensor)
    sizes = {len(tensor) for tensor in data}
    if len(sizes) > 1:
        raise ValueError(
            f"Expected tensors with one number of rows, the data; got {sorted(sizes)}. Pass "
            f"what all data share by keyword."
        )
    check_count("batch_size", batch_size)
    if batch_size >= min(sizes):
        raise ValueError(
            f"Expected batch_size below the number of data, {min(sizes)}; got {batch_size}. Leave "
            f"it out if each step is called with all of them."
        )


def _row(term: ScaledTerm, findings: list[Finding]) -> ScaleRow:
    accused = (finding.verdict for finding in findings if term in finding.terms)
    return ScaleRow(
        program=term.program,
        site=term.site,
        kind=term.kind,
        scale=term.scale,
        expected=term.expected,
        measured=term.measured,
        verdict=", ".join(dict.fromkeys(accused)) or _innocent(term),
    )


def _innocent(term: ScaledTerm) -> str:
    own = "" if alike(term.own, 1.0) else f", with a scale of {term.own:.4g} that it always has"
    return f"right{own}"


def _cells(row: ScaleRow) -> list[str]:
    measured = "-" if row.measured is None else f"{row.measured:.4g}"
    numbers = [f"{row.scale:.4g}", f"{row.expected:.4g}", measured]
    return [row.program, row.site, row.kind, *numbers, row.verdict]


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
