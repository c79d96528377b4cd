"""What a recording needs of Pyro and torch, and only while it is made.

A recording knows the operations on tensors, and nothing of the Python between them. What Pyro and
torch decide by the value of a tensor, or in Python behind the back of the operations, is put here
into a form that can be recorded, with the same values and gradients.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pyro
import torch
from pyro.infer import traceenum_elbo
from pyro.infer.util import Dice, torch_item
from pyro.ops import special
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["recordable"]


@contextmanager
def recordable() -> Iterator[None]:
    """Let Pyro and torch do nothing that a recording would miss, or could not hold.

    Pyro looks at the tracing state before it branches on the value of a tensor. ``torch_item``
    would make a constant of a value; validation and warnings about NaN would look at values. An
    exact expectation leaves out what has no probability, and the shape of what is left is that of a
    value: here it is in the sum, as zero.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # shapes are constants of a graph, on purpose: another shape has another one
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        for owner, name, value in _replacements():
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(pyro.validation_enabled(False))
        mode = stack.enter_context(_Recordable())
        function: Any = torch.autograd.Function
        apply: Any = classmethod(mode.outside_of(function.apply.__func__))
        stack.enter_context(mock.patch.object(function, "apply", apply))
        yield


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Owner, attribute, and its value while a recording is made."""
    from torch.distributions import Distribution, dirichlet, utils

    yield torch._C, "_get_tracing_state", lambda: True
    yield from _everywhere("torch_item", torch_item, _detached)
    yield from ((pyro.util, name, lambda _: False) for name in ("torch_isnan", "torch_isinf"))
    yield Distribution, "_validate_sample", lambda *_: None
    # Python has compared them before, by their values
    yield traceenum_elbo, "_get_common_scale", lambda scales: scales[0]
    yield Dice, "compute_expectation", _with_zeros(Dice.compute_expectation)
    # torch takes a slower way for its own tracer, to the same numbers
    yield from _everywhere("_standard_normal", utils._standard_normal, _standard_normal)
    # gradients by Python classes of their own, of which a recording would know nothing
    yield dirichlet._Dirichlet, "apply", _sample_dirichlet
    yield from _everywhere("safe_log", special.safe_log, _safe_log)


def _everywhere(name: str, value: Any, new: Any) -> Iterator[tuple[Any, str, Any]]:
    """A function in all modules that have imported it."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is value:
            yield module, name, new


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _standard_normal(shape: Any, dtype: Any, device: Any) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def _sample_dirichlet(concentration: Tensor) -> Tensor:
    """Draws, and the pathwise gradient that torch has for them, ``... x C``."""
    parameters = concentration.detach()
    x = torch._sample_dirichlet(parameters)
    total = parameters.sum(-1, keepdim=True).expand_as(x)
    moved = (concentration - parameters) * torch._dirichlet_grad(x, parameters, total)  # zero
    return x + moved - x * moved.sum(-1, keepdim=True)


def _safe_log(x: Tensor) -> Tensor:
    """The logarithm, with a gradient that is finite at 0."""
    value = x.detach()
    return value.log() + (x - value) / value.clamp(min=torch.finfo(x.dtype).eps)


def _with_zeros(expectation: Callable[..., Any]) -> Callable[..., Any]:
    """A sum over what a mask selects as a sum over all."""

    def whole(*args: Any, **kwargs: Any) -> Any:
        with _ZerosForMasked():
            return expectation(*args, **kwargs)

    return whole


class _ZerosForMasked(TorchFunctionMode):
    """Where a mask would select values, all of them, flat, with zeros for the others."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is Tensor.masked_select:
            values, mask = args
            return torch.where(mask, values, values.new_zeros(())).flatten()
        return func(*args, **kwargs or {})


class _Recordable(TorchFunctionMode):
    """Operations that can be recorded in place of others.

    The ``one_hot`` of torch looks at values. What has no gradient since it stands under ``no_grad``
    is detached, as a recording does not know where that begins and ends. Functions with a gradient
    of their own run without gradients too, but are not constants.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_function = False

    def outside_of(self, apply: Callable) -> Callable:
        """``Function.apply``, inside of which nothing is detached."""

        def applied(*args: Any, **kwargs: Any) -> Any:
            outer, self.in_function = self.in_function, True
            try:
                return apply(*args, **kwargs)
            finally:
                self.in_function = outer

        return applied

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.one_hot:
            return _one_hot(*args, **kwargs)
        if torch.is_grad_enabled() or self.in_function or _is_about_gradients(func):
            return func(*args, **kwargs)
        if func.__name__ == "__get__":  # an attribute: a view such as x.T, or no tensor at all
            return _detached(func(*args, **kwargs))
        originals: dict[int, Tensor] = {}

        def cut(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.requires_grad):
                return value
            alias = value.detach()
            originals[id(alias)] = value
            return alias

        result = func(*tree_map(cut, args), **tree_map(cut, kwargs))
        # what is changed in place is returned as it came
        return originals.get(id(result), result)


def _is_about_gradients(func: Callable) -> bool:
    names = ("grad", "requires_grad", "requires_grad_", "register_hook", "retain_grad")
    attribute = getattr(func, "__self__", None)  # of which ``func`` is a getter or setter
    return getattr(attribute, "__name__", func.__name__) in names


def _one_hot(labels: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes == -1:  # the largest label decides, which no recording can know
        return torch._C._nn.one_hot(labels, num_classes)
    return (labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)).long()
