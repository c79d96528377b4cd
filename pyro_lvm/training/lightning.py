"""The Lightning module that joins a pair, an objective and an optimiser, and its callbacks."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import lightning.pytorch as pl
import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_lvm.pair import (
    Program,
    device_of,
    modules_of,
    no_guide,
    parameters_of,
    plate_size,
    untouched_random_state,
)

__all__ = ["BestParameters", "EpochProgress", "Optimizer", "PairModule"]

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class PairModule(pl.LightningModule):
    """A (model, guide) pair with an objective, for ``lightning.pytorch.Trainer``.

    A batch is a tuple of tensors, the arguments of model and guide. What is minimised is the
    objective's loss divided by the number of all data: nats per datum. Each epoch adds the mean of
    the loss and, for objectives that report them, of its parts to ``history``; the same values are
    logged, validation under "validation/...".

    Args:
        model: The model.
        guide: The guide, or None for one that samples nothing.
        elbo: An objective with a differentiable loss.
        optimizer: From parameters to a torch optimiser.
        example: The arguments of one call, to find the parameters that the pair declares.
        num_data: ``N``, the number of all training data.
        plate: Name of the data plate.

    Raises:
        ValueError: If the pair has no parameters.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        elbo: ELBO,
        optimizer: Optimizer,
        *,
        example: tuple[Tensor, ...],
        num_data: int,
        plate: str = "data",
    ) -> None:
        super().__init__()
        guide = no_guide if guide is None else guide
        self.elbo, self.optimizer, self.num_data = elbo, optimizer, num_data
        self.owners = nn.ModuleList(modules_of(model, guide, getattr(elbo, "divergence", None)))
        self.programs = tuple(plate_size(p, num_data, plate=plate) for p in (model, guide))
        declared = parameters_of(model, guide, example)
        owned = {id(p) for p in self.owners.parameters()}
        # tensors of the param store, which no module owns
        self.loose = [p for p in declared if id(p) not in owned]
        self.trained = [p for p in self.owners.parameters() if p.requires_grad] + self.loose
        if not self.trained:
            raise ValueError(
                "Expected a pair with parameters that require a gradient; got none. Declare them "
                "by pyro.param, or make model and guide methods or modules that own them."
            )
        self.history: dict[str, list[float]] = {}
        self.diverged = False
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, int] = defaultdict(int)

    def training_step(self, batch: tuple[Tensor, ...], batch_index: int) -> Tensor | None:
        """The loss of a minibatch, nats per datum; None where parameters that are not finite fail.

        The run ends in that case.
        """
        return self._step(batch, "")

    def validation_step(self, batch: tuple[Tensor, ...], batch_index: int) -> None:
        """The loss of a minibatch that is not trained on."""
        with torch.no_grad():
            self._step(batch, "validation/")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser of all parameters, each once."""
        optimizer = self.optimizer(self.trained)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Expected optimizer to make a torch.optim.Optimizer from parameters, such as "
                f"lambda p: torch.optim.Adam(p, lr=1e-3); got one that makes "
                f"{type(optimizer).__name__}."
            )
        return optimizer

    def on_validation_epoch_end(self) -> None:
        """Hand the validation means to Lightning: early stopping and loggers read them."""
        self.log_dict(self.means("validation/"))

    def on_train_epoch_end(self) -> None:
        """Add the epoch's means to the history."""
        means = self.means()
        self.log_dict({k: v for k, v in means.items() if not k.startswith("validation/")})
        finished = len(self.history.get("loss", []))
        for name in {**self.history, **means}:
            # nan stands for an epoch without validation
            values = self.history.setdefault(name, [math.nan] * finished)
            values.append(means.get(name, math.nan))
        self._sums, self._weights = {}, defaultdict(int)
        if not all(math.isfinite(v) for k, v in means.items() if k.endswith("loss")):
            self.diverged = self.trainer.should_stop = True

    def loss(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a minibatch and its parts by name, nats per datum."""
        parts: dict[str, Tensor] = {}
        with device_of(batch):
            if hasattr(self.elbo, "loss_and_parts"):
                loss, parts = self.elbo.loss_and_parts(*self.programs, *batch)
            else:
                method = "differentiable_loss" if torch.is_grad_enabled() else "loss"
                loss = getattr(self.elbo, method)(*self.programs, *batch)
        loss = torch.as_tensor(loss) / self.num_data
        return loss, {**parts, "loss": loss.detach()}

    def means(self, prefix: str = "") -> dict[str, float]:
        """Means over the data of this epoch so far."""
        return {
            name: float(total) / self._weights[name]
            for name, total in self._sums.items()
            if name.startswith(prefix)
        }

    def has_finite_parameters(self) -> bool:
        """Whether all that is trained is finite."""
        return all(bool(torch.isfinite(p).all()) for p in self.trained)

    def has_finite_loss(self, batch: tuple[Tensor, ...]) -> bool:
        """Whether parameters and loss are finite."""
        if not self.has_finite_parameters():
            return False
        with untouched_random_state(batch), torch.no_grad():
            try:
                return bool(torch.isfinite(self.loss(batch)[0]))
            except (ValueError, RuntimeError):  # no distribution has these parameters
                return False

    def _step(self, batch: tuple[Tensor, ...], prefix: str) -> Tensor | None:
        size = len(batch[0])
        try:
            # fit has shown every datum to Pyro's checks; here they would raise where a run diverges
            with pyro.validation_enabled(False):
                loss, parts = self.loss(batch)
        except (ValueError, RuntimeError):
            if self.has_finite_parameters():
                raise
            self._add({prefix + "loss": torch.tensor(math.nan)}, size)
            self.trainer.should_stop = True
            return None
        self._add({prefix + name: value for name, value in parts.items()}, size)
        return loss

    def _add(self, values: dict[str, Tensor], size: int) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + size * value
            self._weights[name] += size


class BestParameters(pl.Callback):
    """Keeps the parameters of the epoch with the least validation loss, in memory.

    Without validation data it keeps those of the last epoch. The loss of an epoch is that of the
    parameters before its steps, so that its last step may still have led astray; hence those that
    were kept before are at hand as well.
    """

    def __init__(self) -> None:
        self.loss = math.inf
        self._kept: list[_Snapshot] = []

    @property
    def epoch(self) -> int | None:
        """The epoch whose parameters are the best; None before one was finished."""
        return self._kept[-1].epoch

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the parameters from before training."""
        self._keep(None, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compare this epoch with the best one so far."""
        assert isinstance(module, PairModule)
        means = module.means()
        if trainer.val_dataloaders is None:
            better = math.isfinite(means["loss"])
        else:
            loss = means.get("validation/loss", math.inf)
            better = loss < self.loss
            self.loss = min(loss, self.loss)
        if not module.has_finite_parameters():  # the last step has led astray
            module.diverged = trainer.should_stop = True
        elif better:
            self._keep(trainer.current_epoch, module)

    @torch.no_grad()
    def restore(self, module: PairModule, example: tuple[Tensor, ...]) -> bool:
        """Put the best values back, or those kept before them if their loss is not finite.

        If no epoch was finished, the module stays as it is unless its loss is not finite.

        Returns:
            Whether the best values were good.
        """
        if self.epoch is not None:
            self._kept[-1].put(module)
        if module.has_finite_loss(example):
            return True
        self._kept = self._kept[:1]
        self._kept[0].put(module)
        return False

    def _keep(self, epoch: int | None, module: pl.LightningModule) -> None:
        assert isinstance(module, PairModule)
        values = [t.detach().clone() for t in _state(module)]
        self._kept = [*self._kept[-1:], _Snapshot(epoch, values)]


class _Snapshot(NamedTuple):
    """The parameters and buffers at the end of an epoch, None for the start."""

    epoch: int | None
    values: list[Tensor]

    def put(self, module: PairModule) -> None:
        for target, value in zip(_state(module), self.values, strict=True):
            target.copy_(value)


def _state(module: PairModule) -> list[Tensor]:
    return [*module.trained, *module.owners.buffers()]


class EpochProgress(pl.Callback):
    """One progress bar over the epochs, in a terminal, for runs longer than two seconds."""

    def __init__(self, epochs: int) -> None:
        self.bar = tqdm(
            total=epochs, desc="fit", unit="epoch", delay=2.0, disable=None, leave=False
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Advance the bar."""
        assert isinstance(module, PairModule)
        shown = {k: v for k, v in module.means().items() if k.endswith("loss")}
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
