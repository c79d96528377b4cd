"""Weights of terms: numbers, tensors that change in place, or schedules."""

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from pyro_lvm.checks import check_weight
from pyro_lvm.infer.schedules import Schedule

__all__ = [
    "Weight",
    "Weights",
    "check",
    "in_force",
    "may_differ_from",
    "scheduled",
    "shown",
    "times",
]

Weight: TypeAlias = float | Tensor | Schedule
Weights: TypeAlias = Weight | Mapping[str, Weight]
"""One weight for all sites, or site -> weight; 1 for sites without one."""


def in_force(weight: Weight) -> float | Tensor:
    """The weight as it is now."""
    return weight.weight if isinstance(weight, Schedule) else weight


def times(weight: float | Tensor, scalar: Tensor) -> Tensor:
    """A scalar with a weight, in the scalar's own dtype, which a schedule's would else change."""
    return scalar * (weight.to(scalar) if isinstance(weight, Tensor) else weight)


def check(name: str, weight: Weights, *, minimum: float | None = None) -> None:
    """Refuse what is no finite number, tensor of one, or schedule; or is below a minimum.

    Raises:
        ValueError: If it is such.
    """
    for label, each in _named(name, weight):
        if isinstance(each, Schedule):
            values = [each.at(0), each.end]
        else:
            check_weight(label, each)
            values = [float(each)]
        if minimum is not None and min(values) < minimum:
            raise ValueError(f"Expected {label} >= {minimum:g}; got {min(values):g}.")


def may_differ_from(number: float, weight: Weights) -> bool:
    """Whether a weight is, or may become, another number; looks at the value of no tensor."""
    each = weight.values() if isinstance(weight, Mapping) else [weight]
    return any(isinstance(w, Tensor | Schedule) or w != number for w in each)


def scheduled(name: str, weight: Weights) -> dict[str, Schedule]:
    """The schedules among weights, by name."""
    return {label: w for label, w in _named(name, weight) if isinstance(w, Schedule)}


def shown(name: str, weight: Weights) -> dict[str, Tensor]:
    """The weights that may change, as they are now, by name."""
    now = {label: in_force(w) for label, w in _named(name, weight)}
    return {label: w.detach().clone() for label, w in now.items() if isinstance(w, Tensor)}


def _named(name: str, weight: Weights) -> list[tuple[str, Weight]]:
    if isinstance(weight, Mapping):
        return [(f"{name}[{site}]", w) for site, w in weight.items()]
    return [(name, weight)]
