"""The updates of torch's optimisers as functions of tensors, for steps that are one graph.

An optimiser keeps its own state and settings: what is here reads them, computes the same update
without Python, and leaves state behind that the optimiser itself can go on from.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

__all__ = ["Rule", "rule_of"]

State = dict[str, Tensor]
Update = Callable[[Tensor, Tensor, State, Sequence[Tensor]], tuple[Tensor, State]]


@dataclass(frozen=True)
class Rule:
    """The update of one group of parameters.

    Attributes:
        state_names: Tensors that the optimiser keeps for each parameter, of its shape.
        factors: From the group as it is now, the number of a step (from 1) and the learning rate to
            the numbers that the update of this step needs. They are computed once, and not for
            every entry, and a schedule may change them: the rate, and the momenta.
        num_factors: How many there are.
        update: From a parameter, its gradient, its state and the factors, as tensors, to the new
            parameter and state.
        decay: What the learning rate is multiplied by before every step.
        first_count: From a parameter to the count of its steps at the start, as the optimiser
            keeps it; None if it does not.
    """

    state_names: tuple[str, ...]
    factors: Callable[[Mapping[str, Any], int, float], tuple[float, ...]]
    num_factors: int
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
    eps, penalty = group["eps"], group["weight_decay"]
    # AdamW is an Adam with this flag in newer versions of torch
    decoupled = group.get("decoupled_weight_decay", False)

    def factors(group: Mapping[str, Any], step: int, lr: float) -> tuple[float, ...]:
        beta1, beta2 = map(float, group["betas"])
        size, root_bias = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
        return size, root_bias, 1 - lr * penalty, 1 - beta1, beta2, 1 - beta2

    def update(
        p: Tensor, gradient: Tensor, state: State, factors: Sequence[Tensor]
    ) -> tuple[Tensor, State]:
        size, root_bias, kept, rest1, beta2, rest2 = factors
        if penalty and decoupled:
            p = p * kept
        elif penalty:
            gradient = gradient + penalty * p
        first = state["exp_avg"] + (gradient - state["exp_avg"]) * rest1
        second = state["exp_avg_sq"] * beta2 + gradient * gradient * rest2
        p = p - size * (first / (second.sqrt() / root_bias + eps))
        return p, {"exp_avg": first, "exp_avg_sq": second}

    on_device = group.get("capturable") or group.get("fused")

    def first_count(p: Tensor) -> Tensor:
        return torch.zeros((), device=p.device if on_device else "cpu")

    return Rule(("exp_avg", "exp_avg_sq"), factors, 6, update, first_count=first_count)


def _adamw(group: Mapping[str, Any]) -> Rule:
    """Loshchilov and Hutter (2019), algorithm 2: weight decay beside the gradient."""
    return _adam({**group, "decoupled_weight_decay": True})


def _clipped_adam(group: Mapping[str, Any]) -> Rule:
    """Pyro's: every entry of the gradient clipped, and a learning rate that decays by itself."""
    eps, penalty, bound = group["eps"], group["weight_decay"], group["clip_norm"]

    def factors(group: Mapping[str, Any], step: int, lr: float) -> tuple[float, ...]:
        beta1, beta2 = map(float, group["betas"])
        size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return size, beta1, 1 - beta1, beta2, 1 - beta2

    def update(
        p: Tensor, gradient: Tensor, state: State, factors: Sequence[Tensor]
    ) -> tuple[Tensor, State]:
        size, beta1, rest1, beta2, rest2 = factors
        gradient = gradient.clamp(-bound, bound)
        if penalty:
            gradient = gradient + penalty * p
        first = state["exp_avg"] * beta1 + gradient * rest1
        second = state["exp_avg_sq"] * beta2 + gradient * gradient * rest2
        p = p - size * (first / (second.sqrt() + eps))
        return p, {"exp_avg": first, "exp_avg_sq": second}

    return Rule(
        ("exp_avg", "exp_avg_sq"), factors, 5, update, decay=group["lrd"], first_count=lambda _: 0
    )


def _sgd(group: Mapping[str, Any]) -> Rule:
    """Sutskever et al. (2013), as torch has it: v = mu v + g, p = p - lr v."""
    has_momentum = group["momentum"] != 0
    penalty, nesterov = group["weight_decay"], group["nesterov"]
    if has_momentum and group["dampening"]:
        raise ValueError("Expected SGD without dampening; got it set.")

    def update(
        p: Tensor, gradient: Tensor, state: State, factors: Sequence[Tensor]
    ) -> tuple[Tensor, State]:
        lr, momentum = factors
        if penalty:
            gradient = gradient + penalty * p
        if not has_momentum:
            return p - lr * gradient, {}
        velocity = momentum * state["momentum_buffer"] + gradient
        direction = gradient + momentum * velocity if nesterov else velocity
        return p - lr * direction, {"momentum_buffer": velocity}

    def factors(group: Mapping[str, Any], step: int, lr: float) -> tuple[float, ...]:
        return lr, float(group["momentum"])

    return Rule(("momentum_buffer",) if has_momentum else (), factors, 2, update)


_RULES: dict[type[Optimizer], Callable[[Mapping[str, Any]], Rule]] = {
    Adam: _adam,
    AdamW: _adamw,
    SGD: _sgd,
    ClippedAdam: _clipped_adam,
}
