"""Minibatches of tensors, or of a dataset, in an order of our own."""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.checks import check_count, check_data
from pyro_lvm.training.processes import Processes
from pyro_lvm.training.sources import Data, Items, source_of

__all__ = ["Batches"]

_IN_DIGEST = 256  # data whose values tell one set of data from another


class Batches:
    """Tensors with a common first dimension ``N``, or a dataset of ``N`` items, in minibatches.

    In their own order all data are there, in batches that differ by one datum at most, so that none
    is so small that a statistic over it fails. The batches of a shuffled epoch are all of one size,
    so that a compiled step has one graph; what does not fill them, fewer data than there are
    batches, is drawn anew in every epoch and left out of it.

    Args:
        data: A tensor, or several, whose first dimension is the data; or a dataset whose items are
            tensors or tuples of tensors.
        batch_size: The most data in a batch, of all processes together if several share it.
        shuffle: Whether each epoch has an order of its own, from torch's global generator.
        name: What the data are called in errors.

    Raises:
        TypeError: If something other than tensors or a dataset is given.
        ValueError: If there are no data, if their numbers differ, or if values are not finite (in a
            dataset: when they are first met).
    """

    def __init__(
        self, data: Data, batch_size: int, *, shuffle: bool = False, name: str = "data"
    ) -> None:
        check_count("batch_size", batch_size)
        self.source = source_of(data, name)
        self.name, self.batch_size = name, batch_size
        self.num_data = self.source.num_data
        self.shuffle = shuffle
        self.num_batches = math.ceil(self.num_data / batch_size)
        self._order: Tensor | None = None
        self._next, self._goes_on = 0, False
        self._drawn_from: Tensor | None = None
        self.processes = Processes()

    def to(self, device: torch.device) -> "Batches":
        """Let the batches be made on a device; tensors are moved there."""
        self.source.to(device)
        return self

    def share(self, processes: Processes) -> None:
        """Yield one process's part of each batch; the order is that of the first process."""
        processes.share_of(self._part_in_order(self.num_batches - 1))  # the smallest one
        self.processes = processes

    @property
    def device(self) -> torch.device:
        """Where the batches are made."""
        return self.source.device

    @property
    def smallest(self) -> tuple[Tensor, ...]:
        """A batch of the least size, the first data in order."""
        return self.source.fetch(slice(0, self.num_data // self.num_batches))

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for numbers in self.runs_of(1):
            yield self.batch(numbers.start)

    def runs_of(self, length: int) -> Iterator[range]:
        """The numbers of the batches that an epoch still has, so many at a time."""
        if not self._goes_on:
            self._next = 0
            self._draw()
        self._goes_on = False
        for start in range(self._next, self.num_batches, length):
            self._next = min(start + length, self.num_batches)
            yield range(start, self._next)

    def in_order(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches of the data as they are ordered, checked."""
        for index in range(self.num_batches):
            part = self._part_in_order(index)
            batch = self.source.fetch(part)
            for tensor in batch if isinstance(self.source, Items) else ():
                check_data(f"{self.name}[{part.start}:{part.stop}]", tensor)
            yield batch

    def rows(self, index: int) -> Tensor:
        """The numbers of the data in a batch of the present epoch."""
        share = self._share(index)
        return torch.arange(share.start, share.stop) if isinstance(share, slice) else share

    def rows_of(self, numbers: range) -> Tensor:
        """The numbers of the data in some batches of a shuffled epoch, ``num_batches x B``."""
        assert self._order is not None
        return self._order[numbers.start : numbers.stop]

    def batch(self, index: int) -> tuple[Tensor, ...]:
        """A batch of the present epoch."""
        return self.source.fetch(self._share(index))

    def state_dict(self) -> dict[str, Any]:
        """Where the present epoch is, and the random state from which its order was drawn."""
        return {"next": self._next, "drawn_from": self._drawn_from}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration go on from there."""
        with torch.random.fork_rng(devices=[]):
            if state["drawn_from"] is not None:
                torch.set_rng_state(state["drawn_from"])
            self._draw()
        self._next, self._goes_on = state["next"], True

    def digest(self) -> str:
        """A short name of the data: their kinds, and the values of some hundred of them."""
        digest = hashlib.sha256()
        some = torch.linspace(0, self.num_data - 1, min(self.num_data, _IN_DIGEST)).long()
        for t in self.source.fetch(some.to(self.device)):
            digest.update(f"{tuple(t.shape)} {t.dtype}".encode())
            digest.update(t.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return f"{self.num_data} data ({digest.hexdigest()[:12]})"

    def _share(self, index: int) -> slice | Tensor:
        """What this process has of a batch."""
        if self._order is None:
            return self.processes.share_of(self._part_in_order(index))
        return self._order[index][self.processes.share_of(slice(0, self._order.shape[1]))]

    def _part_in_order(self, index: int) -> slice:
        """Where a batch is in the data as they are ordered."""
        size, larger = divmod(self.num_data, self.num_batches)
        start = index * size + min(index, larger)
        return slice(start, start + size + (index < larger))

    def _draw(self) -> None:
        """Draw the order of an epoch, ``num_batches x B``."""
        if self.shuffle:
            with self.processes.first_generator() as self._drawn_from:
                order = torch.randperm(self.num_data).to(self.device)
            size = self.num_data // self.num_batches
            self._order = order[: self.num_batches * size].view(self.num_batches, size)
