"""Fit a pair to data in memory: one call, on Lightning."""

import logging
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_lvm.checks import check_count
from pyro_lvm.infer import TraceInfo_ELBO
from pyro_lvm.pair import (
    Program,
    modules_of,
)
from pyro_lvm.training.batches import Batches
from pyro_lvm.training.preflight import (
    check_alike,
    check_loss,
    check_objective,
    check_pair,
    check_patience,
    check_settings,
)

if TYPE_CHECKING:
    from pyro_lvm.training.lightning import PairModule

__all__ = ["Fit", "Stopped", "fit"]

Stopped = Literal[
    "all epochs", "no improvement", "interrupted", "loss not finite", "a callback or setting"
]
_EVALUATION_BATCH = 1024  # validation needs no gradients, so that larger batches fit


@dataclass(frozen=True)
class Fit:
    """What a run leaves behind; the fitted parameters are in the pair itself.

    Attributes:
        history: Name -> one mean per epoch, in nats per datum: "loss", its parts as the objective
            reports them, and each of them as "validation/..." on the validation data.
        best_epoch: The epoch (from 0) whose parameters the pair now has: that of the least
            validation loss, or the last one without validation data; None if none was finished.
        stopped: Why the run ended.
        seconds: How long it took.
        num_parameters: How many numbers were trained.
    """

    history: dict[str, list[float]]
    best_epoch: int | None
    stopped: Stopped
    seconds: float
    num_parameters: int

    @property
    def num_epochs(self) -> int:
        """Finished epochs."""
        return len(self.history.get("loss", []))

    def __str__(self) -> str:
        head = (
            f"{self.num_epochs} epochs in {self.seconds:.1f} s ({self.stopped}), "
            f"{self.num_parameters} parameters"
        )
        if self.best_epoch is None:
            return head
        values = ", ".join(f"{k} {v[self.best_epoch]:.3f}" for k, v in self.history.items())
        return f"{head}\n  epoch {self.best_epoch}: {values} (nats per datum)"

    __repr__ = __str__


def fit(
    model: Program,
    guide: Program | None,
    data: Tensor | Sequence[Tensor],
    *,
    elbo: ELBO | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    validation: Tensor | Sequence[Tensor] | None = None,
    patience: int | None = None,
    plate: str | None = None,
    device: str | torch.device = "auto",
    seed: int | None = None,
    progress: bool = True,
    callbacks: Sequence[Any] = (),
    trainer: Mapping[str, Any] | None = None,
) -> Fit:
    """Fit a pair by stochastic variational inference.

    The pair is called on minibatches; inside the data plate it is scaled to all data, so that
    global latents count once. The loss per datum is minimised. Before training starts all data are
    run through the pair once, without gradients, so that what does not fit is refused there.

    At the end the pair has the parameters of the epoch with the least validation loss (without
    validation data, those of the last epoch), is on the device where it was, and its modules are in
    evaluation mode. Ctrl-C ends the run early, in the same way. So does a loss that is not finite:
    the pair never gets parameters whose loss on its first data is not.

    Args:
        model: The model, called with one batch of each tensor in ``data``.
        guide: The guide, likewise; None if it samples nothing.
        data: One tensor or several, first dimension the data.
        elbo: The objective, any of Pyro's or ours with a differentiable loss; ``TraceInfo_ELBO()``,
            which is the ELBO, if None.
        epochs: The most epochs.
        batch_size: The most data in a batch.
        optimizer: From parameters to a torch optimiser, such as
            ``lambda p: torch.optim.Adam(p, lr=1e-3)``, which it is if None.
        validation: Held-out data like ``data``.
        patience: Stop after so many epochs without a lower validation loss.
        plate: Name of the data plate; the objective's own, or "data", if None.
        device: "auto" (a CUDA device if there is one), "cpu", "cuda", "cuda:1", ...
        seed: Seed of all random numbers of the run; the generators go on from where they are if
            None.
        progress: Whether a terminal shows a progress bar for runs longer than two seconds.
        callbacks: Further callbacks of Lightning.
        trainer: Further arguments of ``lightning.pytorch.Trainer``.

    Returns:
        The history of the run.

    Raises:
        TypeError: If data are not tensors, the objective has no differentiable loss, or the
            optimizer is none of torch's.
        ValueError: If data, pair and objective do not fit together; nothing is trained then.
    """
    elbo = TraceInfo_ELBO() if elbo is None else elbo
    check_objective(elbo)
    plate = plate or str(getattr(elbo, "plate", "data"))
    check_count("epochs", epochs)
    check_patience(patience, validation)
    settings = dict(trainer or {})
    check_settings(settings)
    batches = Batches(data, batch_size, shuffle=True)
    held_out = None
    if validation is not None:
        held_out = Batches(validation, max(batch_size, _EVALUATION_BATCH), name="validation")
        check_alike(batches, held_out)
    target = _device(device, batches)
    if seed is not None:
        pyro.set_rng_seed(seed)
    with _quiet_lightning():
        from pyro_lvm.training.lightning import BestParameters, EpochProgress

    module = _checked_module(model, guide, elbo, optimizer or _adam, batches, held_out, plate)
    example = batches.smallest
    best = BestParameters()
    callbacks = [best, *callbacks]
    if progress:
        callbacks.append(EpochProgress(epochs))
    start = time.perf_counter()
    with _moved(module, target):
        stopped = _train(
            module,
            batches.to(target),
            held_out and held_out.to(target),
            epochs=epochs,
            patience=patience,
            target=target,
            callbacks=callbacks,
            settings=settings,
        )
    if not best.restore(module, example) and stopped != "interrupted":
        stopped = "loss not finite"
    return Fit(
        history=module.history,
        best_epoch=best.epoch,
        stopped=stopped,
        seconds=time.perf_counter() - start,
        num_parameters=sum(p.numel() for p in module.trained),
    )


def _checked_module(
    model: Program,
    guide: Program | None,
    elbo: ELBO,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    batches: Batches,
    held_out: Batches | None,
    plate: str,
) -> "PairModule":
    """What Lightning trains, once pair, objective and data have been seen to fit together."""
    from pyro_lvm.training.lightning import PairModule

    modules = modules_of(model, guide, getattr(elbo, "divergence", None))
    with _evaluating(modules) as home:
        for data_set in filter(None, (batches, held_out)):
            data_set.to(home or batches.device)
            check_pair(model, guide, data_set, plate, required=batches.num_batches > 1)
    with _evaluating(modules):
        module = PairModule(
            model,
            guide,
            elbo,
            optimizer,
            example=batches.smallest,
            num_data=batches.num_data,
            plate=plate,
        )
        check_loss(module, batches.smallest, held_out)
    return module


def _train(
    module: "PairModule",
    batches: Batches,
    held_out: Batches | None,
    *,
    epochs: int,
    patience: int | None,
    target: torch.device,
    callbacks: list[Any],
    settings: dict[str, Any],
) -> Stopped:
    """Run Lightning's loop, and say why it ended."""
    with _quiet_lightning():
        import lightning.pytorch as pl
        from lightning.pytorch.callbacks import EarlyStopping

        early = EarlyStopping("validation/loss", patience=patience or 0)
        if patience is not None:
            callbacks.append(early)
        trainer = pl.Trainer(
            **{
                "max_epochs": epochs,
                "accelerator": "gpu" if target.type == "cuda" else target.type,
                "devices": [target.index or 0] if target.type == "cuda" else 1,
                "callbacks": callbacks,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "inference_mode": False,  # latents of a validation run may be differentiated
                **settings,
            }
        )
        if _interrupted(lambda: trainer.fit(module, batches, held_out)):
            return "interrupted"
    if module.diverged:
        return "loss not finite"
    if trainer.current_epoch >= epochs:
        return "all epochs"
    return "no improvement" if early.stopped_epoch else "a callback or setting"


def _interrupted(train: Callable[[], None]) -> bool:
    """Whether Ctrl-C ended a run. Lightning would leave the program, and ignore later signals."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main_thread else None
    try:
        train()
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            return True
        raise
    except KeyboardInterrupt:
        return True
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
    return False


def _adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def _device(device: str | torch.device, batches: Batches) -> torch.device:
    if device != "auto":
        target = torch.device(device)
        if target.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"Expected a device of this machine; got '{device}', without CUDA.")
        return target
    if batches.device.type == "cuda":
        return batches.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[torch.device | None]:
    """Modules in evaluation mode, so that a check changes no statistics; yields where they are.

    Parameters that are frozen stay so, though Pyro would have them trained once it knows them.
    """
    frozen = [p for m in modules for p in m.parameters() if not p.requires_grad]
    modes = [(m, m.training) for module in modules for m in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield next((p.device for module in modules for p in module.parameters()), None)
    finally:
        for m, training in modes:
            m.training = training
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def _moved(module: "PairModule", target: torch.device) -> Iterator[None]:
    """The pair's parameters on a device, and afterwards back where each was, ready to evaluate."""
    tensors = [*module.owners.parameters(), *module.owners.buffers(), *module.loose]
    homes = [t.device for t in tensors]
    module.owners.train()
    try:
        for t in tensors:
            t.data = t.data.to(target)
        yield
    finally:
        for t, home in zip(tensors, homes, strict=True):
            t.data = t.data.to(home)
        for p in module.trained:
            p.grad = None  # of no use any more, and on the other device
        module.owners.eval()


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's remarks about devices, loggers, loaders and the end of the epochs."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*lightning.*")
        try:
            yield
        finally:
            logger.setLevel(level)
