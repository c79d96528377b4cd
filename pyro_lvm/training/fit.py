"""Fit a pair to data: one call, on Lightning."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_lvm.checks import check_count
from pyro_lvm.compiled.objective import check_differentiable, modules_of_objective
from pyro_lvm.compiled.step_graph import Clip
from pyro_lvm.infer import TraceInfo_ELBO
from pyro_lvm.pair import Program, modules_of
from pyro_lvm.training.batches import Batches
from pyro_lvm.training.choice import Compile, takes_compiled_steps
from pyro_lvm.training.ending import settled, warn_at_end, warn_of_each
from pyro_lvm.training.groups import Groups
from pyro_lvm.training.minibatches import Minibatches, device_for, in_minibatches
from pyro_lvm.training.preflight import (
    check_checkpoints,
    check_loss,
    check_pair,
    check_patience,
    check_settings,
)
from pyro_lvm.training.result import Fit, Stopped
from pyro_lvm.training.resuming import as_before, description, last_checkpoint
from pyro_lvm.training.schedules import (
    advance,
    is_weight,
    last_positions,
    too_short,
)
from pyro_lvm.training.sources import Data
from pyro_lvm.training.strategies import (
    check_strategy,
    device_of_process,
    distributed_settings,
)
from pyro_lvm.training.surroundings import evaluating, interrupted, moved, quiet_lightning
from pyro_lvm.training.transform import Transform

if TYPE_CHECKING:
    from pyro_lvm.training.lightning import PairModule

__all__ = ["Fit", "Stopped", "fit"]

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
_STEPS_IN_A_GROUP = 32  # Lightning's work around a batch is done once for as many compiled steps


def fit(
    model: Program,
    guide: Program | None,
    data: Data | DataLoader,
    *,
    elbo: ELBO | None = None,
    epochs: int = 100,
    batch_size: int = 128,
    optimizer: MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    transform: Transform | None = None,
    validation: Data | DataLoader | None = None,
    patience: int | None = None,
    plate: str | None = None,
    device: str | torch.device = "auto",
    seed: int | None = None,
    compile: Compile = "auto",
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | timedelta = timedelta(minutes=1),
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    trainer: Mapping[str, Any] | None = None,
) -> Fit:
    """Fit a pair by stochastic variational inference.

    The pair is called on minibatches; inside the data plate it is scaled to all data, so that
    global latents count once. The loss per datum is minimised. Before training starts all data are
    run through the pair once, without gradients, so that what does not fit is refused there.
    Parameters that the pair declares in a later call only are trained from that call on.

    At the end the pair has the parameters of the epoch with the least validation loss (without
    validation data, those of the last epoch), is on the device where it was, and its modules are in
    evaluation mode. Ctrl-C ends the run early, in the same way. So does a loss that is not finite:
    the pair never gets parameters whose loss on its first data is not, and a warning names the
    batch and the first site that is not finite.

    Schedules of weights (`LinearSchedule` and others, in the objective or in a module of the pair)
    start anew with the run, and are advanced before every step; the history has the mean of each
    over the steps of an epoch. On validation data they stand at their end: losses of different
    epochs can be compared under the same weights only, so that the best epoch and ``patience`` are
    about the objective in which the schedules end. A warning before the first step says which
    schedules are longer than the run, and one at the end which it has left early, also where it was
    interrupted; not where the loss was not finite, which has a warning of its own.

    A divergence with a ``learning_rate`` (`Adversarial`) has it in a second group of the optimiser.
    A scheduler that sets one rate for all groups (``OneCycleLR`` with a number) sets that one too.

    With ``checkpoint_dir`` a run that was killed goes on from its last checkpoint, by the same call
    with ``resume=True``, and on the CPU ends with the same parameters to the last bit. A checkpoint
    holds parameters, buffers, the optimiser, the generators of random numbers (torch's, NumPy's,
    Python's), the order of the epoch, the history and the best parameters; what a pair or a
    callback keeps elsewhere, such as a counter in Python, it does not hold, unless the callback has
    a ``state_dict``.

    With ``trainer={"devices": 2, "strategy": "ddp"}``, and ``num_nodes`` for several machines, so
    many processes train the pair together. Each takes its part of every batch, and all have the
    same parameters, history and end; a divergence sees the latents of all of them. One step is that
    of a single process with the whole batch, but for other random numbers, and for the statistics
    of batch normalisation, which are of one process's part. Lightning starts the script once more
    for every process (or finds those of ``torchrun`` or SLURM), so that each must come to the same
    call of `fit` with the same data. The first process alone writes checkpoints. Where an error
    ends one of them, the others end with an error too. Parameters that come in a later call are
    refused; "ddp" looks for parameters without a gradient in each step, and a ``DDPStrategy()`` of
    your own need not. Of Lightning's strategies only those that start scripts can be used:
    processes that are forked or spawned ("ddp_spawn", "ddp_notebook") would keep history and
    parameters to themselves.

    Args:
        model: The model, called with one batch of each tensor in ``data``.
        guide: The guide, likewise; None if it samples nothing.
        data: One tensor or several, first dimension the data; or a dataset of torch's, whose items
            are tensors or tuples of tensors and need not fit into memory; or a DataLoader, whose
            batches are taken as they come. A DataLoader that does not draw its order from torch's
            global generator (``shuffle=True`` does) is not resumed to the last bit.
        elbo: The objective, any of ours, or of Pyro's with a differentiable loss, or
            ``TraceGraph_ELBO``; ``TraceInfo_ELBO()``, which is the ELBO, if None.
        epochs: The most epochs.
        batch_size: The most data in a batch, of all processes together where several share it; a
            DataLoader has its own, which is shared likewise.
        optimizer: From parameters to a torch optimiser, such as
            ``lambda p: torch.optim.Adam(p, lr=1e-3)``, which it is if None.
        scheduler: From the optimiser to a scheduler of torch's, which is stepped after every step
            of it, such as ``lambda o: OneCycleLR(o, max_lr=1e-2, total_steps=5000)``; an epoch has
            ``ceil(N / batch_size)`` steps.
        transform: From the tensors of a batch to what the pair is called with, applied afresh to
            every batch that is trained on and to no other: ``torch.bernoulli`` makes binary images
            of grey ones (dynamic binarisation), ``lambda x: x + noise * torch.randn_like(x)`` adds
            noise. It draws from torch's global generator and returns as many data.
        validation: Held-out data like ``data``, as the pair is to see them.
        patience: Stop after so many epochs without a lower validation loss.
        plate: Name of the data plate; the objective's own, or "data", if None.
        device: "auto" (a CUDA device if there is one), "cpu", "cuda", "cuda:1", ...
        seed: Seed of all random numbers of the run; the generators go on from where they are if
            None.
        compile: Whether loss, gradient and update are compiled to one graph, see `CompiledStep`;
            "auto" compiles runs of 4,000 steps and more, if it can. It takes some ten seconds, and
            then a step costs its arithmetic and no Python. Data must be tensors, the optimiser
            Adam, AdamW, SGD or Pyro's ClippedAdam, and callbacks act between epochs. Python that
            changes from step to step is frozen while a graph is in use: the graph is compared with
            Python at the start of every epoch, and given up with a warning if they differ.
        progress: Whether a terminal shows a progress bar for runs longer than two seconds.
        checkpoint_dir: A folder for checkpoints, which is made if need be; none are written if
            None. It keeps the last two, and ``best.pt`` with the best epoch's parameters.
        checkpoint_every: Epochs from one checkpoint to the next, or a time, which can also end
            within an epoch. There is one before the first step and one at the end in any case.
        resume: Whether to go on from the last checkpoint in ``checkpoint_dir`` that can be read. If
            there is none the run starts afresh. More epochs and another patience are allowed.
        callbacks: Further callbacks of Lightning.
        trainer: Further arguments of ``lightning.pytorch.Trainer``.

    Returns:
        The history of the run.

    Raises:
        TypeError: If data are not tensors, the objective has no differentiable loss, or the
            optimizer or the scheduler is none of torch's.
        ValueError: If data, pair and objective do not fit together, compiled steps are asked for
            where they are not possible, or the checkpoint is that of another run; nothing is
            trained then.
    """
    elbo = TraceInfo_ELBO() if elbo is None else elbo
    check_differentiable(elbo)
    plate = plate or str(getattr(elbo, "plate", "data"))
    check_count("epochs", epochs)
    check_patience(patience, validation)
    directory = check_checkpoints(checkpoint_dir, checkpoint_every, resume)
    settings = dict(trainer or {})
    check_settings(settings)
    batches, held_out = in_minibatches(data, validation, batch_size, transform)
    target = device_of_process(device_for(device, batches), settings)
    if seed is not None:
        pyro.set_rng_seed(seed)
    start = time.perf_counter()
    with quiet_lightning():
        from pyro_lvm.training.callbacks import BestParameters, EpochProgress

    module = _checked_module(
        (model, guide, elbo, optimizer or _adam, scheduler), batches, held_out, plate, transform
    )
    compiled = takes_compiled_steps(
        as_before(compile, directory) if resume else compile,
        batches,
        module.make_optimizer,
        epochs=epochs,
        callbacks=callbacks,
        settings=settings,
    )
    if compiled:
        module = _compiled(module, settings)
    example = batches.smallest
    best = BestParameters()
    watching = [best, *callbacks, *([EpochProgress(epochs)] if progress else [])]
    foretold = last_positions(
        module.schedules, epochs=epochs, batches=batches.num_batches, settings=settings
    )
    warn_of_each(too_short(module.schedules, foretold, over=False).values())
    with moved(module, target):
        advance(module.schedules, step=0, epoch=0)
        checkpoint = None
        if directory is not None:
            run = description(module, batches, held_out, seed, compiled=compiled)
            checkpoint = last_checkpoint(directory, run, epochs) if resume else None
            watching.append(_writer(module, directory, checkpoint_every, best, run, checkpoint))
        stopped = _train(
            module,
            _grouped(batches.to(target)) if compiled else batches.to(target),
            held_out and held_out.to(target),
            epochs=epochs,
            patience=patience,
            target=target,
            callbacks=watching,
            settings=settings,
            checkpoint=checkpoint,
        )
    stopped = settled(module, best, example, stopped)
    warn_at_end(module, best.epoch, foretold)
    return _result(module, best.epoch, stopped, time.perf_counter() - start)


def _checked_module(
    given: tuple[Program, Program | None, ELBO, MakeOptimizer, MakeScheduler | None],
    batches: Minibatches,
    held_out: Minibatches | None,
    plate: str,
    transform: Transform | None,
) -> "PairModule":
    """What Lightning trains, once pair, objective and data have been seen to fit together."""
    from pyro_lvm.training.lightning import PairModule

    model, guide, elbo, *_ = given
    modules = modules_of(model, guide, *modules_of_objective(elbo))
    if hasattr(elbo, "guide_of"):  # stories without a guide
        guide = elbo.guide_of(model, guide)
    with evaluating(modules) as home:
        for data_set in (batches, held_out) if held_out is not None else (batches,):
            data_set.to(home or batches.device)
            check_pair(
                model,
                guide,
                data_set,
                plate,
                required=batches.num_batches > 1,
                transform=transform if data_set is batches else None,
            )
    with evaluating(modules):
        module = PairModule(
            *given,
            example=batches.smallest,
            num_data=batches.num_data,
            plate=plate,
            transform=transform,
        )
        if module.scheduler is not None:
            module.configure_optimizers()  # raises here, and not when all is under way
        check_loss(module, batches.smallest, held_out)
    return module


def _result(module: "PairModule", best_epoch: int | None, stopped: Stopped, seconds: float) -> Fit:
    return Fit(
        history=module.history,
        best_epoch=best_epoch,
        stopped=stopped,
        seconds=seconds,
        num_parameters=sum(p.numel() for p in module.trained),
        diagnosis=module.diagnosis,
        weights=tuple(name for name in module.history if is_weight(name, module.schedules)),
    )


def _compiled(module: "PairModule", settings: dict[str, Any]) -> "PairModule":
    """The same pair for compiled steps, which clip gradients themselves."""
    from pyro_lvm.training.compiled_module import CompiledPairModule

    bound = settings.pop("gradient_clip_val", None) or None
    kind = settings.pop("gradient_clip_algorithm", None) or "norm"
    if kind not in ("norm", "value"):
        raise ValueError(f"Expected gradient_clip_algorithm 'norm' or 'value'; got {kind!r}.")
    return CompiledPairModule.of(module, Clip(**{kind: bound}))


def _grouped(batches: Minibatches) -> Groups:
    assert isinstance(batches, Batches)
    return Groups(batches, _STEPS_IN_A_GROUP)


def _writer(
    module: "PairModule",
    directory: Path,
    every: int | timedelta,
    best: Any,
    run: dict[str, Any],
    checkpoint: Path | None,
) -> Any:
    """What writes the checkpoints of a run, which goes on from one or starts afresh."""
    from pyro_lvm.training.saving import Checkpoints

    module.goes_on_from = None if checkpoint is None else checkpoint.name
    return Checkpoints(directory, every, best, run, fresh=checkpoint is None)


def _train(
    module: "PairModule",
    batches: Minibatches | Groups,
    held_out: Minibatches | None,
    *,
    epochs: int,
    patience: int | None,
    target: torch.device,
    callbacks: list[Any],
    settings: dict[str, Any],
    checkpoint: Path | None,
) -> Stopped:
    """Run Lightning's loop, and say why it ended."""
    with quiet_lightning():
        import lightning.pytorch as pl

        from pyro_lvm.training.callbacks import Patience
        from pyro_lvm.training.saving import checkpoint_settings

        waiting = None if patience is None else Patience(patience)
        trainer = pl.Trainer(
            **{
                "max_epochs": epochs,
                "accelerator": "gpu" if target.type == "cuda" else target.type,
                "devices": [target.index or 0] if target.type == "cuda" else 1,
                "callbacks": [*callbacks, *filter(None, [waiting])],
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
                "inference_mode": False,  # latents of a validation run may be differentiated
                **distributed_settings(settings),
                **checkpoint_settings(callbacks, settings),
            }
        )
        check_strategy(trainer)
        if interrupted(lambda: trainer.fit(module, batches, held_out, ckpt_path=checkpoint)):
            return "interrupted"
    if module.diverged:
        return "loss not finite"
    if trainer.current_epoch >= epochs:
        return "all epochs"
    return "no improvement" if waiting and waiting.exhausted else "a callback or setting"


def _adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)
