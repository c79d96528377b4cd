"""The updates of torch's optimisers as functions of tensors, for steps that are one graph.

An optimiser keeps its own state and settings: what is here reads them, computes the same update
without Python, and leaves state behind that the optimiser itself can go on from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["Rule", "rule_of"]

State = dict[str, Tensor]
Update = Callable[[Tensor, Tensor, State, Tensor, Tensor], tuple[Tensor, State]]


@dataclass(frozen=True)
class Rule:
    """The update of one group of parameters.

    Attributes:
        state_names: Tensors that the optimiser keeps for each parameter, of its shape.
        update: From a parameter, its gradient, its state, the number of this step (from 1) and the
            learning rate, both scalar tensors, to the new parameter and state.
        decay: What the learning rate is multiplied by before every step.
        first_count: From a parameter to the count of its steps at the start, as the optimiser
            keeps it; None if it does not.
    """

    state_names: tuple[str, ...]
    update: Update
    decay: float = 1.0
    first_count: Callable[[Tensor], Any] | None = None


def rule_of(optimizer: Optimizer, group: Mapping[str, Any]) -> Rule:
    """The update that an optimiser makes for one of its groups.

    Raises:
        ValueError: If there is none here for this optimiser, or for one of its settings.
    """
    make = _RULES.get(type(optimizer))
    if make is None:
        known = sorted(kind.__name__ for kind in _RULES)
        raise ValueError(f"Expected an optimiser among {known}; got {type(optimizer).__name__}.")
    for name in ("amsgrad", "maximize", "differentiable", "centered_variance"):
        if group.get(name):
            raise ValueError(f"Expected {type(optimizer).__name__} without {name}; got it set.")
    return make(group)


def _adam(group: Mapping[str, Any]) -> Rule:
    """Kingma and Ba (2015), algorithm 1, with the weight decay as a penalty."""
    beta1, beta2 = group["betas"]
    eps, penalty = group["eps"], group["weight_decay"]
    # AdamW is an Adam with this flag in newer versions of torch
    decoupled = group.get("decoupled_weight_decay", False)

    def update(
        p: Tensor, gradient: Tensor, state: State, step: Tensor, lr: Tensor
    ) -> tuple[Tensor, State]:
        if penalty and decoupled:
            p = p * (1 - lr * penalty)
        elif penalty:
            gradient = gradient + penalty * p
        first = torch.lerp(state["exp_avg"], gradient, 1 - beta1)
        second = state["exp_avg_sq"] * beta2 + gradient * gradient * (1 - beta2)
        root = second.sqrt() / (1 - beta2**step).sqrt() + eps
        p = p - lr / (1 - beta1**step) * (first / root)
        return p, {"exp_avg": first, "exp_avg_sq": second}

    on_device = group.get("capturable") or group.get("fused")

    def first_count(p: Tensor) -> Tensor:
        return torch.zeros((), device=p.device if on_device else "cpu")

    return Rule(("exp_avg", "exp_avg_sq"), update, first_count=first_count)


def _adamw(group: Mapping[str, Any]) -> Rule:
    """Loshchilov and Hutter (2019), algorithm 2: weight decay beside the gradient."""
    return _adam({**group, "decoupled_weight_decay": True})


def _clipped_adam(group: Mapping[str, Any]) -> Rule:
    """Pyro's: every entry of the gradient clipped, and a learning rate that decays by itself."""
    beta1, beta2 = group["betas"]
    eps, penalty, bound = group["eps"], group["weight_decay"], group["clip_norm"]

    def update(
        p: Tensor, gradient: Tensor, state: State, step: Tensor, lr: Tensor
    ) -> tuple[Tensor, State]:
        gradient = gradient.clamp(-bound, bound)
        if penalty:
            gradient = gradient + penalty * p
        first = state["exp_avg"] * beta1 + gradient * (1 - beta1)
        second = state["exp_avg_sq"] * beta2 + gradient * gradient * (1 - beta2)
        size = lr * (1 - beta2**step).sqrt() / (1 - beta1**step)
        p = p - size * (first / (second.sqrt() + eps))
        return p, {"exp_avg": first, "exp_avg_sq": second}

    return Rule(("exp_avg", "exp_avg_sq"), update, decay=group["lrd"], first_count=lambda _: 0)


def _sgd(group: Mapping[str, Any]) -> Rule:
    """Sutskever et al. (2013), as torch has it: v = mu v + g, p = p - lr v."""
    momentum, penalty, nesterov = group["momentum"], group["weight_decay"], group["nesterov"]
    if momentum and group["dampening"]:
        raise ValueError("Expected SGD without dampening; got it set.")

    def update(
        p: Tensor, gradient: Tensor, state: State, step: Tensor, lr: Tensor
    ) -> tuple[Tensor, State]:
        if penalty:
            gradient = gradient + penalty * p
        if not momentum:
            return p - lr * gradient, {}
        velocity = momentum * state["momentum_buffer"] + gradient
        direction = gradient + momentum * velocity if nesterov else velocity
        return p - lr * direction, {"momentum_buffer": velocity}

    return Rule(("momentum_buffer",) if momentum else (), update)


_RULES: dict[type[Optimizer], Callable[[Mapping[str, Any]], Rule]] = {
    Adam: _adam,
    AdamW: _adamw,
    SGD: _sgd,
    ClippedAdam: _clipped_adam,
}
