"""The Lightning module that joins a pair, an objective and an optimiser."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pyro_lvm.compiled.objective import loss_and_parts, modules_of_objective, with_own_rates
from pyro_lvm.infer.schedules import at_end
from pyro_lvm.pair import (
    Program,
    modules_of,
    no_guide,
    parameters_of,
    plate_size,
    untouched_random_state,
)
from pyro_lvm.training.diagnosis import NOTHING_FOUND, explain
from pyro_lvm.training.discovery import Newcomers
from pyro_lvm.training.history import History
from pyro_lvm.training.randomness import random_state, set_random_state
from pyro_lvm.training.schedules import advance, schedules_of
from pyro_lvm.training.tensors import PairTensors, check_same_tensors
from pyro_lvm.training.together import Together
from pyro_lvm.training.transform import Transform, TransformedObjective, transformed

__all__ = ["Optimizer", "PairModule", "Scheduler", "Unseen", "is_at_hand"]

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Scheduler = Callable[[torch.optim.Optimizer], LRScheduler]
_SEEN_TOGETHER = 256  # steps on a device whose losses are looked at once, as a look waits for it


class PairModule(Together):
    """A (model, guide) pair with an objective, for ``lightning.pytorch.Trainer``.

    A batch is a tuple of tensors, the arguments of model and guide. What is minimised is the
    objective's loss divided by the number of all data: nats per datum. Each epoch adds the mean of
    the loss and, for objectives that report them, of its parts to ``history``; the same values are
    logged, validation under "validation/...".

    Schedules (the objective's, and any in the modules of pair and divergence) are advanced before
    every step. For validation they stand at their end.

    Parameters that the pair declares in a later call only are trained from that call on, in a
    group of the optimiser's defaults. A loss that is not finite ends the run.

    With several devices each process has a part of every batch (`Batches` are divided here, a
    DataLoader by Lightning's own sampler, so that its ``batch_size`` is that of one process). A
    divergence sees the latents of all of them, and history, diagnosis and end are the same in all.
    Parameters that come in a later call are refused then, and some that a step leaves without a
    gradient need Lightning's strategy "ddp_find_unused_parameters_true".

    A checkpoint of Lightning's holds all that the module needs to go on as if nothing had happened:
    besides parameters and buffers those of Pyro's param store, the history, and the states of all
    generators of random numbers.

    Args:
        model: The model.
        guide: The guide, or None for one that samples nothing.
        elbo: An objective with a differentiable loss.
        optimizer: From parameters to a torch optimiser.
        scheduler: From the optimiser to a scheduler of torch's, which is stepped after every step
            of it; None for none.
        example: The arguments of one call, to find the parameters that the pair declares.
        num_data: ``N``, the number of all training data.
        plate: Name of the data plate.
        transform: What training batches, and they alone, go through before the pair sees them.

    Attributes:
        schedules: The schedules of the run, by name.
        means: The means of this epoch so far, and of all epochs.
        tensors: What training changes, by name.
        diagnosis: Where a loss or a parameter was not finite, and the first site that shows why;
            None as long as all are.

    Raises:
        ValueError: If the pair has no parameters.
    """

    def __init__(
        self,
        model: Program,
        guide: Program | None,
        elbo: ELBO,
        optimizer: Optimizer,
        scheduler: Scheduler | None = None,
        *,
        example: tuple[Tensor, ...],
        num_data: int,
        plate: str = "data",
        transform: Transform | None = None,
    ) -> None:
        super().__init__()
        self.given = model, guide, elbo, optimizer, scheduler
        self.transform = transform
        guide = no_guide if guide is None else guide
        self.elbo, self.optimizer, self.num_data = elbo, optimizer, num_data
        self.scheduler = scheduler
        self.plate = plate
        self.owners = nn.ModuleList(modules_of(model, guide, *modules_of_objective(elbo)))
        self.schedules = schedules_of(elbo, self.owners)
        model, guide = (plate_size(p, num_data, plate=plate) for p in (model, guide))
        self.programs = model, guide
        self.example = example
        self.tensors = PairTensors(self.owners, self._declared)
        if not self.trained:
            raise ValueError(
                "Expected a pair with parameters that require a gradient; got none. Declare them "
                "by pyro.param, or make model and guide methods or modules that own them."
            )
        self.means = History()
        self.diagnosis: str | None = None
        self._newcomers = Newcomers()
        self._unseen: list[Unseen] = []
        self._random_state: dict[str, Any] | None = None

    @property
    def history(self) -> dict[str, list[float]]:
        """Name -> one mean per epoch."""
        return self.means.epochs

    @property
    def training_objective(self) -> ELBO:
        """The objective, of training batches as they come."""
        if self.transform is None:
            return self.elbo
        return TransformedObjective(self.elbo, self.transform)

    @property
    def trained(self) -> list[Tensor]:
        """All parameters that the optimiser changes, each once."""
        return list(self.tensors.trained.values())

    @property
    def diverged(self) -> bool:
        """Whether a loss or a parameter was not finite."""
        return self.diagnosis is not None

    def training_step(self, batch: tuple[Tensor, ...], batch_index: int) -> Tensor | None:
        """The loss of a minibatch, nats per datum; None where it is not finite.

        The run ends in that case.
        """
        self._advance_schedules()
        with self._newcomers:
            loss = self._step(batch, batch_index, "")
        if self._newcomers.found:
            self._train_newcomers()
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_index: int) -> None:
        """The loss of a minibatch that is not trained on, under the weights at the end."""
        with torch.no_grad(), at_end(self.schedules.values()):
            self._step(batch, batch_index, "validation/")

    def configure_optimizers(self) -> Any:
        """The optimiser, and its scheduler if there is one."""
        optimizer = self.make_optimizer()
        if self.scheduler is None:
            return optimizer
        scheduler: object = self.scheduler(optimizer)
        if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                f"Expected scheduler to make a torch.optim.lr_scheduler.LRScheduler to be stepped "
                f"after every step, such as lambda o: OneCycleLR(o, max_lr=1e-2, total_steps=1000)"
                f"; got one that makes {type(scheduler).__name__}."
            )
        each_step = {"scheduler": scheduler, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": each_step}

    def make_optimizer(self) -> torch.optim.Optimizer:
        """An optimiser of all parameters, each once; those with a rate of their own come second."""
        first, *later = (list(group.values()) for group in self.tensors.groups)
        parameters, others = with_own_rates(self.elbo, first)
        optimizer = self.optimizer(parameters)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Expected optimizer to make a torch.optim.Optimizer from parameters, such as "
                f"lambda p: torch.optim.Adam(p, lr=1e-3); got one that makes "
                f"{type(optimizer).__name__}."
            )
        for group in [*others, *({"params": parameters} for parameters in later)]:
            optimizer.add_param_group(group)
        return optimizer

    def on_fit_start(self) -> None:
        """Go on with the random numbers of the checkpoint, if the run goes on from one."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None

    def on_validation_epoch_end(self) -> None:
        """Hand the validation means to Lightning: early stopping and loggers read them."""
        self.log_dict(self.means.now("validation/"))

    def on_train_epoch_end(self) -> None:
        """Add the epoch's means to the history."""
        self._look()
        self.come_together()
        means = self.means.end_epoch()
        self.log_dict({k: v for k, v in means.items() if not k.startswith("validation/")})
        if not all(math.isfinite(v) for k, v in means.items() if k.endswith("loss")):
            self.end(f"The mean loss of epoch {self.trainer.current_epoch} is not finite.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the state of a module lacks."""
        checkpoint["pair"] = {
            "tensors": self.tensors.state_dict(),
            "means": self.means.state_dict(),
            **_by_rank("random", self.processes.all_of(random_state())),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another pair; take up the rest.

        Raises:
            ValueError: If parameters or buffers differ in names or shapes.
        """
        pair, state = checkpoint["pair"], checkpoint["state_dict"]
        if self.tensors.lacks(pair["tensors"]):
            self._declare_under(state, pair["tensors"])
        check_same_tensors(self.state_dict(), state)
        self.tensors.load_state_dict(pair["tensors"])
        self.means.load_state_dict(pair["means"], self.trained[0].device)
        self._random_state = pair.get(f"random{self.processes.rank or ''}")

    def get_extra_state(self) -> dict[str, Tensor]:
        """The tensors that belong to no module of ours: Pyro's param store, closed-over buffers."""
        return {name: t.detach() for name, t in self.tensors.outside().items()}

    @torch.no_grad()
    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Put their values back."""
        for name, tensor in self.tensors.outside().items():
            if name in state:  # a checkpoint without it has been refused before
                tensor.copy_(state[name])

    def loss(
        self, batch: tuple[Tensor, ...], *, validation: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a minibatch and its parts by name, nats per datum, and the weights."""
        elbo = self.elbo if validation else self.training_objective
        loss, parts = loss_and_parts(elbo, *self.programs, batch)
        loss = loss / self.num_data
        weights = {name: schedule.weight.detach() for name, schedule in self.schedules.items()}
        return loss, {**weights, **parts, "loss": loss.detach()}

    def has_finite_loss(self, batch: tuple[Tensor, ...]) -> bool:
        """Whether parameters and loss are finite."""
        finite = self.tensors.are_finite()
        with untouched_random_state(batch), torch.no_grad():
            try:
                finite = finite and bool(torch.isfinite(self.loss(batch)[0]))
            except (ValueError, RuntimeError):  # no distribution has these parameters
                finite = False
        return not self.processes.any(not finite)

    def end(self, diagnosis: str) -> None:
        """End the run, since something is not finite; the first diagnosis counts."""
        self.diagnosis = self.diagnosis or diagnosis
        self.trainer.should_stop = True

    def diagnose(
        self,
        batch: tuple[Tensor, ...],
        rows: Sequence[int] | None = None,
        *,
        validation: bool = False,
    ) -> str:
        """What is not finite when the pair is run on a batch, in words.

        Args:
            batch: The arguments of the pair.
            rows: The numbers of the data in it, where they are known.
            validation: Whether they are data to validate by, which are not transformed.
        """
        batch = batch if validation else transformed(self.transform, batch)
        not_finite = self.tensors.not_finite()
        return explain(*self.programs, batch, not_finite, plate=self.plate, rows=rows)

    def _advance_schedules(self) -> None:
        """Put the weights of the next step in force."""
        if self.schedules:
            trainer = self.trainer
            advance(self.schedules, step=trainer.global_step, epoch=trainer.current_epoch)

    def _step(self, batch: tuple[Tensor, ...], index: int, prefix: str) -> Tensor | None:
        batch = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        before = torch.get_rng_state()  # less than a microsecond
        try:
            # fit has shown every datum to Pyro's checks; here they would raise where a run diverges
            with pyro.validation_enabled(False):
                evaluate = partial(self.loss, validation=bool(prefix))
                loss, parts, size = self.processes.evaluate(evaluate, batch)
        except (ValueError, RuntimeError):
            if self.tensors.are_finite():
                raise
            loss = torch.tensor(math.nan)
            parts, size = {"loss": loss}, len(batch[0])
        self.means.add(parts, size, prefix)
        if not is_at_hand(loss):
            self._look_later(Unseen(prefix, index, parts["loss"]))
        elif not math.isfinite(parts["loss"].item()):
            with untouched_random_state(batch):
                torch.set_rng_state(before)  # the draws that led there
                self._end_at(prefix, index, batch, parts["loss"])
            return self.no_step()
        return loss

    def _look_later(self, unseen: "Unseen") -> None:
        """Keep a loss of which the device may not have come to know yet."""
        self._unseen.append(unseen)
        if len(self._unseen) >= _SEEN_TOGETHER:
            self._look()

    def _look(self) -> None:
        """Look at the losses that were kept, which waits for the device."""
        unseen, self._unseen = self._unseen, []
        if not unseen or torch.stack([u.loss for u in unseen]).isfinite().all():
            return
        first = next(u for u in unseen if not torch.isfinite(u.loss))
        loader = self._loader(first.prefix)
        batch = loader.batch(first.batch_index) if hasattr(loader, "batch") else None
        self._end_at(first.prefix, first.batch_index, batch, first.loss)

    def _end_at(
        self, prefix: str, index: int, batch: tuple[Tensor, ...] | None, loss: Tensor
    ) -> None:
        """End the run at a batch whose loss is not finite."""
        loader = self._loader(prefix)
        rows = loader.rows(index).tolist() if hasattr(loader, "rows") else None
        kind = "validation batch" if prefix else "batch"
        where = f"The loss was {loss.item()} in epoch {self.trainer.current_epoch}, {kind} {index}"
        why = "" if batch is None else f": {self.diagnose(batch, rows, validation=bool(prefix))}"
        reasons = self.processes.all_of(why)
        why = next((r for r in reasons if not r.endswith(NOTHING_FOUND)), why)
        self.end(f"{where}{why}.")

    def _loader(self, prefix: str) -> Any:
        return self.trainer.val_dataloaders if prefix else self.trainer.train_dataloader

    def _train_newcomers(self) -> None:
        """Let the optimiser train what the pair has declared in this step, from this step on."""
        parameters = self.tensors.take_in(self._newcomers.declared)
        if parameters and self.processes.size > 1:
            raise ValueError(
                f"Expected all parameters to be declared before several processes train them; got "
                f"{', '.join(list(self.tensors.groups[-1])[:3])} in a later call. Let the pair "
                f"declare them in every call, or train in one process."
            )
        if parameters and self.scheduler is not None:
            raise ValueError(
                f"Expected all parameters to be declared before a scheduler has their learning "
                f"rates; got {', '.join(list(self.tensors.groups[-1])[:3])} in a later call. Let "
                f"the pair declare them in every call, or pass no scheduler."
            )
        if parameters:
            self.trainer.optimizers[0].add_param_group({"params": parameters})

    def _declared(self, device: torch.device | None) -> list[Tensor]:
        """What a run of the pair declares."""
        example = tuple(t.to(device) for t in self.example)
        with untouched_random_state(example):
            example = transformed(self.transform, example)
        return parameters_of(*self.programs, example)

    def _declare_under(self, state: Mapping[str, Any], known: Mapping[str, Any]) -> None:
        """Run the pair as it was when the checkpoint was written, for it may declare more then."""
        before = {name: deepcopy(value) for name, value in self.state_dict().items()}
        with suppress(RuntimeError, KeyError):  # another pair, as will be seen
            self.load_state_dict(state, strict=False)
            self.tensors.find_again(known)
        self.load_state_dict(before, strict=False)


def _by_rank(name: str, values: list[Any]) -> dict[str, Any]:
    """A value of each process; that of the first has no number."""
    return {f"{name}{rank or ''}": value for rank, value in enumerate(values)}


class Unseen(NamedTuple):
    """The loss of a batch that nobody has looked at yet."""

    prefix: str
    batch_index: int
    loss: Tensor


def is_at_hand(loss: Tensor) -> bool:
    """Whether a loss can be looked at without waiting for a device."""
    return loss.device.type == "cpu"
