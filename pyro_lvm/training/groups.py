"""Minibatches by the numbers of their data, many at a time."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from pyro_lvm.training.batches import Batches
from pyro_lvm.training.sources import Tensors

__all__ = ["Group", "Groups"]


class Group(NamedTuple):
    """Minibatches that follow each other in an epoch.

    Attributes:
        first: The number of the first one.
        rows: The numbers of their data, ``num_batches x B``.
    """

    first: int
    rows: Tensor


class Groups:
    """The shuffled minibatches of tensors in memory, as `Group` s for compiled steps.

    A step picks its data by itself, and what Lightning does around a batch is done once for a
    group.

    Args:
        batches: The minibatches, shuffled.
        length: The most in a group.
    """

    def __init__(self, batches: Batches, length: int) -> None:
        self.batches, self.length = batches, length

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All data."""
        assert isinstance(self.batches.source, Tensors)
        return self.batches.source.tensors

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.length)

    def __iter__(self) -> Iterator[Group]:
        for numbers in self.batches.runs_of(self.length):
            yield Group(numbers.start, self.batches.rows_of(numbers))

    def rows(self, index: int) -> Tensor:
        """The numbers of the data in a batch of the present epoch."""
        return self.batches.rows(index)

    def batch(self, index: int) -> tuple[Tensor, ...]:
        """A batch of the present epoch."""
        return self.batches.batch(index)

    def state_dict(self) -> dict[str, Any]:
        """Where the present epoch is."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from there."""
        self.batches.load_state_dict(state)
