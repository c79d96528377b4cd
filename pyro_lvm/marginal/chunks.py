"""Samples in chunks: by Python, and in long runs by a recording, or a compiled one."""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from torch import Tensor

from pyro_lvm.compiled.recording import NotRecordable
from pyro_lvm.compiled.repeated import Repeated, repeated

__all__ = ["in_chunks"]

_LEAST_CHUNKS = 12  # to record takes the time of some runs
_SECONDS = 20.0  # that a run has to last for a compiler, which takes up to ten, to pay


def in_chunks(
    draw: Callable[[int], Tensor], num_samples: int, size: int, tensors: tuple[Tensor, ...] = ()
) -> Iterator[Tensor]:
    """Draw samples, so many at a time, as fast as it goes.

    Many chunks are drawn by a recording of the first one, and if there are seconds to go that is
    compiled. The random numbers are those of Python; compiled ones are where the compiler leaves
    them to torch.

    Args:
        draw: From a number of samples to their values, ``size x ...``.
        num_samples: How many in all.
        size: How many at a time.
        tensors: Some that ``draw`` sees, on the devices whose generators it draws from.

    Yields:
        The values of a chunk.
    """
    full, rest = divmod(num_samples, size)
    fast = _recorded(lambda: [draw(size)], tensors) if full >= _LEAST_CHUNKS else None
    if rest:
        yield draw(rest)
    start = time.perf_counter()
    for done in range(full):
        if fast is None:
            yield draw(size)
            continue
        if done == _LEAST_CHUNKS // 2:
            _compile_if_it_pays(fast, (time.perf_counter() - start) / done, full - done)
        yield fast()[0]


def _recorded(function: Callable[[], list[Tensor]], tensors: tuple[Tensor, ...]) -> Repeated | None:
    try:
        return repeated(function, tensors)
    except NotRecordable:
        return None  # Python gives the same numbers


def _compile_if_it_pays(fast: Repeated, seconds: float, runs: int) -> None:
    if seconds * runs > _SECONDS:
        with suppress(NotRecordable):  # the recording gives the same numbers
            fast.compile()
