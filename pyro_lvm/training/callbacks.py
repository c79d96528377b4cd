"""What happens at the end of every epoch: the best parameters, patience, and a progress bar."""

import math
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor
from tqdm.auto import tqdm

from pyro_lvm.training.lightning import PairModule

__all__ = ["BestParameters", "EpochProgress", "Patience", "Snapshot"]


class Snapshot(NamedTuple):
    """The parameters and buffers at the end of an epoch, None for the start."""

    epoch: int | None
    values: dict[str, Tensor]


class BestParameters(pl.Callback):
    """Keeps the parameters of the epoch with the least validation loss, in memory.

    Without validation data it keeps those of the last epoch. The loss of an epoch is that of the
    parameters before its steps, so that its last step may still have led astray; hence those that
    were kept before are at hand as well.
    """

    def __init__(self) -> None:
        self.loss = math.inf
        self._kept: list[Snapshot] = []

    @property
    def snapshot(self) -> Snapshot:
        """What was kept last."""
        return self._kept[-1]

    @property
    def epoch(self) -> int | None:
        """The epoch whose parameters are the best; None before one was finished."""
        return self.snapshot.epoch

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the parameters from before training, unless a checkpoint has brought others."""
        if not self._kept:
            self._keep(None, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compare this epoch with the best one so far."""
        assert isinstance(module, PairModule)
        if module.diverged:
            return
        means = module.means.now()
        if trainer.val_dataloaders is None:
            better = math.isfinite(means["loss"])
        else:
            loss = means.get("validation/loss", math.inf)
            better = loss < self.loss
            self.loss = min(loss, self.loss)
        if names := module.tensors.not_finite():  # the last step has led astray
            module.end(
                f"The last step of epoch {trainer.current_epoch} made parameters that are not "
                f"finite ({', '.join(names[:3])}), though its loss was."
            )
        elif better:
            self._keep(trainer.current_epoch, module)

    def state_dict(self) -> dict[str, Any]:
        """What was kept, for checkpoints."""
        return {"loss": self.loss, "kept": [tuple(snapshot) for snapshot in self._kept]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.loss = state_dict["loss"]
        self._kept = [Snapshot(*kept) for kept in state_dict["kept"]]

    def restore(self, module: PairModule, example: tuple[Tensor, ...]) -> bool:
        """Put the best values back, or those kept before them if their loss is not finite.

        If no epoch was finished, the module stays as it is unless its loss is not finite.

        Returns:
            Whether the best values were good.
        """
        if self.epoch is not None:
            module.tensors.put(self.snapshot.values)
        if module.has_finite_loss(example):
            return True
        reason = module.processes.first(module.diagnose(example, range(len(example[0]))))
        module.end(f"The parameters after the last step have no finite loss: {reason}.")
        self._kept = self._kept[:1]
        module.tensors.put(self.snapshot.values)
        return False

    def _keep(self, epoch: int | None, module: pl.LightningModule) -> None:
        assert isinstance(module, PairModule)
        values = {name: t.detach().clone() for name, t in module.tensors.changing().items()}
        self._kept = [*self._kept[-1:], Snapshot(epoch, values)]


class Patience(EarlyStopping):
    """Ends the run after so many epochs without a lower validation loss."""

    def __init__(self, patience: int) -> None:
        super().__init__("validation/loss", patience=patience)

    @property
    def exhausted(self) -> bool:
        """Whether that is why the run has ended."""
        return self.wait_count >= self.patience

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, with the patience of this run."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Do not go on where the checkpoint is that of a run which had ended."""
        trainer.should_stop = trainer.should_stop or self.exhausted


class EpochProgress(pl.Callback):
    """One progress bar over the epochs, in a terminal, for runs longer than two seconds."""

    def __init__(self, epochs: int) -> None:
        self.bar = tqdm(
            total=epochs, desc="fit", unit="epoch", delay=2.0, disable=None, leave=False
        )

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin where a checkpoint was, in the first of several processes."""
        self.bar.disable = self.bar.disable or not trainer.is_global_zero
        self.bar.update(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Advance the bar."""
        assert isinstance(module, PairModule)
        shown = {k: v for k, v in module.means.now().items() if k.endswith("loss")}
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)
        self.bar.update()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Take the bar away."""
        self.bar.close()

    def on_exception(
        self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Take the bar away."""
        self.bar.close()
