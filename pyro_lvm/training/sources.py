"""Where minibatches come from: tensors, or datasets that are too large to lie in memory."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

from pyro_lvm.checks import check_data

__all__ = ["Data", "Items", "Source", "Tensors", "as_batch", "source_of"]

Data = Tensor | Sequence[Tensor] | Dataset
_CHECKED_AT_ONCE = 1 << 22  # numbers that are looked at together, as a check takes memory too


class Source(Protocol):
    """Data by their numbers."""

    num_data: int

    @property
    def device(self) -> torch.device:
        """Where the data are."""

    def fetch(self, rows: slice | Tensor) -> tuple[Tensor, ...]:
        """The data with these numbers, one tensor for each argument of the pair."""

    def to(self, device: torch.device) -> None:
        """Let the data be on a device."""


class Tensors:
    """Tensors with a common first dimension, sliced where they are.

    Raises:
        TypeError: If something other than tensors is given.
        ValueError: If there are no data, if their numbers differ, or if values are not finite.
    """

    def __init__(self, data: Tensor | Sequence[Tensor], name: str) -> None:
        self.tensors = (data,) if isinstance(data, Tensor) else tuple(data)
        for i, tensor in enumerate(self.tensors):
            _check_finite(name if isinstance(data, Tensor) else f"{name}[{i}]", tensor)
        lengths = [len(t) for t in self.tensors]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"Expected tensors in {name} with the same number of data; got {lengths}. Their "
                f"first dimension is the data."
            )
        self.num_data = lengths[0]

    @property
    def device(self) -> torch.device:
        """Where the data are."""
        return self.tensors[0].device

    def fetch(self, rows: slice | Tensor) -> tuple[Tensor, ...]:
        """The data with these numbers."""
        return tuple(t[rows] for t in self.tensors)

    def to(self, device: torch.device) -> None:
        """Move the data."""
        self.tensors = tuple(t.to(device) for t in self.tensors)


class Items:
    """A dataset by its items: tensors, or tuples of tensors.

    Where a dataset has ``__getitems__``, it is asked for a whole batch; it returns a list of items,
    or all of them stacked in one tensor.

    Raises:
        ValueError: If there are no data, or nobody knows how many.
    """

    def __init__(self, dataset: Any, name: str) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"Expected {name} of a known number, to scale the likelihood of a minibatch to all "
                f"of them; got {type(dataset).__name__}, without a length or without items by "
                f"number. Give it __len__ and __getitem__, or pass a DataLoader of a dataset with "
                f"__len__."
            )
        self.dataset, self.name = dataset, name
        self.num_data = len(dataset)
        if self.num_data == 0:
            raise ValueError(f"Expected {name} with at least one datum; got an empty dataset.")
        self.device = torch.device("cpu")

    def fetch(self, rows: slice | Tensor) -> tuple[Tensor, ...]:
        """The data with these numbers, on the device."""
        numbers = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(list(numbers))
        else:
            items = [self.dataset[i] for i in numbers]
        batch = items if isinstance(items, Tensor) else default_collate(items)
        return tuple(t.to(self.device) for t in as_batch(batch, self.name))

    def to(self, device: torch.device) -> None:
        """Let the batches be on a device."""
        self.device = device


def source_of(data: Data, name: str) -> Source:
    """The data that a user has.

    Raises:
        TypeError: If it is neither tensors nor a dataset.
    """
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Tensor) or (isinstance(data, Sequence) and len(data)):
        return Tensors(data, name)
    if isinstance(data, Dataset):
        return Items(data, name)
    raise TypeError(
        f"Expected {name} to be a tensor or a sequence of tensors, the arguments of model "
        f"and guide, or a dataset of them; got {type(data).__name__}. Try torch.as_tensor({name})."
    )


def as_batch(batch: Any, name: str) -> tuple[Tensor, ...]:
    """The arguments of one call of the pair.

    Raises:
        TypeError: If a dataset has something other than tensors.
    """
    batch = (batch,) if isinstance(batch, Tensor) else batch
    if not isinstance(batch, tuple | list) or not all(isinstance(t, Tensor) for t in batch):
        raise TypeError(
            f"Expected {name} whose items are tensors or tuples of tensors, the arguments of model "
            f"and guide; got {type(batch).__name__}. Convert them in __getitem__ or collate_fn."
        )
    return tuple(batch)


def _check_finite(name: str, tensor: Any) -> None:
    """What `check_data` does, in parts, so that a mapped file is never in memory as a whole."""
    if not isinstance(tensor, Tensor) or tensor.dim() == 0 or tensor.numel() <= _CHECKED_AT_ONCE:
        check_data(name, tensor)
        return
    rows = max(1, _CHECKED_AT_ONCE // tensor[0].numel())
    for start in range(0, len(tensor), rows):
        check_data(f"{name}[{start}:{start + rows}]", tensor[start : start + rows])
