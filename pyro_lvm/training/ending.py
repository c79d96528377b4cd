"""The end of a run: which parameters the pair is left with, and what is said of it."""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from pyro_lvm.training.processes import Processes
from pyro_lvm.training.result import Stopped
from pyro_lvm.training.schedules import too_short

if TYPE_CHECKING:
    from pyro_lvm.training.callbacks import BestParameters
    from pyro_lvm.training.lightning import PairModule

__all__ = ["settled", "warn_at_end", "warn_of_each"]

_OF_THE_CALL = 4  # of fit, seen from where a warning is given


def settled(
    module: "PairModule", best: "BestParameters", example: tuple[Tensor, ...], stopped: Stopped
) -> Stopped:
    """Put the best parameters back; returns why the run ended, which may show only here."""
    if stopped == "interrupted":
        module.processes = Processes()  # the others are gone
    if not best.restore(module, example) and stopped != "interrupted":
        return "loss not finite"
    return stopped


def warn_at_end(module: "PairModule", epoch: int | None, foretold: Mapping[str, int]) -> None:
    """Say what was not finite, or else which schedules the run has left early.

    Args:
        module: The pair.
        epoch: The epoch whose parameters it has; None for those from before training.
        foretold: The positions at which a warning before the first step saw schedules end.
    """
    if module.processes.rank != 0:
        return
    if module.diagnosis is None:
        warn_of_each(_left_early(module, foretold), stacklevel=_OF_THE_CALL)
        return
    kept = "from before training" if epoch is None else f"of epoch {epoch}"
    text = f"{module.diagnosis} The pair has the parameters {kept}."
    warnings.warn(text, stacklevel=_OF_THE_CALL - 1)


def warn_of_each(texts: Iterable[str], *, stacklevel: int = _OF_THE_CALL - 1) -> None:
    """Give some warnings, at the line that called fit."""
    for text in texts:
        warnings.warn(text, stacklevel=stacklevel)


def _left_early(module: "PairModule", foretold: Mapping[str, int]) -> list[str]:
    """What to say of schedules that a run has left early, unless that has been said before it."""
    positions = {name: schedule.position for name, schedule in module.schedules.items()}
    texts = too_short(module.schedules, positions, over=True)
    return [text for name, text in texts.items() if positions[name] != foretold[name]]
