"""Plates: the data plate of a pair, its size, and the indices that plates draw."""

from collections.abc import Iterable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import Trace
from pyro.poutine.util import site_is_subsample

from pyro_lvm.pair.programs import Program, device_of

__all__ = ["data_plate", "hold_subsamples", "plate_size", "sample_sites"]


def data_plate(traces: Iterable[Trace], plate: str, *, required: bool = True) -> Any:
    """The frame of the data plate in some traces, with ``size``, ``full_size`` and ``dim``.

    Raises:
        ValueError: If there is no such plate and it is required, or if it is sequential.
    """
    sites = [site for trace in traces for site in sample_sites(trace).values()]
    frames = [frame for site in sites for frame in site["cond_indep_stack"]]
    found = next((frame for frame in frames if frame.name == plate), None)
    if found is None and required:
        names = sorted({frame.name for frame in frames})
        has = f"plates named {names}" if names else "no plates at all"
        raise ValueError(
            f"Expected a plate named '{plate}' over the data; got {has}. Wrap the data in "
            f"pyro.plate('{plate}', len(x)), or name the plate that holds them by plate=."
        )
    if found is not None and not found.vectorized:
        raise ValueError(
            f"Expected plate '{plate}' to be vectorised (with pyro.plate(...):); got a sequential "
            f"one (for i in pyro.plate(...))."
        )
    if found is not None and found.size == -1:
        found = _with_size(found, sites)
    return found


def plate_size(program: Program, size: int, *, plate: str = "data") -> Program:
    """Let a program that was written for all data see a minibatch of them.

    Inside the plate every log-probability is multiplied by ``size / B``, where ``B`` is the plate's
    own size, so that its sum over a minibatch estimates the sum over ``size`` data. A plate that
    subsamples by itself, and says so by its size, is left as it is.

    Args:
        program: A model or a guide.
        size: ``N``, the number of all data.
        plate: Name of the data plate.

    Returns:
        A program with the same arguments.
    """
    return _PlateSize(size, plate)(program)


def hold_subsamples(
    model: Program, guide: Program, args: tuple = (), kwargs: dict | None = None
) -> tuple[Program, Program]:
    """Let all runs of a pair see one and the same minibatch, which its plates draw here.

    Values per datum from several runs of a pair that subsamples by itself would otherwise be of
    different data.
    """
    kwargs = kwargs or {}
    with torch.no_grad(), poutine.block(), device_of(args, kwargs):
        indices = poutine.trace(model).get_trace(*args, **kwargs)
    for name in [n for n, s in indices.nodes.items() if not site_is_subsample(s)]:
        indices.remove_node(name)
    return poutine.replay(model, trace=indices), poutine.replay(guide, trace=indices)


def sample_sites(trace: Trace) -> dict[str, dict]:
    """The sites of a trace that are no indices of a plate."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    }


def _with_size(frame: Any, sites: Iterable[dict]) -> Any:
    """The frame of a plate without a size of its own, ``pyro.plate("data")``, with its sites'."""
    inside = [s for s in sites if any(f.name == frame.name for f in s["cond_indep_stack"])]
    shapes = {site["name"]: site["fn"].batch_shape for site in inside}
    sizes = {n: b[frame.dim] if len(b) >= -frame.dim else 1 for n, b in shapes.items()}
    size = max(sizes.values())
    alone = [name for name, own in sizes.items() if own != size]
    if alone:
        raise ValueError(
            f"Expected plate '{frame.name}' to have a size, as sites have to be expanded to it; "
            f"got none, and {alone} have one value for all data. Write "
            f"pyro.plate('{frame.name}', len(x))."
        )
    return frame._replace(size=size, full_size=size)


class _PlateSize(Messenger):
    """Multiplies the scale inside a plate by full size / size, as a subsampled plate does."""

    def __init__(self, size: int, plate: str) -> None:
        super().__init__()
        self.size, self.plate = size, plate

    def _process_message(self, msg: Any) -> None:
        frames = msg["cond_indep_stack"]
        for i, frame in enumerate(frames):
            if frame.name == self.plate and frame.full_size in (None, frame.size):
                if frame.size == -1:
                    if msg["type"] != "sample":
                        continue
                    frame = _with_size(frame, [msg])
                full = frame._replace(full_size=self.size)
                msg["cond_indep_stack"] = (*frames[:i], full, *frames[i + 1 :])
                msg["scale"] = msg["scale"] * (self.size / frame.size)
