"""Rows of a table that are alike, computed together, some groups at a time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["in_groups", "patterns_of", "when_needed"]


def patterns_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of booleans, and which of them each row is.

    Args:
        mask: ``... x D``.

    Returns:
        ``P x D``, and numbers below P of shape ``...``.
    """
    different, number = torch.unique(mask.flatten(0, -2), dim=0, return_inverse=True)
    return different, number.reshape(mask.shape[:-1])


def when_needed(compute: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """The result of a function, which a gradient computes anew, as nothing on the way is kept."""
    if not torch.is_grad_enabled():
        return compute(*args)
    return checkpoint(compute, *args, use_reentrant=False, preserve_rng_state=False)


def in_groups(
    compute: Callable[[Tensor, Tensor], Tensor], keys: Tensor, *, most: int, least: int = 1
) -> Tensor:
    """Compute something of rows, of all rows with one key together.

    Args:
        compute: From ``G`` keys and the numbers of ``n`` rows for each, ``G x n``, to
            ``G x ... x n``. Groups with fewer rows are filled up with rows of others.
        keys: ``R`` integers.
        most: How many rows to have in memory at a time.
        least: How many rows a group counts for at the least.

    Returns:
        ``... x R``, for the rows in their order.
    """
    found, rows = [], []
    for key, numbers, is_member in _portions(keys, most, least):
        found.append(compute(key, numbers).movedim(0, -2)[..., is_member])
        rows.append(numbers[is_member])
    place = torch.empty_like(keys)
    place[torch.cat(rows)] = torch.arange(len(keys), device=keys.device)
    return torch.cat(found, -1).index_select(-1, place)


def _portions(keys: Tensor, most: int, least: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Keys ``G``, numbers of rows ``G x n``, and which of these belong there.

    The largest groups come first, and those of one portion differ by a factor of 2 at most, so that
    no more is computed in vain than for the result. A group with too many rows comes in parts.
    """
    order = keys.argsort(stable=True)
    _, counts = keys[order].unique_consecutive(return_counts=True)
    starts, counts = _in_parts(counts, most)
    by_size = counts.argsort(descending=True)
    sizes = counts[by_size].tolist()
    first = 0
    while first < len(sizes):
        most_groups = max(1, most // max(sizes[first], least))
        last = first + 1
        while last < min(len(sizes), first + most_groups) and 2 * sizes[last] >= sizes[first]:
            last += 1
        chosen = by_size[first:last]
        offset = torch.arange(sizes[first], device=keys.device)
        numbers = starts[chosen].unsqueeze(-1) + offset
        is_member = offset < counts[chosen].unsqueeze(-1)
        yield keys[order[starts[chosen]]], order[numbers.clamp(max=len(order) - 1)], is_member
        first = last


def _in_parts(counts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Where parts of groups start, one group behind the other, and how many rows they have."""
    parts = (counts + most - 1) // most  # of each group
    ends = counts.cumsum(0).repeat_interleave(parts)
    first = (parts.cumsum(0) - parts).repeat_interleave(parts)
    offset = (torch.arange(len(first), device=counts.device) - first) * most
    starts = ends - counts.repeat_interleave(parts) + offset
    return starts, (ends - starts).clamp(max=most)
