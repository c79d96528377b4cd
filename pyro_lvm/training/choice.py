"""Whether a run takes compiled steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from pyro_lvm.compiled.updates import rule_of
from pyro_lvm.training.batches import Batches
from pyro_lvm.training.loaders import Loaded
from pyro_lvm.training.sources import Tensors

__all__ = ["Compile", "takes_compiled_steps"]

Compile = bool | Literal["auto"]
_STEPS_THAT_PAY = 4_000  # a graph takes 7 to 16 s to compile, and saves 3 to 6 ms a step
_HOOKS_OF_A_BATCH = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
)
_SETTINGS = {  # of a trainer, those that do not look into a step
    "barebones",
    "check_val_every_n_epoch",
    "default_root_dir",
    "deterministic",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_val_batches",
    "logger",
    "max_time",
    "min_epochs",
    "min_steps",
    "num_sanity_val_steps",
    "plugins",
}


def takes_compiled_steps(
    wanted: Compile,
    batches: Batches | Loaded,
    optimizer: Callable[[], torch.optim.Optimizer],
    *,
    epochs: int,
    callbacks: Sequence[Any],
    settings: Mapping[str, Any],
) -> bool:
    """Whether the steps of a run are compiled: if that is possible, and if it pays.

    Args:
        wanted: True, False or "auto".
        batches: The minibatches.
        optimizer: Makes what makes the updates; it is asked only where it matters.
        epochs: The most epochs.
        callbacks: The user's callbacks.
        settings: The user's settings of the trainer.

    Raises:
        ValueError: If compiled steps are asked for and not possible.
    """
    if not isinstance(wanted, bool) and wanted != "auto":
        raise ValueError(f"Expected compile to be True, False or 'auto'; got {wanted!r}.")
    if wanted is False or (wanted == "auto" and epochs * len(batches) < _STEPS_THAT_PAY):
        return False
    obstacle = next(_obstacles(batches, optimizer, callbacks, settings), None)
    if wanted is True and obstacle is not None:
        raise ValueError(f"{obstacle} Change that, or pass compile=False.")
    return obstacle is None


def _obstacles(
    batches: Batches | Loaded,
    optimizer: Callable[[], torch.optim.Optimizer],
    callbacks: Sequence[Any],
    settings: Mapping[str, Any],
) -> Iterator[str]:
    """What is in the way of compiled steps, in words."""
    if not isinstance(batches, Batches) or not isinstance(batches.source, Tensors):
        yield "Expected data in memory, which compiled steps pick rows of; got a dataset."
    others = sorted(settings.keys() - _SETTINGS)
    if others:
        yield f"Expected a trainer's settings that compiled steps can follow; got {others}."
    for callback in callbacks:
        hooks = [name for name in _HOOKS_OF_A_BATCH if _has_own(callback, name)]
        if hooks:
            name = type(callback).__name__
            yield f"Expected callbacks that act between epochs; got {name} with {hooks}."
    made = optimizer()
    try:
        for group in made.param_groups:
            rule_of(made, group)
    except ValueError as error:
        yield str(error)


def _has_own(callback: Any, hook: str) -> bool:
    """Whether a callback does something at a hook of Lightning's."""
    from lightning.pytorch import Callback

    return getattr(type(callback), hook, None) is not getattr(Callback, hook)
