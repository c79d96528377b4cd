"""Several processes that train one pair together: what they tell each other.

Every process has a part of each batch. Whatever decides how a run goes on (losses, ends, orders,
checkpoints) is the same in all of them, as one that goes its own way keeps the others waiting.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pyro
import torch
import torch.distributed as dist
from torch import Tensor

from pyro_lvm.infer.gathering import across_processes, counts_of_all, num_processes

__all__ = ["OtherProcessError", "Processes"]

T = TypeVar("T")
Batch = tuple[Tensor, ...]
_FAILED = -1  # in place of a number of data


class OtherProcessError(RuntimeError):
    """Another process has an error, so that this one can't go on."""


class Processes:
    """This process, alone or among those of ``torch.distributed``.

    Short messages go by way of the CPUs, so that nobody waits for a device.

    Args:
        together: Whether the other processes take part.

    Attributes:
        rank: The number of this process.
        size: How many there are.
    """

    def __init__(self, *, together: bool = False) -> None:
        self.size = num_processes() if together else 1
        self.rank = dist.get_rank() if self.size > 1 else 0
        self._group: Any = None
        if self.size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    def evaluate(
        self, loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]], batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor], int]:
        """The loss of a batch of which this process has a part.

        Args:
            loss: From a batch to its loss and parts, means over the batch.
            batch: This process's part.

        Returns:
            The loss of the part, to be differentiated, whose mean over processes is that of the
            whole batch: it is weighed by ``R b / B`` where this one of ``R`` processes has ``b`` of
            ``B`` data. The parts of the loss, for the whole batch. And ``B``.

        Raises:
            OtherProcessError: If the loss raised something in another process.
        """
        if self.size == 1:
            return *loss(batch), len(batch[0])
        try:
            with across_processes(self._counts):
                value, parts = loss(batch)
        except OtherProcessError:
            raise
        except Exception:
            counts_of_all(_FAILED, self._group)
            raise
        counts = self._counts(len(batch[0]))
        share = len(batch[0]) / sum(counts)
        return value * (self.size * share), self._sums(parts, share), sum(counts)

    def first(self, value: T) -> T:
        """What the first process has."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def all_of(self, value: T) -> list[T]:
        """What each process has."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in one of them."""
        return flag if self.size == 1 else max(counts_of_all(int(flag), self._group)) > 0

    def check_same(self, what: str, value: Any, remedy: str) -> None:
        """Refuse processes that differ in something, in all of them.

        Raises:
            ValueError: If they differ.
        """
        values = self.all_of(value)
        other = next((i for i, v in enumerate(values) if v != values[0]), None)
        if other is not None:
            raise ValueError(
                f"Expected the same {what} in {self.size} processes; got {values[0]} in the first "
                f"and {values[other]} in process {other}. {remedy}"
            )

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have in the first process."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor.data, src=0)

    def draw_apart(self) -> None:
        """Let each process have random numbers of its own; the first one's stay as they are."""
        state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).digest()
        seed = self.first(int.from_bytes(state[:4], "little"))
        if self.rank > 0:
            pyro.set_rng_seed((seed + self.rank) % 2**32)

    @contextmanager
    def first_generator(self) -> Iterator[Tensor]:
        """Draw what the first process draws; yields the random state to draw it from."""
        state = self.first(torch.get_rng_state())
        if self.rank == 0:
            yield state
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            yield state

    def share_of(self, rows: Any) -> Any:
        """This process's part of a slice, or of a sequence; parts differ by one at most.

        Raises:
            ValueError: If there are fewer rows than processes.
        """
        if self.size == 1:
            return rows
        first, num = (rows.start, rows.stop - rows.start) if isinstance(rows, slice) else (0, None)
        num = len(rows) if num is None else num
        if num < self.size:
            raise ValueError(
                f"Expected at least one datum of every batch for each of {self.size} processes; "
                f"got a batch of {num}. Use a larger batch_size, or drop the last batch of a "
                f"DataLoader (drop_last=True)."
            )
        start, stop = (num * r // self.size for r in (self.rank, self.rank + 1))
        if isinstance(rows, slice):
            return slice(first + start, first + stop)
        return rows[start:stop]

    def _counts(self, count: int) -> list[int]:
        counts = counts_of_all(count, self._group)
        failed = [rank for rank, c in enumerate(counts) if c == _FAILED]
        if failed:
            raise OtherProcessError(
                f"Expected a loss in each of {self.size} processes; got an error in "
                f"{_listed(failed)}, which says why."
            )
        return counts

    @torch.no_grad()
    def _sums(self, parts: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
        values = torch.stack([p.detach().to(parts["loss"].dtype) * weight for p in parts.values()])
        dist.all_reduce(values)
        return dict(zip(parts, values.unbind(), strict=True))


def _listed(ranks: Sequence[int]) -> str:
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
