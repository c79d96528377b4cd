"""The Lightning module that joins a pair, an objective and an optimiser, and its callbacks."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import lightning.pytorch as pl
import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_lvm.pair import Program, modules_of, no_guide, parameters_of, plate_size

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
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, int] = defaultdict(int)

    def training_step(self, batch: tuple[Tensor, ...], batch_index: int) -> Tensor:
        """The loss of a minibatch, nats per datum."""
        # the first epoch shows every datum to Pyro's checks; after it they only cost time
        with pyro.validation_enabled(self.current_epoch == 0):
            return self._loss(batch, "")

    def validation_step(self, batch: tuple[Tensor, ...], batch_index: int) -> None:
        """The loss of a minibatch that is not trained on."""
        with pyro.validation_enabled(self.current_epoch == 0), torch.no_grad():
            self._loss(batch, "validation/")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser of all parameters, each once."""
        return self.optimizer(self.trained)

    def on_validation_epoch_end(self) -> None:
        """Hand the validation means to Lightning: early stopping and loggers read them."""
        self.log_dict(self._means("validation/"))

    def on_train_epoch_end(self) -> None:
        """Add the epoch's means to the history."""
        means = self._means("")
        self.log_dict({k: v for k, v in means.items() if not k.startswith("validation/")})
        for name, value in means.items():
            self.history.setdefault(name, []).append(value)
        self._sums, self._weights = {}, defaultdict(int)
        if not math.isfinite(means["loss"]):
            self.trainer.should_stop = True

    def _loss(self, batch: tuple[Tensor, ...], prefix: str) -> Tensor:
        if hasattr(self.elbo, "loss_and_parts"):
            loss, parts = self.elbo.loss_and_parts(*self.programs, *batch)
        else:
            method = "differentiable_loss" if torch.is_grad_enabled() else "loss"
            loss, parts = getattr(self.elbo, method)(*self.programs, *batch), {}
        loss = torch.as_tensor(loss) / self.num_data
        for name, value in {**parts, "loss": loss.detach()}.items():
            key, size = prefix + name, len(batch[0])
            self._sums[key] = self._sums.get(key, 0.0) + size * value
            self._weights[key] += size
        return loss

    def _means(self, prefix: str) -> dict[str, float]:
        return {
            name: float(total) / self._weights[name]
            for name, total in self._sums.items()
            if name.startswith(prefix)
        }


class BestParameters(pl.Callback):
    """Keeps the parameters of the epoch with the least validation loss, in memory.

    Without validation data it keeps those of the last epoch whose loss was finite.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.loss = math.inf
        self._values: list[Tensor] = []
        self._buffers: list[Tensor] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compare this epoch with the best one so far."""
        assert isinstance(module, PairModule)
        means = module._means("")
        loss = means.get("validation/loss")
        better = loss < self.loss if loss is not None else math.isfinite(means["loss"])
        if better:
            self.epoch, self.loss = trainer.current_epoch, means["loss"] if loss is None else loss
            self._values = [p.detach().clone() for p in module.trained]
            self._buffers = [b.detach().clone() for b in module.owners.buffers()]

    @torch.no_grad()
    def restore(self, module: PairModule) -> None:
        """Put the best values back."""
        if self.epoch is None:
            return
        for target, value in zip(module.trained, self._values, strict=True):
            target.copy_(value)
        for target, value in zip(module.owners.buffers(), self._buffers, strict=True):
            target.copy_(value)


class EpochProgress(pl.Callback):
    """One progress bar over the epochs, in a terminal, for runs longer than two seconds."""

    def __init__(self, epochs: int) -> None:
        self.bar = tqdm(
            total=epochs, desc="fit", unit="epoch", delay=2.0, disable=None, leave=False
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Advance the bar."""
        assert isinstance(module, PairModule)
        shown = {k: v for k, v in module._means("").items() if k.endswith("loss")}
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)
        self.bar.update()
