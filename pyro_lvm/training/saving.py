"""Checkpoints of a run: when they are written, and what a run that goes on from one must share."""

import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pyro_lvm.training.callbacks import BestParameters
from pyro_lvm.training.checkpoint import (
    CheckpointError,
    best_path,
    path_at,
    prune,
    read,
    write,
)
from pyro_lvm.training.lightning import PairModule

__all__ = [
    "CheckedFiles",
    "Checkpoints",
    "checkpoint_settings",
    "describe_optimizer",
    "describe_scheduler",
]


class CheckedFiles(TorchCheckpointIO):
    """Lets Lightning write and read checkpoints that are whole, and plain data."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint."""
        write(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint."""
        return read(Path(path))


class Checkpoints(Checkpoint):
    """Writes checkpoints: before the first step, then regularly, and at the end.

    It keeps two, so that one is good at any time, and the best epoch's parameters beside them.

    Args:
        directory: Where to.
        every: Epochs between two, or the time after which the next one is due; a time can end
            within an epoch.
        best: What keeps the best parameters.
        settings: What a run that goes on from a checkpoint must have in common with this one.
        fresh: Whether this run goes on from no checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        every: int | timedelta,
        best: BestParameters,
        settings: Mapping[str, Any],
        *,
        fresh: bool,
    ) -> None:
        self.directory, self.every = directory, every
        self.best, self.settings, self.fresh = best, dict(settings), fresh
        self._written_at = time.monotonic()
        self._best_epoch: int | None = None

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write where the run starts from."""
        if self.fresh:
            assert isinstance(module, PairModule)
            self._write(trainer)
            self._check_readable(trainer, module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write a checkpoint within an epoch, if it is time."""
        assert isinstance(module, PairModule)
        if not isinstance(self.every, timedelta) or not self._time_is_up(module):
            return
        if _can_go_on(trainer) and module.tensors.are_finite():
            self._write(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write a checkpoint at the end of an epoch, if it is time or the last one."""
        assert isinstance(module, PairModule)
        finished = trainer.current_epoch + 1
        if module.diverged:  # nobody wants to go on from here
            return
        if isinstance(self.every, timedelta):
            due = self._time_is_up(module)
        else:
            due = finished % self.every == 0
        if due or trainer.should_stop or finished == trainer.max_epochs:
            self._write(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the settings of the run."""
        checkpoint["settings"] = self.settings

    def _time_is_up(self, module: PairModule) -> bool:
        assert isinstance(self.every, timedelta)
        passed = time.monotonic() - self._written_at
        return module.processes.first(passed >= self.every.total_seconds())

    def _write(self, trainer: pl.Trainer) -> None:
        """Write a checkpoint; if the disk is full, or gone, the run goes on without."""
        try:
            _save(trainer, path_at(self.directory, trainer.global_step))
            if trainer.is_global_zero:
                self._write_best()
                prune(self.directory)
        except OSError as error:
            warnings.warn(
                f"No checkpoint was written after step {trainer.global_step} ({error}). The run "
                f"goes on, and what was written before stays.",
                stacklevel=2,
            )
        self._written_at = time.monotonic()

    def _write_best(self) -> None:
        if self.best.epoch != self._best_epoch:
            epoch, values = self.best.snapshot
            write(best_path(self.directory), {"epoch": epoch, "values": values})
            self._best_epoch = epoch

    def _check_readable(self, trainer: pl.Trainer, module: PairModule) -> None:
        """Refuse at once what could be written but not read."""
        path, reason = path_at(self.directory, trainer.global_step), None
        if trainer.is_global_zero and path.exists():
            try:
                read(path)
            except CheckpointError as error:
                path.unlink()
                reason = str(error)
        if reason := module.processes.first(reason):
            raise CheckpointError(reason)


def checkpoint_settings(callbacks: Sequence[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trainer that these callbacks need, beside those that it has."""
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        return {"enable_checkpointing": False}
    if not any(isinstance(callback, Checkpoints) for callback in callbacks):
        return {}
    plugins = settings.get("plugins") or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    return {"enable_checkpointing": True, "plugins": [*plugins, CheckedFiles()]}


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """An optimiser and its settings, in words that are the same for the same optimiser."""
    settings = [f"{name}={value}" for name, value in sorted(optimizer.defaults.items())]
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    others = [f"lr of its own {rate}" for rate in rates if rate != optimizer.defaults["lr"]]
    return f"{type(optimizer).__name__}({', '.join(settings + others)})"


def describe_scheduler(configured: Any) -> str | None:
    """The kind of scheduler that a module has configured; None without one."""
    if not isinstance(configured, dict):
        return None
    return type(configured["lr_scheduler"]["scheduler"]).__name__


def _save(trainer: pl.Trainer, path: Path) -> None:
    """Write a checkpoint; the first process does, and the others wait, also where it can't."""
    try:
        trainer.save_checkpoint(path)
    except OSError:
        trainer.strategy.barrier()
        raise


def _can_go_on(trainer: pl.Trainer) -> bool:
    """Whether a run can go on from where this one is within its epoch."""
    step = trainer.fit_loop.batch_idx + 1
    in_between = step < trainer.num_training_batches and not trainer.should_stop
    no_gradients = step % trainer.accumulate_grad_batches == 0
    return in_between and no_gradients and hasattr(trainer.train_dataloader, "state_dict")
