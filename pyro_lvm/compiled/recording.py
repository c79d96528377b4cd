"""The recorded loss of a pair, and whether it agrees with Python."""

import numbers
import traceback
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_lvm.compiled.objective import loss_and_parts, modules_of_objective
from pyro_lvm.compiled.tracing import Footprint, footprint, kind_of_tensor, trace
from pyro_lvm.pair import Program, untouched_random_state

_LIBRARIES = [*pyro.__path__, *torch.__path__, Path(__file__).parents[1]]

__all__ = [
    "NotRecordable",
    "Recording",
    "difference",
    "find",
    "kind_of",
    "reason_of",
    "record",
    "settings_of",
    "tensors_of",
    "unchanged",
    "undone",
]


@dataclass(frozen=True)
class Recording:
    """A loss as a function of tensors alone.

    Attributes:
        graph: From ``[*footprint.tensors, *constants, *tensors of the arguments]`` to the loss and
            its parts.
        footprint: The parameters and states of the pair.
        constants: Tensors that the pair uses besides.
        names: What the parts are called.
        loss: The loss by Python, before anything was recorded, in the precision of the least
            precise parameter: a weight in double precision does not make it a better one.
        gradient: Its gradient by ``footprint.parameters``; None where it does not depend on one.
    """

    graph: fx.GraphModule
    footprint: Footprint
    constants: list[Tensor]
    names: tuple[str, ...]
    loss: Tensor
    gradient: tuple[Tensor | None, ...]

    @property
    def is_redrawn(self) -> bool:
        """Whether a compiler draws other random numbers, of the same law, than Python.

        Inductor can leave random numbers to torch, but takes apart the operations that compare them
        with a probability.
        """
        drawn = ("bernoulli", "dropout")
        targets = [str(node.target) for node in self.graph.graph.nodes]
        return any(name in target for target in targets for name in drawn)

    @property
    def inputs(self) -> list[Tensor]:
        """All inputs of the graph but the arguments."""
        return [*self.footprint.tensors, *self.constants]

    def other_loss(self, loss: Tensor) -> str | None:
        """How a compiled loss under the same random numbers differs; None if it does not."""
        return None if self.is_redrawn else difference(loss.detach(), self.loss)

    def other_gradient(self, gradient: Sequence[Tensor | None]) -> str | None:
        """How the gradient of a compiled loss differs; None if it does not."""
        if self.is_redrawn:
            return None
        for mine, theirs in zip(gradient, self.gradient, strict=True):
            mine, theirs = _or_zero(mine, theirs), _or_zero(theirs, mine)
            if not _close(mine, theirs):
                error = float((mine - theirs).abs().max())
                return f"a gradient {tuple(mine.shape)} differs from Python's by {error:.3g}"
        return None


def record(
    elbo: ELBO,
    model: Program,
    guide: Program | None,
    args: tuple = (),
    kwargs: dict | None = None,
    *,
    found: Footprint,
    parts: bool = False,
) -> Recording:
    """Record the loss of a pair on some arguments, once its tensors are `found`.

    The pair is run twice, and the recording is compared with the first run in value and gradient.
    Buffers and random numbers are as they were afterwards.

    Raises:
        NotRecordable: With the reason, if the pair can't be recorded.
        Exception: What the pair itself raises.
    """
    kwargs = kwargs or {}
    names: list[str] = []

    def outputs(args: tuple, kwargs: dict) -> list[Tensor]:
        loss, by_name = loss_and_parts(elbo, model, guide, args, kwargs, parts=parts)
        names[:] = list(by_name)
        return [loss, *by_name.values()]

    leaves, spec = tree_flatten((args, kwargs))
    tensors = tensors_of(args, kwargs)

    def function(*given: Tensor) -> list[Tensor]:
        rest = iter(given)
        filled = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return outputs(*tree_unflatten(filled, spec))

    with torch.enable_grad():
        with untouched_random_state(args, kwargs), unchanged(found.states):
            loss = outputs(args, kwargs)[0]
            if not loss.requires_grad:
                raise NotRecordable("its loss has no gradient")
            gradient = torch.autograd.grad(loss, found.parameters, allow_unused=True)
        with untouched_random_state(args, kwargs), unchanged(found.states):
            try:
                graph, constants = trace(function, found.tensors, tensors)
            except Exception as error:
                raise NotRecordable(reason_of(error)) from error
        loss = loss.detach().to(_precision(found.parameters))
        recording = Recording(graph, found, constants, tuple(names), loss, gradient)
        with untouched_random_state(args, kwargs), unchanged(found.states):
            try:
                ours = graph(*recording.inputs, *tensors)[0]
                by_parameters = torch.autograd.grad(ours, found.parameters, allow_unused=True)
                reason = recording.other_loss(ours) or recording.other_gradient(by_parameters)
            except RuntimeError as error:  # an operation whose gradient Python alone knows
                raise NotRecordable(reason_of(error)) from error
    if reason is not None:
        raise NotRecordable(reason)
    return recording


def _precision(parameters: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the least precise of some tensors."""
    return max((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps)


def find(
    elbo: ELBO,
    model: Program,
    guide: Program | None,
    args: tuple = (),
    kwargs: dict | None = None,
) -> Footprint:
    """Find the tensors of a pair in a run; buffers and random numbers are as they were afterwards.

    Pyro's objectives draw random numbers of their own in their first run, which this one may be.
    """

    def run() -> Any:
        return loss_and_parts(elbo, model, guide, args, kwargs, parts=False)

    with torch.enable_grad(), untouched_random_state(args, kwargs or {}):
        return footprint(run, model, guide, *modules_of_objective(elbo))


class NotRecordable(Exception):  # noqa: N818 - a reason to go on in Python, not an error
    """Why a program is not, or not only, a function of tensors."""


@contextmanager
def unchanged(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put tensors back as they were, in place."""
    values = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


@contextmanager
def undone(inputs: Sequence[Tensor], changed: Sequence[Tensor]) -> Iterator[None]:
    """Run a graph to see what it does: what it changes, and random numbers, are put back."""
    with torch.no_grad(), untouched_random_state(tuple(inputs)), unchanged(changed):
        yield


def tensors_of(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors in arguments, in order."""
    return [leaf for leaf in _flat(args, kwargs)[0] if isinstance(leaf, Tensor)]


def kind_of(args: tuple, kwargs: dict) -> Hashable:
    """What decides about the graph of some arguments: their layout, and values of no tensor.

    The precision that ``torch.autocast`` asks for belongs to it.

    Raises:
        TypeError: If an argument is neither a tensor nor hashable.
    """
    leaves, spec = _flat(args, kwargs)
    key = tuple(_kind(leaf) for leaf in leaves), spec, _autocast()
    hash(key)
    return key


def _flat(args: tuple, kwargs: dict) -> tuple[Sequence[Any], Hashable]:
    """What arguments are made of, and how."""
    if not kwargs and all(isinstance(a, Tensor) for a in args):
        return args, None  # what small steps would else spend a tenth of their time on
    return tree_flatten((args, kwargs))


def settings_of(elbo: ELBO, found: Footprint | None) -> Hashable:
    """What else decides: numbers and tensors that the objective has, and the mode of each module.

    A tensor is what it is and not its value, which a graph reads.
    """
    values = vars(elbo).items()
    plain = tuple(
        (k, id(v) if isinstance(v, Tensor) else v)
        for k, v in values
        if isinstance(v, numbers.Number | str | Tensor)
    )
    modes = () if found is None else tuple(m.training for m in found.modules)
    wrapped = tuple(settings_of(v, None) for v in vars(elbo).values() if isinstance(v, ELBO))
    return plain, modes, wrapped


def _autocast() -> Hashable:
    """The precision that operations on each kind of device are to have; None for their own."""
    return tuple(
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in ("cpu", "cuda")
    )


def _kind(leaf: Any) -> Hashable:
    return kind_of_tensor(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def difference(loss: Tensor, python: Tensor) -> str | None:
    """How a loss differs from that of Python, in words; None if it does not."""
    if _close(loss, python):
        return None
    return f"the loss is {float(loss):.8g} where Python's is {float(python):.8g}"


def _close(value: Tensor, reference: Tensor) -> bool:
    """Whether two results agree but for rounding, relative to the largest entry.

    Sums in another order differ by some roundings for each of their terms, of which a loss over a
    minibatch has up to millions; the square root of the precision leaves room for these and for
    nothing else: 3e-4 in single precision, 1.5e-8 in double precision.
    """
    precision = torch.finfo(reference.dtype).eps ** 0.5
    both_nan = value.isnan() & reference.isnan()
    error = torch.where(both_nan, 0.0, value - reference).abs().amax()
    return bool(error <= precision * (1e-3 + reference.nan_to_num().abs().amax()))


def _or_zero(value: Tensor | None, other: Tensor | None) -> Tensor:
    if value is not None:
        return value
    return torch.zeros(()) if other is None else torch.zeros_like(other)


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or what it comes down to."""
    text = str(error).strip() or type(error).__name__
    if "_local_scalar_dense" in text:  # how a tracer says it
        return f"its Python looks at the value of a tensor{_place_of(error)}"
    return text.splitlines()[0].rstrip(".")


def _place_of(error: BaseException) -> str:
    """Where in the user's own code an error comes from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    if not frames:
        return ""
    return f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})"


def _is_library(path: str) -> bool:
    return any(Path(path).is_relative_to(home) for home in _LIBRARIES)
