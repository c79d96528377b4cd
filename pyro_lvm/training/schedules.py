"""The schedules of a run: where they are found, and what is said of a run too short for them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pyro.infer import ELBO
from torch import nn

from pyro_lvm.infer.schedules import Schedule

__all__ = [
    "advance",
    "describe_schedules",
    "is_weight",
    "last_positions",
    "placed_parameters",
    "schedules_of",
    "too_short",
]

Schedules = Mapping[str, Schedule]
_WEIGHTS = ("alpha", "lambda", "kl_weight")  # as our objectives call them in the history


def schedules_of(elbo: ELBO, owners: nn.ModuleList) -> dict[str, Schedule]:
    """The schedules that a run advances, by name, each once.

    They are the objective's, and those in the modules that the pair and the divergence belong to,
    such as the schedule of a temperature, by their path there.
    """
    found = dict(getattr(elbo, "schedules", {}))
    known = {id(schedule) for schedule in found.values()}
    for path, module in owners.named_modules():
        if isinstance(module, Schedule) and id(module) not in known:
            _, _, name = path.partition(".")  # without the number of the owner
            found[path if name in found else name] = module
    return found


def advance(schedules: Schedules, *, step: int, epoch: int) -> None:
    """Put the weights in force that belong to a step."""
    for schedule in schedules.values():
        schedule.update(step=step, epoch=epoch)


def placed_parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """The parameters that say where modules are: the weights of schedules follow the others."""
    each = (m for module in modules for m in module.modules() if not isinstance(m, Schedule))
    return (p for module in each for p in module.parameters(recurse=False))


def describe_schedules(schedules: Schedules) -> str | None:
    """The schedules in words that are the same for the same ones; None without any."""
    return ", ".join(f"{name}: {schedule!r}" for name, schedule in schedules.items()) or None


def is_weight(name: str, schedules: Schedules) -> bool:
    """Whether a name in the history is that of a weight, and not of a part in nats."""
    name = name.removeprefix("validation/")
    return name in schedules or name.partition("[")[0] in _WEIGHTS


def last_positions(
    schedules: Schedules, *, epochs: int, batches: int, settings: Mapping[str, Any]
) -> dict[str, int]:
    """Where the last step of a run will find its schedules, if nothing ends it before.

    Args:
        schedules: The schedules.
        epochs: The epochs of the run.
        batches: The batches of an epoch.
        settings: The trainer's, some of which make for fewer steps.
    """
    accumulated = settings.get("accumulate_grad_batches") or 1
    steps = epochs * math.ceil(batches / accumulated)
    most = settings.get("max_steps") or -1
    last = {"epoch": epochs - 1, "step": (steps if most < 0 else min(steps, most)) - 1}
    return {name: last[schedule.unit] for name, schedule in schedules.items()}


def too_short(schedules: Schedules, positions: Mapping[str, int], *, over: bool) -> dict[str, str]:
    """What to say of the schedules whose last weight is, or was, not that of their end.

    Args:
        schedules: The schedules.
        positions: Where the last step finds them, or has found them.
        over: Whether the run is over.

    Returns:
        The text by name.
    """
    return {
        name: f"The schedule of {name} {'ended' if over else 'will end'} at {schedule.at(last):g}, "
        f"after {last} of the {schedule.length} {schedule.unit}s that lead to {schedule.end:g}. "
        f"Train for more epochs, or shorten the schedule by {schedule.unit}s=."
        for name, schedule in schedules.items()
        if schedule.at(last := positions[name]) != schedule.end
    }
