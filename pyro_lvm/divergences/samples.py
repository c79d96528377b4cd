"""What every divergence asks of its samples, by type and shape alone: safe to trace."""

import torch
from torch import Tensor

__all__ = ["check_samples", "check_two_samples", "full_precision", "in_one_type"]


def check_two_samples(
    q_samples: Tensor, p_samples: Tensor, *, least: int = 1, purpose: str = "", remedy: str = ""
) -> None:
    """Refuse two samples that can't be compared.

    Args:
        q_samples: ``B1 x D``.
        p_samples: ``B2 x D``.
        least: The number of rows that each must have.
        purpose: What so many are needed for.
        remedy: What to do about too few besides a larger batch.

    Raises:
        TypeError: If a sample is not a floating point tensor.
        ValueError: If a sample is not ``B x D``, has too few rows, or the widths D differ.
    """
    check_samples("q_samples", q_samples, least=least, purpose=purpose, remedy=remedy)
    check_samples("p_samples", p_samples, least=least, purpose=purpose, remedy=remedy)
    if q_samples.shape[1] != p_samples.shape[1]:
        raise ValueError(
            f"Expected q_samples and p_samples of one width D; got {q_samples.shape[1]} and "
            f"{p_samples.shape[1]}. Flatten the same sites for both."
        )


def check_samples(
    name: str, x: Tensor, *, least: int = 1, purpose: str = "", remedy: str = ""
) -> None:
    """Refuse a sample that no divergence can be computed of.

    Args:
        name: What the sample is called in the error.
        x: ``B x D``.
        least: The number of rows that it must have.
        purpose: What so many are needed for.
        remedy: What to do about too few besides a larger batch.

    Raises:
        TypeError: If it is not a floating point tensor.
        ValueError: If it is not ``B x D``, or has too few rows.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"Expected {name} to be a floating point tensor; got {got}. "
            f"A divergence of samples is for continuous latents."
        )
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(
            f"Expected {name} of shape B x D; got {tuple(x.shape)}. Try {name}.reshape(B, -1)."
        )
    if len(x) < least:
        raise ValueError(
            f"Expected {name} with at least {least} row(s){purpose}; got {len(x)}. "
            f"Use a larger batch (drop the last, incomplete one){remedy}."
        )


def in_one_type(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their types, and in float32 at least.

    Networks in half precision make draws of half precision, in which differences of close points
    would have no digits left.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)


def full_precision(x: Tensor) -> torch.autocast:
    """A context without automatic casts to half precision, for the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False)
