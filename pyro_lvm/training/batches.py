"""Minibatches of tensors that lie in memory, sliced where they are."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyro_lvm.checks import check_count, check_data

__all__ = ["Batches"]


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
        self.name = name
        self.num_data = lengths[0]
        self.shuffle = shuffle
        self.num_batches = math.ceil(self.num_data / batch_size)

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

    def in_order(self) -> Iterator[tuple[Tensor, ...]]:
        """The batches of the data as they are ordered."""
        parts = [torch.tensor_split(t, self.num_batches) for t in self.tensors]
        yield from zip(*parts, strict=True)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if not self.shuffle:
            yield from self.in_order()
            return
        order = torch.randperm(self.num_data).to(self.tensors[0].device)
        for index in torch.tensor_split(order, self.num_batches):
            yield tuple(t[index] for t in self.tensors)
