"""The graph of whole training steps: made from a recorded loss, and run on the tensors in place."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_lvm.compiled.cuda_graph import on_cuda
from pyro_lvm.compiled.inductor import Backend
from pyro_lvm.compiled.recording import Recording, undone
from pyro_lvm.compiled.updates import Rule, rule_of

__all__ = ["Clip", "StepGraph"]


class Clip(NamedTuple):
    """Bounds of a gradient: on its norm, then on each entry; None for no bound."""

    norm: float | None = None
    value: float | None = None

    def __call__(self, gradient: list[Tensor]) -> list[Tensor]:
        """The gradient within its bounds, as torch's ``clip_grad_norm_`` and ``_value_`` do it."""
        if self.norm is not None:
            total = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
            factor = (self.norm / (total + 1e-6)).clamp(max=1.0)  # torch's constant
            gradient = [g * factor for g in gradient]
        if self.value is not None:
            gradient = [g.clamp(-self.value, self.value) for g in gradient]
        return gradient


class _Tensors(NamedTuple):
    """The inputs of the graph, in order; what it changes comes first.

    Attributes:
        parameters: Those that are trained.
        slots: What the optimiser keeps for each of them.
        factors: What the updates of each step multiply by, see `_Factors`.
        rest: Other inputs of the loss: states, parameters that are not trained, constants.
        rows: The rows of each step's minibatch, ``num_steps x B``; none if it is the data.
        data: The tensors among the arguments.
    """

    parameters: list[Tensor]
    slots: list[dict[str, Tensor]]
    factors: Tensor
    rest: list[Tensor]
    rows: list[Tensor]
    data: list[Tensor]


class StepGraph:
    """As many steps as asked for, as one function that changes the tensors of pair and optimiser.

    Args:
        recording: The loss.
        optimizer: The optimiser, whose state is made here where it is not there yet.
        index: Rows of the data, ``num_steps x B``; None if a step sees the data as they are.
        data: The tensors among the arguments.
        num_steps: How many steps.
        divisor: What the loss is divided by before its gradient is taken.
        clip: Bounds of the gradient.
        backend: From a graph and its inputs to a function that runs it.

    Raises:
        ValueError: If the optimiser's update is none that is known here, if nothing is trained, or
            if the compiled loss is not the recorded one.
    """

    def __init__(
        self,
        recording: Recording,
        optimizer: Optimizer,
        *,
        index: Tensor | None,
        data: list[Tensor],
        num_steps: int,
        divisor: float,
        clip: Clip,
        backend: Backend,
    ) -> None:
        self.recording, self.optimizer, self.num_steps = recording, optimizer, num_steps
        self.rules = [rule_of(optimizer, group) for group in optimizer.param_groups]
        self._state = optimizer.state
        group_of = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        self.is_trained = [
            id(p) in group_of and gradient is not None
            for p, gradient in zip(recording.footprint.parameters, recording.gradient, strict=True)
        ] + [False] * (len(recording.inputs) - len(recording.gradient))
        self.trained = [p for p, yes in zip(recording.inputs, self.is_trained, strict=True) if yes]
        if not self.trained:
            raise ValueError("Expected an optimiser of parameters that the loss depends on")
        groups = [group_of[id(p)] for p in self.trained]
        slots = [
            _slots(optimizer, p, self.rules[group])
            for p, group in zip(self.trained, groups, strict=True)
        ]
        self.factors = _Factors(optimizer, self.rules, self.trained, groups, num_steps)
        self.tensors = _Tensors(
            parameters=self.trained,
            slots=slots,
            factors=self.factors.table,
            rest=[t for t, yes in zip(recording.inputs, self.is_trained, strict=True) if not yes],
            rows=[] if index is None else [index],
            data=data,
        )
        steps = _steps_function(
            recording,
            self.is_trained,
            [self.rules[group] for group in groups],
            self.factors.lines,
            num_steps=num_steps,
            divisor=divisor,
            clip=clip,
        )
        self._compile(steps, backend)

    def __call__(self, index: Tensor | None, data: list[Tensor]) -> Tensor:
        """Take the steps; returns each one's loss and parts, ``num_steps x (1 + parts)``."""
        self.factors.fill()
        given = data if index is None else [index, *data]
        with torch.no_grad():
            (table,) = self.run(*self.fixed, *given)
        self.factors.count()
        self.optimizer._opt_called = True  # type: ignore[attr-defined] # what schedulers look for
        return table

    def is_current(self) -> bool:
        """Whether pair and optimiser still hold the tensors that this graph changes."""
        return self.recording.footprint.is_current() and self.optimizer.state is self._state

    def _compile(self, steps: Callable[[_Tensors], Tensor], backend: Backend) -> None:
        inputs, spec = tree_flatten(self.tensors)
        num_given = len(self.tensors.data) + len(self.tensors.rows)
        self.fixed = inputs[: len(inputs) - num_given]
        changed = [
            *inputs[: len(inputs) - num_given - len(self.tensors.rest)],
            *self.recording.footprint.states,
        ]

        with undone(inputs, changed):
            graph = make_fx(
                lambda *flat: [steps(tree_unflatten(list(flat), spec))], tracing_mode="fake"
            )(*inputs)
            self.run = backend(graph, inputs)
        with undone(inputs, changed):
            (table,) = self.run(*inputs)
        reason = self.recording.other_loss(table[0, 0])
        if reason is not None:
            raise ValueError(reason)
        # rows change from call to call, and the data that they are rows of do not
        copied = range(len(self.fixed), len(self.fixed) + (len(self.tensors.rows) or num_given))
        self.run = on_cuda(self.run, inputs, copied=copied, undone=partial(undone, inputs, changed))


class _Factors:
    """What the updates of the next steps multiply by: numbers of the host, as one tensor.

    Steps and learning rates are counted by the host, in double precision. A graph that computed the
    factors from them would do so for every entry of every parameter.

    Attributes:
        table: ``num_steps x lines x factors``, where the graph reads them.
        lines: For each parameter the line that is its own; parameters of a group that have taken as
            many steps share one.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rules: list[Rule],
        trained: list[Tensor],
        groups: list[int],
        num_steps: int,
    ) -> None:
        self.optimizer, self.rules, self.trained = optimizer, rules, trained
        states = [optimizer.state[p] for p in trained]
        taken = [int(state.get("step", 0)) for state in states]
        kinds = list(dict.fromkeys(zip(groups, taken, strict=True)))
        self.lines = [kinds.index(kind) for kind in zip(groups, taken, strict=True)]
        self.groups = [group for group, _ in kinds]
        self.taken = [count for _, count in kinds]
        width = max(rule.num_factors for rule in rules)
        is_double = any(p.dtype == torch.float64 for p in trained)
        dtype = torch.float64 if is_double else torch.float32
        self.on_host = torch.zeros(num_steps, len(kinds), width, dtype=dtype)
        self.table = self.on_host.to(trained[0].device)
        self.values = self.on_host.numpy()  # numbers get into it in no time
        self.counters = [s["step"] for s in states if isinstance(s.get("step"), Tensor)]
        self.fill()

    def fill(self) -> None:
        """Compute them for the next steps, from the rates and momenta as they are."""
        for line, (group, taken) in enumerate(zip(self.groups, self.taken, strict=True)):
            rule, settings = self.rules[group], self.optimizer.param_groups[group]
            rate = float(settings["lr"])
            for i, values in enumerate(self.values[:, line]):
                rate *= rule.decay
                factors = rule.factors(settings, taken + i + 1, rate)
                values[: len(factors)] = factors
        if self.table is not self.on_host:
            self.table.copy_(self.on_host, non_blocking=True)

    def count(self) -> None:
        """Say in the optimiser's own state, and in its groups, how many steps were taken."""
        num_steps = len(self.values)
        self.taken = [count + num_steps for count in self.taken]
        if self.counters:
            torch._foreach_add_(self.counters, num_steps)
        else:
            for p in self.trained:
                if "step" in self.optimizer.state[p]:
                    self.optimizer.state[p]["step"] += num_steps
        for rule, group in zip(self.rules, self.optimizer.param_groups, strict=True):
            for _ in range(num_steps if rule.decay != 1 else 0):
                group["lr"] *= rule.decay


def _steps_function(
    recording: Recording,
    is_trained: list[bool],
    rules: list[Rule],
    lines: list[int],
    *,
    num_steps: int,
    divisor: float,
    clip: Clip,
) -> Callable[[_Tensors], Tensor]:
    """The steps as a function of tensors, which it changes in place.

    Args:
        recording: The loss.
        is_trained: For each input of the loss, whether it is trained.
        rules: The update of each parameter.
        lines: The line of each parameter among the factors.
        num_steps: How many steps.
        divisor: What the loss is divided by.
        clip: Bounds of the gradient.
    """

    def one_step(now: _Tensors, batch: list[Tensor], factors: Tensor) -> tuple[_Tensors, Tensor]:
        leaves = [p.detach().requires_grad_() for p in now.parameters]
        trained, rest = iter(leaves), iter(now.rest)
        with torch.enable_grad():
            inputs = [next(trained) if yes else next(rest) for yes in is_trained]
            outputs = recording.graph(*inputs, *batch)
            gradient = torch.autograd.grad(outputs[0] / divisor, leaves)
        is_finite = outputs[0].detach().isfinite()  # a step that is lost leaves all as it was
        parameters, slots = [], []
        for p, g, slot, rule, line in zip(
            now.parameters, clip(list(gradient)), now.slots, rules, lines, strict=True
        ):
            mine = factors[line].to(p.dtype).unbind()[: rule.num_factors]
            new, state = rule.update(p.detach(), g, slot, mine)
            parameters.append(torch.where(is_finite, new, p.detach()))
            slots.append({n: torch.where(is_finite, v, slot[n]) for n, v in state.items()})
        row = torch.stack([o.detach().to(outputs[0].dtype) for o in outputs])
        return now._replace(parameters=parameters, slots=slots), row

    def steps(start: _Tensors) -> Tensor:
        now, rows = start, []
        for i in range(num_steps):
            batch = [d[start.rows[0][i]] for d in start.data] if start.rows else start.data
            now, row = one_step(now, batch, start.factors[i])
            rows.append(row)
        for old, new in zip(tree_flatten(start[:2])[0], tree_flatten(now[:2])[0], strict=True):
            old.copy_(new)
        return torch.stack(rows)

    return steps


def _slots(optimizer: Optimizer, p: Tensor, rule: Rule) -> dict[str, Tensor]:
    """What an optimiser keeps for a parameter, made as it would make it where it is missing."""
    state = optimizer.state[p]
    if rule.first_count is not None and "step" not in state:
        state["step"] = rule.first_count(p)
    for name in rule.state_names:
        if state.get(name) is None:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return {name: state[name] for name in rule.state_names}
