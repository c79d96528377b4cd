"""The Lightning module that takes compiled steps."""

import math
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_lvm.compiled.step import CompiledStep
from pyro_lvm.compiled.step_graph import Clip
from pyro_lvm.pair import untouched_random_state
from pyro_lvm.training.groups import Group, Groups
from pyro_lvm.training.lightning import PairModule, Unseen, is_at_hand

__all__ = ["CompiledPairModule"]


class CompiledPairModule(PairModule):
    """A `PairModule` whose steps are compiled; its batches are groups of minibatches.

    At the start of every epoch, and after the first group of all, the recorded loss is compared
    with Python's. Where they differ, since the pair counts its calls, say, or a number in it has
    changed, a warning says so, and the run goes on in Python.

    Args:
        clip: Bounds of a gradient.
        *args: As for `PairModule`.
        **kwargs: As for `PairModule`.
    """

    def __init__(self, *args: Any, clip: Clip, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False  # the update is part of the compiled step
        self._clip = clip
        self._steps: CompiledStep | None = None
        self._groups_taken = 0

    @classmethod
    def of(cls, module: PairModule, clip: Clip) -> "CompiledPairModule":
        """The same pair, objective and optimiser, with compiled steps."""
        return cls(
            *module.given,
            example=module.example,
            num_data=module.num_data,
            plate=module.plate,
            transform=module.transform,
            clip=clip,
        )

    def training_step(self, batch: Any, batch_index: int) -> None:
        """Take the steps of a group of minibatches."""
        group = Group(*batch)
        # fit has shown every datum to Pyro's checks
        with self._newcomers, pyro.validation_enabled(False):
            if self._groups_taken == 1 or group.first == 0:
                self._compare_with_python(group)
            rows = self._take(group)
        if self._newcomers.found:
            self._train_newcomers()
        self._groups_taken += 1
        if rows:
            self._report(torch.cat(rows), group)

    def _take(self, group: Group) -> list[Tensor]:
        """Take the steps of a group; ends the run where a loss is not finite."""
        steps, data = self._compiled_steps(), self._data()
        taken = []
        for number, rows in enumerate(group.rows, group.first):
            self._advance_schedules()
            before = torch.get_rng_state()
            try:
                taken.append(steps.take(rows.unsqueeze(0), *data))
            except (ValueError, RuntimeError):  # a step in Python, with Pyro's own checks
                if self.tensors.are_finite():
                    raise
                taken.append(torch.full((1, 1 + len(steps.names)), math.nan))
            self._count_steps(1)
            self._report_weights(len(rows))
            self._step_scheduler()
            loss = taken[-1][0, 0]
            if not is_at_hand(loss):
                self._look_later(Unseen("", number, loss))
            elif not math.isfinite(loss.item()):
                batch = self._loader("").batch(number)
                with untouched_random_state(batch):
                    torch.set_rng_state(before)  # the draws that led there
                    self._end_at("", number, batch, loss)
                break
        return taken

    def _report(self, table: Tensor, group: Group) -> None:
        """Add losses and parts to the means of the epoch."""
        assert self._steps is not None
        loss, *parts = table.mean(0)
        values = {**dict(zip(self._steps.names, parts, strict=True)), "loss": loss / self.num_data}
        self.means.add(values, len(table) * group.rows.shape[1])

    def _report_weights(self, size: int) -> None:
        """Add the weights that no part reports to the means of the epoch."""
        assert self._steps is not None
        others = self.schedules.keys() - set(self._steps.names)
        self.means.add({name: self.schedules[name].weight for name in others}, size)

    def _compare_with_python(self, group: Group) -> None:
        batch = self._loader("").batch(group.first)
        reason = self._compiled_steps().check(*batch)
        if reason is not None:
            self._compiled_steps().give_up(
                f"{reason}, so that something in Python has changed since it was compiled; a "
                f"weight that changes belongs into a schedule, or a tensor that is changed in place"
            )

    def _compiled_steps(self) -> CompiledStep:
        if self._steps is None:
            optimizer = self.trainer.optimizers[0]
            self._steps = CompiledStep(
                self.training_objective,
                *self.programs,
                optimizer,
                divisor=self.num_data,
                parts=True,
                plate=self.plate,
                clip_norm=self._clip.norm,
                clip_value=self._clip.value,
            )
        return self._steps

    def _data(self) -> tuple[Tensor, ...]:
        loader = self._loader("")
        assert isinstance(loader, Groups)
        return loader.tensors

    def _step_scheduler(self) -> None:
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def _count_steps(self, number: int) -> None:
        """Count what Lightning does not see, for ``trainer.global_step``."""
        total = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        total.ready += number
        total.completed += number
