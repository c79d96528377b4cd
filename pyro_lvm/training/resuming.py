"""What a run that goes on must have in common with the checkpoint that it goes on from."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_lvm.training.checkpoint import newest
from pyro_lvm.training.choice import Compile
from pyro_lvm.training.minibatches import Minibatches
from pyro_lvm.training.preflight import check_same_run
from pyro_lvm.training.schedules import describe_schedules

if TYPE_CHECKING:
    from pyro_lvm.training.lightning import PairModule

__all__ = ["as_before", "description", "last_checkpoint"]


def as_before(compile: Compile, directory: Path | None) -> Compile:
    """What a run was that is to go on: its steps are compiled again, or not again."""
    found = None if directory is None else newest(directory)
    if compile != "auto" or found is None:
        return compile
    return found[1].get("settings", {}).get("compiled", compile)


def description(
    module: "PairModule",
    batches: Minibatches,
    held_out: Minibatches | None,
    seed: int | None,
    *,
    compiled: bool,
) -> dict[str, Any]:
    """What a run must have in common with another one that goes on from its checkpoint."""
    from pyro_lvm.training.saving import describe_optimizer, describe_scheduler

    return {
        "data": batches.digest(),
        "validation": None if held_out is None else held_out.digest(),
        "batch_size": batches.batch_size,
        "seed": seed,
        "elbo": type(module.elbo).__name__,
        "optimizer": describe_optimizer(module.make_optimizer()),
        "scheduler": describe_scheduler(module.configure_optimizers()),
        "schedules": describe_schedules(module.schedules),
        "compiled": compiled,
    }


def last_checkpoint(directory: Path, run: dict[str, Any], epochs: int) -> Path | None:
    """The checkpoint to go on from; None if there is none."""
    found = newest(directory)
    if found is None:
        return None
    path, state = found
    check_same_run(path, state, run, epochs)
    return path
