"""Minibatches as a DataLoader makes them."""

from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_lvm.checks import check_data
from pyro_lvm.training.processes import Processes
from pyro_lvm.training.randomness import random_state, set_random_state
from pyro_lvm.training.shares import shared
from pyro_lvm.training.sources import as_batch

__all__ = ["Loaded"]


class Loaded:
    """A DataLoader, with what a run asks of minibatches beside iterating over them.

    A run that goes on from a checkpoint has the same batches if the loader draws its order from
    torch's global generator, which is what ``shuffle=True`` does, with or without workers; a
    generator or a sampler of its own starts again from where it is. Checkpoints are written between
    epochs only.

    Raises:
        ValueError: If nobody knows the number of its data.
    """

    def __init__(self, loader: DataLoader, *, name: str = "data") -> None:
        if not hasattr(loader.dataset, "__len__"):
            raise ValueError(
                f"Expected {name} of a known number, to scale the likelihood of a minibatch to all "
                f"of them; got a DataLoader of {type(loader.dataset).__name__}, without a length. "
                f"Give the dataset a method __len__."
            )
        self.loader = self._whole = loader
        self.processes = Processes()
        self.name = name
        self.num_data, self.num_batches = len(loader.dataset), len(loader)
        self.batch_size = loader.batch_size
        if self.num_batches == 0:
            raise ValueError(f"Expected {name} with at least one batch; got an empty DataLoader.")
        self.device = torch.device("cpu")
        self._smallest: tuple[Tensor, ...] | None = None

    def to(self, device: torch.device) -> "Loaded":
        """Let the batches be on a device."""
        self.device = device
        return self

    def share(self, processes: Processes) -> None:
        """Load one process's part of each batch; the order is that of the first process."""
        self.processes = processes
        self.loader = shared(self._whole, processes, self.name)

    @property
    def smallest(self) -> tuple[Tensor, ...]:
        """The smallest batch that was seen so far."""
        if self._smallest is None:
            batches = self.in_order()
            next(batches)
            batches.close()
        assert self._smallest is not None
        return tuple(t.to(self.device) for t in self._smallest)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self.loader:
            yield tuple(t.to(self.device) for t in as_batch(batch, self.name))

    def in_order(self) -> Generator[tuple[Tensor, ...], None, None]:
        """One pass over the batches, checked, which leaves the generators as they were."""
        own = self.loader.generator
        before, own_before = random_state(), None if own is None else own.get_state()
        try:
            for index, batch in enumerate(self):
                for tensor in batch:
                    check_data(f"batch {index} of {self.name}", tensor)
                if self._smallest is None or len(batch[0]) < len(self._smallest[0]):
                    self._smallest = batch
                yield batch
        finally:
            set_random_state(before)
            if own is not None:
                own.set_state(own_before)

    def digest(self) -> str:
        """A short name of the data, by their number and kinds alone."""
        kinds = [(tuple(t.shape[1:]), str(t.dtype)) for t in self.smallest]
        return f"{self.num_data} data {kinds} in {self.num_batches} batches"
