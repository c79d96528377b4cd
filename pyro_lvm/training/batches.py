"""Minibatches of tensors that lie in memory, sliced where they are."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.checks import check_count, check_data

__all__ = ["Batches"]

_IN_DIGEST = 1024  # data whose values tell one set of data from another


class Batches:
    """Tensors with a common first dimension ``N``, in minibatches.

    The batches of an epoch differ by one datum at most, so none is so small that a statistic over
    it fails, and there are two shapes at most.

    Args:
        data: A tensor, or several, whose first dimension is the data.
        batch_size: The most data in a batch.
        shuffle: Whether each epoch has an order of its own, from torch's global generator.
        name: What the data are called in errors.

    Raises:
        TypeError: If something other than tensors is given.
        ValueError: If there are no data, if their numbers differ, or if values are not finite.
    """

    def __init__(
        self,
        data: Tensor | Sequence[Tensor],
        batch_size: int,
        *,
        shuffle: bool = False,
        name: str = "data",
    ) -> None:
        check_count("batch_size", batch_size)
        tensors = (data,) if isinstance(data, Tensor) else data
        if not isinstance(tensors, Sequence) or len(tensors) == 0:
            raise TypeError(
                f"Expected {name} to be a tensor or a sequence of tensors, the arguments of model "
                f"and guide; got {type(data).__name__}. Try torch.as_tensor({name})."
            )
        single = isinstance(data, Tensor)
        names = [name] if single else [f"{name}[{i}]" for i in range(len(tensors))]
        self.tensors = tuple(check_data(n, t) for n, t in zip(names, tensors, strict=True))
        lengths = [len(t) for t in self.tensors]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"Expected tensors in {name} with the same number of data; got {lengths}. Their "
                f"first dimension is the data."
            )
        self.name, self.batch_size = name, batch_size
        self.num_data = lengths[0]
        self.shuffle = shuffle
        self.num_batches = math.ceil(self.num_data / batch_size)
        self._order: Tensor | None = None
        self._next, self._goes_on = 0, False
        self._drawn_from: Tensor | None = None

    def to(self, device: torch.device) -> "Batches":
        """Move the data; the batches are then made on that device."""
        self.tensors = tuple(t.to(device) for t in self.tensors)
        return self

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return self.tensors[0].device

    @property
    def smallest(self) -> tuple[Tensor, ...]:
        """A batch of the least size, the first data in order."""
        size = self.num_data // self.num_batches
        return tuple(t[:size] for t in self.tensors)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if not self._goes_on:
            self._next = 0
            self._draw()
        self._goes_on = False
        for index in range(self._next, self.num_batches):
            self._next = index + 1
            yield self.batch(index)

    def in_order(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches of the data as they are ordered."""
        for index in range(self.num_batches):
            yield tuple(t[self._part(index)] for t in self.tensors)

    def rows(self, index: int) -> Tensor:
        """The numbers of the data in a batch of the present epoch."""
        part = self._part(index)
        return torch.arange(part.start, part.stop) if self._order is None else self._order[part]

    def batch(self, index: int) -> tuple[Tensor, ...]:
        """A batch of the present epoch."""
        part = self._part(index)
        return tuple(t[part if self._order is None else self._order[part]] for t in self.tensors)

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
        """A short name of the data: their kinds, and the values of some thousand of them."""
        digest = hashlib.sha256()
        some = torch.linspace(0, self.num_data - 1, min(self.num_data, _IN_DIGEST)).long()
        for t in self.tensors:
            digest.update(f"{tuple(t.shape)} {t.dtype}".encode())
            values = t[some.to(t.device)].cpu().contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
        return f"{self.num_data} data ({digest.hexdigest()[:12]})"

    def _part(self, index: int) -> slice:
        """Where a batch is in the order of the epoch."""
        size, larger = divmod(self.num_data, self.num_batches)
        start = index * size + min(index, larger)
        return slice(start, start + size + (index < larger))

    def _draw(self) -> None:
        """Draw the order of an epoch."""
        if self.shuffle:
            self._drawn_from = torch.get_rng_state()
            self._order = torch.randperm(self.num_data).to(self.device)
