"""A process's part of the batches of a DataLoader."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from pyro_lvm.training.processes import Processes

__all__ = ["shared"]


def shared(loader: DataLoader, processes: Processes, name: str) -> DataLoader:
    """A DataLoader that loads this process's part of each batch, and nothing else.

    The order is that of the first process, whatever draws it.

    Raises:
        ValueError: If the batches of the loader can't be divided before they are loaded.
    """
    reason = _why_not(loader)
    if reason:
        raise ValueError(
            f"Expected {name} whose batches {processes.size} processes can share; got {reason}. "
            f"Pass a torch.utils.data.DataLoader of a dataset with items by number, or the dataset."
        )
    return DataLoader(
        loader.dataset,
        batch_sampler=_Parts(loader.batch_sampler, processes),  # type: ignore[arg-type]
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class _Parts:
    """The numbers of a process's data in each batch."""

    def __init__(self, batches: Iterable[list], processes: Processes) -> None:
        self.batches, self.processes = batches, processes

    def __iter__(self) -> Iterator[list]:
        first = self.processes.rank == 0
        for batch in self.processes.first(list(self.batches) if first else []):
            yield self.processes.share_of(batch)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def _why_not(loader: Any) -> str | None:
    if isinstance(loader.dataset, IterableDataset):
        return f"a DataLoader of {type(loader.dataset).__name__}, whose items have no numbers"
    if isinstance(loader.sampler, DistributedSampler):
        return "a DataLoader with a DistributedSampler, which has divided the data before"
    if type(loader) is not DataLoader or loader.batch_sampler is None:
        return f"a {type(loader).__name__} with batch_size={loader.batch_size}"
    return None
