"""Shapes of networks: read from arguments, and checked where data come in."""

import operator
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from pyro_lvm.checks import check_positive

__all__ = ["as_image_shape", "as_sizes", "check_input", "raw_shape"]


def raw_shape(head: nn.Module) -> tuple[int, ...]:
    """The trailing shape of what a head reads: every parameter of every value of one event."""
    if not (isinstance(head, nn.Module) and hasattr(head, "event_shape")):
        raise TypeError(
            f"Expected head to be an nn.Module with event_shape and params_per_value; got {head!r}."
            " Try lvm.nn.NormalHead(8)."
        )
    first, *rest = as_sizes("event_shape of the head", cast(Any, head.event_shape))
    (per_value,) = as_sizes("params_per_value of the head", cast(Any, head).params_per_value)
    return per_value * first, *rest


def as_sizes(name: str, value: int | Sequence[int], *, least: int = 1) -> tuple[int, ...]:
    """Sizes as a tuple of positive integers, at least ``least`` of them."""
    try:
        sizes = tuple(map(operator.index, value if isinstance(value, Sequence) else (value,)))
    except TypeError as error:
        raise TypeError(f"Expected {name} to be one or more integers; got {value!r}.") from error
    if len(sizes) < least:
        raise ValueError(f"Expected {name} with at least {least} size(s); got {value!r}.")
    for size in sizes:
        check_positive(name, size)
    return sizes


def as_image_shape(name: str, value: Sequence[int]) -> tuple[int, ...]:
    """Three sizes, ``C x H x W``."""
    shape = as_sizes(name, value)
    if len(shape) != 3:
        raise ValueError(
            f"Expected {name} with three sizes, C x H x W; got {shape}. "
            f"Write (1, 28, 28) for one channel, or use lvm.nn.MLP."
        )
    return shape


def check_input(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse the wrong type or trailing shape, without a look at the values: safe to trace."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"Expected {name} to be a floating point tensor; got {got}. "
            f"Try torch.as_tensor({name}, dtype=torch.get_default_dtype())."
        )
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"Expected {name} of shape batch x {' x '.join(map(str, shape))}; got "
            f"{tuple(x.shape)}. Reshape {name}, or build the network for its shape."
        )
