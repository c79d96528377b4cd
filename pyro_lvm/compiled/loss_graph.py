"""The graph of a loss and its gradient: made from a recorded loss, and differentiable as a whole.

Both are computed in one run of one graph, and what is left of the backward pass is to multiply the
gradient by that of the loss. Where no gradient is asked for, the graph is that of the loss alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_lvm.compiled.cuda_graph import on_cuda
from pyro_lvm.compiled.inductor import Backend
from pyro_lvm.compiled.recording import Recording, undone

__all__ = ["LossGraph"]


class LossGraph:
    """A recorded loss, compiled, with its gradient by all inputs that require one.

    Args:
        recording: The loss.
        data: The tensors among the arguments.
        differentiable: Whether to compute the gradient.
        backend: From a graph and its inputs to a function that runs it.

    Raises:
        ValueError: If the compiled loss or its gradient is not the recorded one.
    """

    def __init__(
        self, recording: Recording, data: list[Tensor], *, differentiable: bool, backend: Backend
    ) -> None:
        self.recording = recording
        inputs, states = [*recording.inputs, *data], recording.footprint.states
        asked = [i for i, t in enumerate(inputs) if differentiable and t.requires_grad]
        self.positions: list[int] = []  # of the inputs that the gradient is by
        with undone(inputs, states):
            graph = make_fx(self._function(asked), tracing_mode="fake")(*inputs)
            self.run = backend(graph, inputs)
        with undone(inputs, states):
            self._check(inputs)
        copied = range(len(recording.inputs), len(inputs))
        self.run = on_cuda(self.run, inputs, copied=copied, undone=partial(undone, inputs, states))

    def __call__(self, data: list[Tensor]) -> Sequence[Tensor]:
        """The loss and its parts, of which the loss is differentiable."""
        inputs = [*self.recording.inputs, *data]
        if not self.positions:
            with torch.no_grad():
                return self.run(*inputs)
        return _Loss.apply(self.run, self.positions, *inputs)

    def _function(self, asked: list[int]) -> Callable[..., list[Tensor]]:
        """From the inputs to the loss, its parts, and the gradient by those that it depends on."""

        def function(*inputs: Tensor) -> list[Tensor]:
            given = list(inputs)
            for i in asked:
                given[i] = inputs[i].detach().requires_grad_()
            with torch.set_grad_enabled(bool(asked)):
                outputs = self.recording.graph(*given)
            leaves = [given[i] for i in asked]
            gradient: Sequence[Tensor | None] = ()
            if asked:
                gradient = torch.autograd.grad(outputs[0], leaves, allow_unused=True)
            found = {i: g for i, g in zip(asked, gradient, strict=True) if g is not None}
            self.positions = list(found)
            return [*(o.detach() for o in outputs), *found.values()]

        return function

    def _check(self, inputs: list[Tensor]) -> None:
        loss, *rest = self.run(*inputs)
        reason = self.recording.other_loss(loss)
        if reason is None and self.positions:
            gradient = dict(zip(self.positions, rest[len(self.recording.names) :], strict=True))
            parameters = range(len(self.recording.gradient))
            reason = self.recording.other_gradient([gradient.get(i) for i in parameters])
        if reason is not None:
            raise ValueError(reason)


class _Loss(torch.autograd.Function):
    """A graph that returns a loss, its parts, and its gradient by the inputs at ``positions``."""

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Sequence[Tensor]], positions: list[int], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = run(*inputs)
        loss, *parts = outputs[: -len(positions)]
        ctx.positions, ctx.num_inputs = positions, len(inputs)
        ctx.save_for_backward(*outputs[-len(positions) :])
        ctx.mark_non_differentiable(*parts)
        return loss, *parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        by_inputs: list[Tensor | None] = [None] * ctx.num_inputs
        for i, g in zip(ctx.positions, _scaled(ctx.saved_tensors, by_loss), strict=True):
            by_inputs[i] = g
        return None, None, *by_inputs


def _scaled(gradient: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
    if all(g.device == factor.device for g in gradient):
        return torch._foreach_mul(gradient, factor)  # type: ignore[call-overload]
    return [g * factor.to(g.device) for g in gradient]
