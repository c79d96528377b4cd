"""Whole training steps as one graph: loss, gradient and the optimiser's update."""

import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from pyro_lvm.checks import check_count, check_data, check_positive
from pyro_lvm.compiled.inductor import Backend, compile_graph
from pyro_lvm.compiled.objective import (
    check_differentiable,
    loss_and_parts,
    modules_of_objective,
    with_own_rates,
)
from pyro_lvm.compiled.recording import (
    NotRecordable,
    Recording,
    difference,
    find,
    kind_of,
    reason_of,
    record,
    settings_of,
    tensors_of,
    unchanged,
)
from pyro_lvm.compiled.step_graph import Clip, StepGraph
from pyro_lvm.compiled.tracing import Footprint
from pyro_lvm.pair import (
    Program,
    no_guide,
    parameters_of,
    plate_size,
    untouched_random_state,
)

__all__ = ["CompiledStep"]

_SCHEDULED = {  # of a group of parameters, as torch's schedulers write it
    "params",
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "betas",
    "momentum",
    "base_momentum",
    "max_momentum",
}


class CompiledStep:
    """Steps of stochastic variational inference, each or several as one compiled graph.

    A call takes ``num_steps`` steps: it changes the parameters of the pair and the state of the
    optimiser as as many steps in Python would, and returns the losses. Where the time of a step is
    Python's and not that of the tensor operations, that is where a small model gets its speed from.

        step = CompiledStep(elbo, model, guide, lambda p: torch.optim.Adam(p, lr=1e-3))
        for batch in batches:
            losses = step(batch)

    The optimiser stays what it is: its ``state_dict`` is up to date after every call, and learning
    rates and momenta are read from its groups in every call, so that schedulers work (a rate holds
    for all steps of a call, and so does the weight of a `Schedule`). A step whose loss is not
    finite changes no parameter. What can't be recorded runs in Python, and a warning says why,
    once; see `compile` for what recording means.

    Args:
        elbo: An objective of ours, or of Pyro's with a differentiable loss, or ``TraceGraph_ELBO``.
        model: The model.
        guide: The guide, or None if it samples nothing.
        optimizer: A torch optimiser over parameters of the pair, or a function that makes one from
            all of them; ``Adam`` with a rate of 1e-3 if None. The parameters of a divergence with a
            ``learning_rate`` are then a second group, with that rate. Adam, AdamW, SGD and Pyro's
            ClippedAdam are part of the graph; others run in Python.
        num_steps: How many steps a call takes.
        batch_size: Where the arguments are all data: the size of the minibatches, which are drawn
            on their device without replacement, epoch by epoch, the plate scaled to all data. None
            if the arguments are what a step sees.
        plate: Name of the data plate, for ``batch_size``.
        divisor: What the loss is divided by before its gradient is taken; ``N`` for a gradient in
            nats per datum.
        clip_norm: The largest norm of the whole gradient; no limit if None.
        clip_value: The largest entry of the gradient; no limit if None.
        parts: Whether to compute the parts that the objective reports.
        backend: From a graph and its inputs to a function that runs it; Inductor if None, on CUDA
            as a CUDA graph.

    Attributes:
        optimizer: The optimiser; None before the first call if it is to be made.
        names: What the parts are called.
        fallback_reason: Why some calls run in Python; None if all are compiled.

    Raises:
        TypeError: If the objective has no differentiable loss.
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        elbo: ELBO,
        model: Program,
        guide: Program | None,
        optimizer: Optimizer | Callable[[Iterable[Tensor]], Optimizer] | None = None,
        *,
        num_steps: int = 1,
        batch_size: int | None = None,
        plate: str = "data",
        divisor: float = 1.0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        parts: bool = False,
        backend: Backend | None = None,
    ) -> None:
        check_differentiable(elbo)
        check_count("num_steps", num_steps)
        check_positive("divisor", divisor)
        for name, bound in (("clip_norm", clip_norm), ("clip_value", clip_value)):
            if bound is not None:
                check_positive(name, bound)
        self._given: tuple[Program, Program] = model, no_guide if guide is None else guide
        self.programs: tuple[Program, Program] = self._given
        self.elbo, self.plate = elbo, plate
        self._num_data: int | None = None
        self.names: tuple[str, ...] = ()
        self.fallback_reason: str | None = None
        if isinstance(optimizer, Optimizer):
            self.optimizer: Optimizer | None = optimizer
            self._make_optimizer: Callable[[Iterable[Tensor]], Optimizer] = _adam
        else:
            self.optimizer, self._make_optimizer = None, optimizer or _adam
        self._num_steps, self._parts, self._divisor = num_steps, parts, divisor
        self._clip = Clip(clip_norm, clip_value)
        self._backend = backend or compile_graph
        self._draws = None if batch_size is None else _Draws(num_steps, batch_size)
        self._footprint: Footprint | None = None
        self._recording: Recording | None = None  # the last one
        self._recorded_kind: Hashable = None
        self._given_up = False
        self._graphs: dict[Hashable, StepGraph | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take the steps; returns the loss of each, ``num_steps``, in nats over all data."""
        return self.table(*args, **kwargs)[:, 0]

    def table(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take the steps; returns each one's loss and parts, ``num_steps x (1 + parts)``.

        The columns after the first are called ``names``, and are per datum.
        """
        if self._draws is None:
            return self.take(None, *args, **kwargs)
        index = self._draws(args)
        size = len(args[0])
        if size != self._num_data:
            model, guide = (plate_size(p, size, plate=self.plate) for p in self._given)
            self.programs = model, guide
            self._num_data = size
        return self.take(index, *args, **kwargs)

    def take(self, index: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Take one step for each row of an index into the arguments; returns what ``table`` does.

        Args:
            index: ``num_steps x B``, rows of all arguments; None if a step sees the arguments.
            *args: Tensors whose first dimension is the data, if there is an index.
            **kwargs: Further arguments of model and guide.
        """
        graph = self._graph(index, args, kwargs)
        if graph is not None:
            return graph(index, tensors_of(args, kwargs))
        batches = [args] * self._num_steps if index is None else [_rows(args, i) for i in index]
        return torch.stack([self._step_in_python(batch, kwargs) for batch in batches])

    def check(self, *args: Any, **kwargs: Any) -> str | None:
        """Compare what was recorded with Python as it is now, on the arguments of one step.

        Both losses are computed under the same random numbers, which stay as they were, and so do
        buffers. Python that counts calls, or a number that has changed, shows here.

        Returns:
            How they differ; None if they do not, or if nothing was recorded.
        """
        if self._recording is None or not self._recording.footprint.is_current():
            return None
        states = self._recording.footprint.states
        with torch.enable_grad(), untouched_random_state(args, kwargs), unchanged(states):
            python = loss_and_parts(self.elbo, *self.programs, args, kwargs, parts=self._parts)[0]
        inputs = [*self._recording.inputs, *tensors_of(args, kwargs)]
        if kind_of(args, kwargs) != self._recorded_kind:
            return None
        with torch.no_grad(), untouched_random_state(args, kwargs), unchanged(states):
            recorded = self._recording.graph(*inputs)[0]
        return difference(recorded, python.detach().to(self._recording.loss.dtype))

    def give_up(self, reason: str) -> None:
        """Run in Python from now on, and say why."""
        self._given_up = True
        self._fall_back(reason, stacklevel=3)

    def _graph(self, index: Tensor | None, args: tuple, kwargs: dict) -> StepGraph | None:
        """The graph for these arguments; None if they run in Python."""
        if self._given_up:
            return None
        try:
            kind = None if index is None else index.shape, kind_of(args, kwargs)
        except TypeError as error:
            self._optimizer_for(args, kwargs)
            self._fall_back(f"an argument is neither a tensor nor hashable ({error})")
            return None
        key = kind, self._settings()
        graph = self._graphs.get(key)
        if key in self._graphs and (graph is None or graph.is_current()):
            return graph
        graph = self._compile(index, args, kwargs)
        # the first run has found the modules, and made the optimiser, that belong to the key
        self._graphs[kind, self._settings()] = graph
        return graph

    def _compile(self, index: Tensor | None, args: tuple, kwargs: dict) -> StepGraph | None:
        example = args if index is None else _rows(args, index[0])
        optimizer = self._optimizer_for(example, kwargs)
        found = self._footprint = find(self.elbo, *self.programs, example, kwargs)
        try:
            recording = record(
                self.elbo, *self.programs, example, kwargs, found=found, parts=self._parts
            )
        except NotRecordable as reason:
            self._fall_back(str(reason))
            return None
        self.names = recording.names
        self._recording, self._recorded_kind = recording, kind_of(example, kwargs)
        try:
            return StepGraph(
                recording,
                optimizer,
                index=index,
                data=tensors_of(args, kwargs),
                num_steps=self._num_steps,
                divisor=self._divisor,
                clip=self._clip,
                backend=self._backend,
            )
        except Exception as error:  # a compiler fails in its own ways, or is not there
            self._fall_back(reason_of(error))
            return None

    def _optimizer_for(self, args: tuple, kwargs: dict) -> Optimizer:
        if self.optimizer is None:
            found = parameters_of(*self.programs, args, kwargs)
            for module in modules_of_objective(self.elbo):
                found += [p for p in module.parameters() if p.requires_grad]
            each_once = {id(p): p for p in found}.values()
            parameters, others = with_own_rates(self.elbo, each_once)
            self.optimizer = self._make_optimizer(parameters)
            for group in others:
                self.optimizer.add_param_group(group)
        return self.optimizer

    def _step_in_python(self, batch: tuple, kwargs: dict) -> Tensor:
        """One step as a training loop takes it."""
        optimizer = self._optimizer_for(batch, kwargs)
        optimizer.zero_grad()
        loss, parts = loss_and_parts(self.elbo, *self.programs, batch, kwargs, parts=self._parts)
        (loss / self._divisor).backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._clip.norm is not None:
            clip_grad_norm_(parameters, self._clip.norm)
        if self._clip.value is not None:
            clip_grad_value_(parameters, self._clip.value)
        if torch.isfinite(loss):
            optimizer.step()
        self.names = tuple(parts)
        return torch.stack([loss.detach(), *(v.to(loss) for v in parts.values())])

    def _settings(self) -> Hashable:
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return settings_of(self.elbo, self._footprint), tuple(_settings_of(g) for g in groups)

    def _fall_back(self, reason: str, stacklevel: int = 6) -> None:
        if self.fallback_reason is None:
            self.fallback_reason = reason
            text = f"These steps are not compiled, but run in Python: {reason}."
            warnings.warn(text, stacklevel=stacklevel)


class _Draws:
    """Minibatches without replacement, epoch by epoch, on the device of the data."""

    def __init__(self, num_steps: int, batch_size: int) -> None:
        check_count("batch_size", batch_size)
        self.shape, self.wanted = (num_steps, batch_size), num_steps * batch_size
        self.order = torch.empty(0, dtype=torch.long)
        self.position = 0
        self.data: Tensor | None = None

    def __call__(self, data: tuple) -> Tensor:
        """The rows of the next steps, ``num_steps x B``; what is left of an epoch is left out."""
        first = data[0] if data else None
        if first is None or first is not self.data:
            self.data = check_data("data", first)  # looks at all values, hence not in every call
        size = len(self.data)
        if size < self.wanted:
            raise ValueError(
                f"Expected data for {self.shape[0]} minibatches of {self.shape[1]} in a call; got "
                f"{size}. Take fewer steps in a call, or smaller minibatches."
            )
        fresh = self.position + self.wanted > len(self.order)
        if fresh or len(self.order) != size or self.order.device != data[0].device:
            self.order, self.position = torch.randperm(size, device=data[0].device), 0
        start, self.position = self.position, self.position + self.wanted
        return self.order[start : self.position].view(self.shape)


def _adam(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def _rows(data: tuple, index: Tensor) -> tuple:
    return tuple(d[index] for d in data)


def _settings_of(group: dict[str, Any]) -> Hashable:
    """What of a group is part of a graph: all but its parameters and what a schedule changes."""
    settings = ((k, v) for k, v in group.items() if k not in _SCHEDULED)
    return len(group["params"]), bool(group.get("momentum")), tuple(settings)
