"""Whether the present operations are run for their values, or are recorded."""

import torch

__all__ = ["is_recorded"]


def is_recorded() -> bool:
    """Whether tensors stand for those of later runs, so that no value may decide anything.

    True while a pair is recorded to be compiled, under torch's tracer, and inside the transforms of
    ``torch.func``.
    """
    return bool(torch._C._get_tracing_state() or torch._C._are_functorch_transforms_active())
