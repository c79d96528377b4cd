"""A pair in another precision for a while, its tensors put back as they were afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["check_precision", "in_precision", "with_precision"]


def check_precision(dtype: torch.dtype | None) -> None:
    """Refuse what chains can't be run in.

    Raises:
        ValueError: If it is neither None nor single or double precision.
    """
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"Expected dtype to be torch.float32, torch.float64 or None; got {dtype}.")


def with_precision(arguments: Any, dtype: torch.dtype | None) -> Any:
    """Arguments whose tensors of a floating point type are in this one, if there is one."""

    def cast(leaf: Any) -> Any:
        is_floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(dtype) if is_floating else leaf

    return arguments if dtype is None else tree_map(cast, arguments)


@contextmanager
def in_precision(tensors: Sequence[Tensor], dtype: torch.dtype | None) -> Iterator[None]:
    """Let parameters and buffers, and what a program makes of numbers, have this precision.

    The tensors stay the objects that they are, wherever they are held, and have other data for the
    time being. What they had before is theirs again afterwards, whatever has happened.

    Args:
        tensors: The parameters and buffers of a pair.
        dtype: Their type; only buffers' changes are undone if None.
    """
    before = [t.data for t in tensors]
    default = torch.get_default_dtype()
    try:
        for tensor, data in zip(tensors, before, strict=True):
            cast = dtype is not None and data.is_floating_point()
            # a copy in any case: programs may change it in place, as running averages are
            tensor.data = data.to(dtype, copy=True) if cast else data.clone()
        torch.set_default_dtype(dtype or default)
        yield
    finally:
        torch.set_default_dtype(default)
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data
