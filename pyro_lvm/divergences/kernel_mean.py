"""The mean of a kernel over pairs of rows, in memory that does not grow with their number.

The matrix of all kernel values (the Gram matrix) is held whole where it is small. Where it is
large, its blocks come and go one at a time, each with its gradient, and only the sums are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_lvm.divergences.kernels import Kernel, centred, distances_of_centred

__all__ = [
    "BLOCK_ROWS",
    "LARGEST_GRAM",
    "OTHER_BLOCK_ROWS",
    "add_in_place",
    "check_not_recorded",
    "kernel_mean",
    "split_rows",
]

LARGEST_GRAM = 2**22
"""Entries of the largest Gram matrix that is held whole: 2,048 by 2,048, 16 MiB in float32, and
some twenty times that with what its gradient keeps of a kernel of seven widths."""

BLOCK_ROWS = {"cpu": 2**9}
"""Rows and columns of a block by device: 1 MiB in float32, which a processor's cache can hold."""

OTHER_BLOCK_ROWS = 2**11
"""Those on other devices, where starting an operation is what takes time: 16 MiB in float32."""


def kernel_mean(kernel: Kernel, x: Tensor, y: Tensor, *, distinct: bool = False) -> Tensor:
    """The mean of ``k(x_i, y_j)`` over all pairs (i, j), or over those with i != j.

    Above `LARGEST_GRAM` pairs the gradient is found along with the value and is exact, but has no
    gradient of its own. Parameters of a kernel that is an ``nn.Module`` get theirs; a kernel with
    other tensors that require a gradient always has its Gram matrix whole.

    Args:
        kernel: See :mod:`pyro_lvm.divergences.kernels`.
        x: ``B1 x D``.
        y: ``B2 x D``; ``x`` itself for pairs within a sample, which halves the work.
        distinct: Whether to leave out the pairs with i = j; needs B1 = B2.

    Returns:
        A scalar.
    """
    small = len(x) * len(y) <= LARGEST_GRAM
    total = _whole if small or _has_hidden_tensors(kernel, x) else _by_blocks
    return total(kernel, x, y, distinct) / (len(x) * (len(y) - int(distinct)))


def check_not_recorded(num_pairs: int) -> None:
    """Refuse to be compiled with more pairs than a Gram matrix that is held whole.

    A compiler has the operations of all blocks in one graph, and may hold all of them at a time.

    Raises:
        ValueError: If there are, and a recording is being made.
    """
    if num_pairs > LARGEST_GRAM and torch._C._get_tracing_state():
        raise ValueError(
            f"{num_pairs:,} pairs of draws are compared in blocks, one at a time, which a compiler "
            f"would not do; smaller batches, or a divergence with a linear cost, are compiled"
        )


def split_rows(x: Tensor) -> tuple[Tensor, ...]:
    """The rows of the blocks that `x` has a side of."""
    return x.split(BLOCK_ROWS.get(x.device.type, OTHER_BLOCK_ROWS))


def _whole(kernel: Kernel, x: Tensor, y: Tensor, distinct: bool) -> Tensor:
    return _sum(kernel, *centred(x, y), distinct)


def _sum(kernel: Kernel, x: Tensor, y: Tensor, distinct: bool) -> Tensor:
    gram = kernel(distances_of_centred(x, y), x.shape[1])  # B1 x B2
    return gram.sum() - gram.trace() if distinct else gram.sum()


def _by_blocks(kernel: Kernel, x: Tensor, y: Tensor, distinct: bool) -> Tensor:
    """The sum block by block: a constant, and terms that are 0 and have its gradient."""
    check_not_recorded(len(x) * len(y))
    learned = _learned(kernel)
    blocks = list(_blocks(*centred(x, y), distinct))
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, y, *learned.values()))):
        return _without_gradient(kernel, blocks)
    x_slope = torch.zeros_like(x)
    y_slope = x_slope if y is x else torch.zeros_like(y)  # within a sample both rows of a pair move
    slopes = [torch.zeros_like(t) for t in learned.values()]
    rows, columns = split_rows(x_slope), split_rows(y_slope)
    values = x_slope.new_zeros(len(blocks))
    for value, block in zip(values, blocks, strict=True):
        totals = [value, rows[block.row], columns[block.column], *slopes]
        add_in_place(totals, _with_gradient(kernel, learned, block))
    lines = [_line(x, x_slope), *map(_line, learned.values(), slopes)]
    if y is not x:
        lines.append(_line(y, y_slope))
    return values.sum() + torch.stack(lines).sum()


class _Block(NamedTuple):
    """Rows ``x`` and ``y`` of two samples, the number of each in its sample, and what to sum."""

    row: int
    column: int
    x: Tensor
    y: Tensor
    weight: float
    distinct: bool


def _blocks(x: Tensor, y: Tensor, distinct: bool) -> Iterator[_Block]:
    """The blocks of a Gram matrix; of a symmetric one those from the diagonal on, others twice."""
    rows, columns = split_rows(x), split_rows(y)
    for i, x_rows in enumerate(rows):
        for j in range(i if x is y else 0, len(columns)):
            weight = 2.0 if x is y and j > i else 1.0
            yield _Block(i, j, x_rows, columns[j], weight, distinct and i == j)


def _block_sum(kernel: Kernel, block: _Block) -> Tensor:
    return block.weight * _sum(kernel, block.x, block.y, block.distinct)


def _without_gradient(kernel: Kernel, blocks: Sequence[_Block]) -> Tensor:
    values = blocks[0].x.new_zeros(len(blocks))
    for value, block in zip(values, blocks, strict=True):
        add_in_place([value], [_block_sum(kernel, block)])
    return values.sum()


def _with_gradient(kernel: Kernel, learned: dict[str, Tensor], block: _Block) -> list[Tensor]:
    """The sum over a block, and its gradient by the rows of x and y and the kernel's parameters."""
    x, y, *parameters = (t.detach().requires_grad_() for t in (block.x, block.y, *learned.values()))
    with torch.enable_grad():
        frozen = _with_parameters(kernel, dict(zip(learned, parameters, strict=True)))
        value = _block_sum(frozen, block._replace(x=x, y=y))
        gradient = torch.autograd.grad(value, [x, y, *parameters], materialize_grads=True)
    return [value.detach(), *gradient]


def add_in_place(totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Add what a block gives, so that nothing of it lives on.

    Small tensors that stay between large ones that go would keep the memory of these from being
    used again: gigabytes in the end.
    """
    for total, part in zip(totals, parts, strict=True):
        total.add_(part)


def _line(x: Tensor, slope: Tensor) -> Tensor:
    """0, with the gradient ``slope``."""
    return ((x - x.detach()) * slope.detach()).sum()


def _learned(kernel: Kernel) -> dict[str, Tensor]:
    if not isinstance(kernel, nn.Module):
        return {}
    return {name: p for name, p in kernel.named_parameters() if p.requires_grad}


def _with_parameters(kernel: Kernel, parameters: dict[str, Tensor]) -> Kernel:
    if not parameters:
        return kernel
    call: Callable = torch.func.functional_call
    return lambda squared_distance, dim: call(kernel, parameters, (squared_distance, dim))


def _has_hidden_tensors(kernel: Kernel, x: Tensor) -> bool:
    """Whether the kernel's values have a gradient by tensors that are not its parameters."""
    learned = {name: p.detach() for name, p in _learned(kernel).items()}
    values = _with_parameters(kernel, learned)(x.detach().new_zeros(1), x.shape[1])
    return values.requires_grad
