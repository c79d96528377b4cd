"""The loss of a pair as compiled tensor operations: a module that any training loop can use."""

import warnings
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyro_lvm.compiled.inductor import Backend, compile_graph
from pyro_lvm.compiled.loss_graph import LossGraph
from pyro_lvm.compiled.objective import (
    check_differentiable,
    loss_and_parts,
    modules_of_objective,
)
from pyro_lvm.compiled.recording import (
    NotRecordable,
    find,
    kind_of,
    reason_of,
    record,
    settings_of,
    tensors_of,
)
from pyro_lvm.compiled.tracing import Footprint
from pyro_lvm.pair import Program, modules_of

__all__ = ["CompiledLoss", "compile"]

_MOST_GRAPHS = 16  # kinds of arguments in one module; each takes seconds to compile


def compile(
    elbo: ELBO, model: Program, guide: Program | None, *, backend: Backend | None = None
) -> "CompiledLoss":
    """Compile the loss of a pair.

    The result is a module: ``loss = module(*args)`` is the loss of ``elbo`` on these arguments, in
    nats over all data, and ``loss.backward()`` its gradient, as with ``elbo.differentiable_loss``.
    Any optimiser, gradient clipping or scheduler works on it.

    The first call with arguments of a kind (shapes, dtypes, devices; for all else but tensors, the
    values) runs the pair in Python, records its tensor operations, compiles them, and compares
    value and gradient with those of Python under the same random numbers. If a pair can't be
    recorded, or does not agree, a warning says why, once, and these arguments go on in Python.

    What is recorded is one run. Python that counts calls, or looks at anything but tensors, is
    frozen as it was then; a weight that changes belongs into a schedule, or into a tensor that is
    changed in place.
    The training mode of modules, and the numbers that the objective has as attributes, are looked
    at in every call, and each of their values has a graph of its own.

    Args:
        elbo: An objective of ours, or of Pyro's with a differentiable loss, or ``TraceGraph_ELBO``.
        model: The model.
        guide: The guide, or None if it samples nothing.
        backend: From a graph and its inputs to a function that runs it, as ``torch.compile`` asks
            for; Inductor if None, on CUDA as a CUDA graph.

    Returns:
        The loss as a module.

    Raises:
        TypeError: If the objective has no differentiable loss.
    """
    return CompiledLoss(elbo, model, guide, backend=backend)


class CompiledLoss(nn.Module):
    """The loss of a pair, compiled; made by `compile`.

    Its parameters are those of the pair, the param store's among them, complete after the first
    call or ``initialize``.

    Attributes:
        fallback_reason: Why some arguments run in Python; None if all are compiled.
    """

    def __init__(
        self, elbo: ELBO, model: Program, guide: Program | None, *, backend: Backend | None = None
    ) -> None:
        super().__init__()
        check_differentiable(elbo)
        self.elbo, self.programs, self.backend = elbo, (model, guide), backend or compile_graph
        self.owners = nn.ModuleList(modules_of(model, guide, *modules_of_objective(elbo)))
        self.fallback_reason: str | None = None
        self._footprint: Footprint | None = None
        self._losses: dict[Hashable, LossGraph | None] = {}

    def initialize(self, *args: Any, **kwargs: Any) -> "CompiledLoss":
        """Compile for arguments of this kind; random numbers and buffers stay as they were."""
        with torch.enable_grad():
            self._compiled(args, kwargs, False)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, a scalar, in nats over all data."""
        return self._run(args, kwargs, False)[0]

    def loss_and_parts(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the parts that the objective reports, per datum and without gradient."""
        return self._run(args, kwargs, True)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """The parameters of the pair's modules, then those that only the param store has."""
        seen = set()
        for name, parameter in super().named_parameters(*args, **kwargs):
            seen.add(id(parameter))
            yield name, parameter
        for i, leaf in enumerate(self._footprint.parameters if self._footprint else []):
            if id(leaf) not in seen:
                yield f"param_store.{i}", leaf

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_losses": {}, "_footprint": None}  # graphs are made again

    def _run(self, args: tuple, kwargs: dict, parts: bool) -> tuple[Tensor, dict[str, Tensor]]:
        compiled = self._compiled(args, kwargs, parts)
        if compiled is None:
            return loss_and_parts(self.elbo, *self.programs, args, kwargs, parts=parts)
        loss, *parts_of_it = compiled(tensors_of(args, kwargs))
        return loss, dict(zip(compiled.recording.names, parts_of_it, strict=True))

    def _compiled(self, args: tuple, kwargs: dict, parts: bool) -> LossGraph | None:
        if self._footprint is not None and not self._footprint.is_current():
            self._losses.clear()
        try:
            kind = parts, torch.is_grad_enabled(), kind_of(args, kwargs)
        except TypeError as error:
            self._fall_back(f"an argument is neither a tensor nor hashable ({error})")
            return None
        key = kind, settings_of(self.elbo, self._footprint)
        if key not in self._losses:
            if len(self._losses) >= _MOST_GRAPHS:
                self._fall_back(f"{_MOST_GRAPHS} kinds of arguments have a graph already")
                return None
            is_differentiable = torch.is_grad_enabled()
            with torch.inference_mode(False):
                args, kwargs = tree_map(_outside_inference_mode, (args, kwargs))
                compiled = self._compile(args, kwargs, parts, is_differentiable)
            # the first run has found the modules whose modes belong to the key
            self._losses[kind, settings_of(self.elbo, self._footprint)] = compiled
            return compiled
        return self._losses[key]

    def _compile(
        self, args: tuple, kwargs: dict, parts: bool, is_differentiable: bool
    ) -> LossGraph | None:
        found = self._footprint = find(self.elbo, *self.programs, args, kwargs)
        try:
            recording = record(self.elbo, *self.programs, args, kwargs, found=found, parts=parts)
        except NotRecordable as error:
            self._fall_back(str(error))
            return None
        try:
            return LossGraph(
                recording,
                tensors_of(args, kwargs),
                differentiable=is_differentiable,
                backend=self.backend,
            )
        except Exception as error:  # a compiler fails in its own ways, or is not there
            self._fall_back(reason_of(error))
            return None

    def _fall_back(self, reason: str) -> None:
        if self.fallback_reason is None:
            self.fallback_reason = reason
            warnings.warn(f"This pair is not compiled, but run in Python: {reason}.", stacklevel=6)


def _outside_inference_mode(leaf: Any) -> Any:
    """A tensor that gradients can be computed with."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf
