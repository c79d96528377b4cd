"""The latents of all processes side by side, so that a divergence sees the whole batch.

Where processes share a batch, the aggregate posterior is that of all its data: a divergence between
the latents of one process and the prior is another number, with another expectation for biased
estimators, and its mean over processes is not that of the batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["across_processes", "batch_is_shared", "counts_of_all", "gather_rows", "num_processes"]

Counts = Callable[[int], list[int]]
_counts: ContextVar[Counts | None] = ContextVar("counts", default=None)


@contextmanager
def across_processes(counts: Counts | None = None) -> Iterator[None]:
    """In this context the batch of an objective is that of all processes of ``torch.distributed``.

    Every process must enter it with its own part of the batch, and evaluate the same objective; one
    that does not come keeps the others waiting. In a single process nothing changes. `PairModule`
    does this in each step; a training loop of your own does it around the loss. There the mean over
    processes that ``DistributedDataParallel`` takes must be one over data: with ``b`` of the ``B``
    data of a batch, a process of ``R`` weighs a loss that is a mean, or scaled to all data, by
    ``R b / B`` (1 if the parts are equal), and a loss that is a sum over its own data by ``R``.

    Args:
        counts: From this process's number of rows to those of all processes; `counts_of_all` if
            None.
    """
    token = _counts.set(counts or counts_of_all)
    try:
        yield
    finally:
        _counts.reset(token)


def num_processes() -> int:
    """The processes of ``torch.distributed``; 1 where it is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def batch_is_shared() -> bool:
    """Whether the batch at hand is a part of a batch that several processes share."""
    return _counts.get() is not None and num_processes() > 1


def counts_of_all(count: int, group: Any = None) -> list[int]:
    """A number of each process, in the order of their ranks."""
    device = "cpu" if dist.get_backend(group) == "gloo" else torch.cuda.current_device()
    own = torch.tensor([count], device=device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    return torch.cat(counts).tolist()


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all processes, ``b x ...`` -> ``B x ...``, in the order of their ranks.

    Outside of `across_processes`, and in a single process, they are those of ``x`` itself.

    What is made of them is the same in all processes, so that its gradient needs no exchange: each
    process differentiates by its own rows. It does so with a factor ``B / b``, the inverse of its
    weight in the mean over processes; hence that mean of the gradients is the gradient for the
    whole batch. Where something random is made of the rows, it is so in expectation.

    Raises:
        ValueError: If a process has no rows.
    """
    counts = _counts.get()
    if counts is None or num_processes() == 1:
        return x
    return _Gather.apply(x, counts(len(x)))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        if min(counts) == 0:
            raise ValueError(
                f"Expected rows in each of {len(counts)} processes; got {counts}. Use a larger "
                f"batch, or fewer processes."
            )
        rank = dist.get_rank()
        ctx.start, ctx.count, ctx.total = sum(counts[:rank]), counts[rank], sum(counts)
        padded = x.new_zeros(max(counts), *x.shape[1:])  # a collective takes equal shapes
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient[ctx.start : ctx.start + ctx.count]
        return own * (ctx.total / ctx.count), None
