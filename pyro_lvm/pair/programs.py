"""Programs, and what is around a run of one: devices, random numbers, the modes of modules."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Program", "at_rest", "device_of", "no_guide", "untouched_random_state"]

Program = Callable[..., Any]


def no_guide(*args: Any, **kwargs: Any) -> None:
    """The guide that samples nothing."""


@contextmanager
def at_rest(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Modules in evaluation mode, so that no statistics change and no dropout is drawn.

    Parameters that are frozen stay so, though Pyro would have them trained once it knows them.
    """
    modules = list(modules)
    frozen = [p for m in modules for p in m.parameters() if not p.requires_grad]
    modes = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        for p in frozen:
            p.requires_grad_(False)


def device_of(args: tuple = (), kwargs: dict | None = None) -> AbstractContextManager[Any]:
    """Let a program make its tensors where its arguments are, if that is not the CPU.

    ``dist.Normal(0.0, 1.0)`` in a plate is a tensor with an entry per datum. Inside this context it
    is made on the device of the data, so that a story in plain numbers runs on any device.
    """
    tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
    elsewhere = (t.device for t in tensors if t.device.type != "cpu")
    return next(elsewhere, nullcontext())


@contextmanager
def untouched_random_state(args: tuple = (), kwargs: dict | None = None) -> Iterator[None]:
    """Put torch's generators back as they were: the CPU's, and those of the arguments' devices."""
    tensors = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Tensor)]
    devices = sorted({t.device.index for t in tensors if t.is_cuda})
    if not devices and torch.cuda.is_initialized():
        devices = [torch.cuda.current_device()]
    with torch.random.fork_rng(devices=devices):
        yield
