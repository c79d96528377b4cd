"""One progress bar, in a terminal, for runs longer than two seconds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm.auto import tqdm

__all__ = ["progress_bar", "progress_over"]

T = TypeVar("T")


@contextmanager
def progress_bar(name: str, total: int | None, shown: bool) -> Iterator[Callable[..., object]]:
    """What is to be called with how much has been done, 1 if nothing is said.

    Args:
        name: What is going on.
        total: How much there is to do; None if nobody knows.
        shown: Whether there is a bar.
    """
    with _bar(name, shown, total=total) as bar:
        yield bar.update


def progress_over(steps: Sequence[T], name: str, shown: bool) -> Iterable[T]:
    """The steps one after the other, with a bar over them.

    Args:
        steps: What there is to do.
        name: What is going on.
        shown: Whether there is a bar.
    """
    return _bar(name, shown, iterable=steps)


def _bar(name: str, shown: bool, **settings: Any) -> Any:
    disable = None if shown else True  # None: where there is no terminal
    return tqdm(desc=name, delay=2.0, disable=disable, leave=False, **settings)
