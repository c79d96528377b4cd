"""Bad input is refused here, with one template: what was expected, what came, the remedy."""

import math

import torch
from torch import Tensor

__all__ = [
    "check_boolean",
    "check_count",
    "check_data",
    "check_finite",
    "check_positive",
    "check_weight",
]


def check_data(
    name: str, value: object, *, ndim: int | None = None, floating: bool = False
) -> Tensor:
    """Refuse data that no model can be fitted to.

    Args:
        name: What the value is called in the error.
        value: The value to check.
        ndim: The rank that it must have; any from 1 on if None.
        floating: Whether it must be of a floating point type.

    Returns:
        ``value``, unchanged.

    Raises:
        TypeError: If it is not a tensor, or not of a floating point type where one is needed.
        ValueError: If it has the wrong rank, no rows, or values that are not finite.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"Expected {name} to be a torch.Tensor; got {type(value).__name__}. "
            f"Try torch.as_tensor({name})."
        )
    if floating and not value.is_floating_point():
        raise TypeError(
            f"Expected {name} of a floating point dtype; got {value.dtype}. "
            f"Try {name}.to(torch.get_default_dtype())."
        )
    if value.dim() == 0 or (ndim is not None and value.dim() != ndim):
        expected = "at least one dimension" if ndim is None else f"{ndim} dimension(s)"
        raise ValueError(
            f"Expected {name} with {expected}, the first one the data; got shape "
            f"{tuple(value.shape)}."
        )
    if value.shape[0] == 0 or value.numel() == 0:
        raise ValueError(f"Expected {name} with at least one datum; got {tuple(value.shape)}.")
    if value.is_floating_point():
        finite = torch.isfinite(value)
        if not finite.all():
            where = tuple(int(i) for i in (~finite).nonzero()[0])
            raise ValueError(
                f"Expected finite values in {name}; got {int((~finite).sum())} that are NaN or "
                f"infinite, the first one at {where}. Remove these data, or, where entries are "
                f"missing, pass {name}.nan_to_num() and a mask to the model (lvm.masked)."
            )
    return value


def check_positive(name: str, value: float, *, minimum: float | None = None) -> None:
    """Refuse a setting that is not a positive finite number, or is below ``minimum``.

    Raises:
        ValueError: If it is not.
    """
    bound = "a positive number" if minimum is None else f"a number >= {minimum}"
    too_small = value <= 0 if minimum is None else value < minimum
    if not math.isfinite(value) or too_small:
        raise ValueError(f"Expected {name} to be {bound}; got {value}.")


def check_count(name: str, value: int) -> None:
    """Refuse a count that is not a positive integer.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected {name} to be a positive integer; got {value!r}.")


def check_finite(name: str, value: float) -> None:
    """Refuse a setting that is not a finite number.

    Raises:
        ValueError: If it is not.
    """
    if not math.isfinite(value):
        raise ValueError(f"Expected {name} to be a finite number; got {value}.")


def check_weight(name: str, value: float | Tensor) -> None:
    """Refuse a weight that is neither a finite number nor a tensor of one.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(value, Tensor) and value.dim() > 0:
        raise ValueError(
            f"Expected {name} to be a number or a tensor without dimensions; got one of shape "
            f"{tuple(value.shape)}."
        )
    check_finite(name, float(value))


def check_boolean(name: str, mask: object) -> None:
    """Refuse a mask of what is observed that is not a tensor of booleans.

    Args:
        name: What the mask is for.
        mask: The mask.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"Expected a mask of booleans for {name}, True where an entry is observed; got {got}. "
            f"Try ~x.isnan(), or mask.bool()."
        )
