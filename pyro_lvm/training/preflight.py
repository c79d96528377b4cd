"""What is looked at before training starts, so that nothing is refused half-way."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_lvm.checks import check_count, check_positive
from pyro_lvm.pair import (
    Program,
    data_plate,
    device_of,
    inspect_pair,
    no_guide,
    untouched_random_state,
)
from pyro_lvm.training.batches import Batches
from pyro_lvm.training.checkpoint import has_checkpoints
from pyro_lvm.training.loaders import Loaded
from pyro_lvm.training.transform import Transform, transformed

if TYPE_CHECKING:
    from pyro_lvm.training.lightning import PairModule

__all__ = [
    "check_alike",
    "check_checkpoints",
    "check_loss",
    "check_pair",
    "check_patience",
    "check_same_run",
    "check_settings",
]


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings of the trainer that fit itself sets."""
    ours = {"callbacks": "callbacks=", "max_epochs": "epochs=", "accelerator": "device="}
    for name in ours.keys() & settings.keys():
        raise ValueError(
            f"Expected trainer settings other than '{name}', which fit sets; got one. Pass "
            f"{ours[name]} instead."
        )


def check_pair(
    model: Program,
    guide: Program | None,
    batches: Batches | Loaded,
    plate: str,
    *,
    required: bool,
    transform: Transform | None = None,
) -> None:
    """Run all data through the pair, as it will see them."""
    start = 0
    for raw in batches.in_order():
        end = start + len(raw[0])
        with untouched_random_state(raw):
            batch = transformed(transform, raw)
        try:
            structure = inspect_pair(model, guide, batch, plate=plate, require_plate=required)
        except ValueError as error:
            error.add_note(f"This is what model and guide say of {batches.name}[{start}:{end}].")
            raise
        except Exception as error:
            kinds = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in batch)
            raise ValueError(
                f"Expected {batches.name} that model and guide can be called with; got a batch "
                f"{kinds}, on which they raised {type(error).__name__}: {error}. Convert the data, "
                f"for example by .to(torch.get_default_dtype()) or .reshape, or mend the pair."
            ) from error
        if structure.plate is not None and structure.num_data != len(batch[0]):
            _check_subsampled(model, guide, batch, plate)
        start = end


def _check_subsampled(
    model: Program, guide: Program | None, batch: tuple[Tensor, ...], plate: str
) -> None:
    """Refuse a data plate that is neither the batch nor a part of a larger plate."""
    with torch.no_grad(), poutine.block(), untouched_random_state(batch), device_of(batch):
        guide_trace = poutine.trace(guide or no_guide).get_trace(*batch)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch)
    frame = data_plate((guide_trace, model_trace), plate)
    if frame.full_size in (None, frame.size):
        raise ValueError(
            f"Expected plate '{plate}' to hold the {len(batch[0])} data of a batch; got size "
            f"{frame.size}. The data are along the first dimension of each tensor: write "
            f"pyro.plate('{plate}', len(x)), or name the plate that holds them by plate=."
        )


def check_loss(
    module: "PairModule", example: tuple[Tensor, ...], held_out: Batches | Loaded | None
) -> None:
    """Run the objective over the smallest batches."""
    with untouched_random_state(example), torch.no_grad():
        loss, _ = module.loss(example)
        if held_out is not None:
            module.loss(held_out.smallest, validation=True)
    if not torch.isfinite(loss):
        raise ValueError(
            f"Expected a finite loss before training; got {float(loss)} for the first "
            f"{len(example[0])} data. Start from other parameters, or look for the site whose "
            f"log-probability is infinite by pyro.poutine.trace(model).get_trace(...)."
        )


def check_alike(
    batches: Batches | Loaded, held_out: Batches | Loaded, transform: Transform | None
) -> None:
    """Refuse validation data of another kind than what the pair sees of the training data."""
    with untouched_random_state(batches.smallest):
        seen = transformed(transform, batches.smallest)
    kinds = [[(t.shape[1:], t.dtype) for t in batch] for batch in (seen, held_out.smallest)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"Expected validation data of the same shapes and dtypes as the training data, "
            f"{kinds[0]}; got {kinds[1]}."
        )


def check_patience(patience: int | None, validation: object) -> None:
    """Refuse patience without anything to wait for."""
    if patience is not None:
        check_count("patience", patience)
        if validation is None:
            raise ValueError(
                "Expected validation data, whose loss patience waits for; got none. Pass "
                "validation=, or no patience."
            )


def check_checkpoints(
    directory: str | Path | None, every: int | timedelta, resume: bool
) -> Path | None:
    """Refuse a folder for checkpoints that can't be one, or that has those of another run.

    Returns:
        The folder, which is there now; None if none is wanted.
    """
    if isinstance(every, timedelta):
        check_positive("checkpoint_every in seconds", every.total_seconds(), minimum=0)
    else:
        check_count("checkpoint_every", every)
    if directory is None:
        if resume:
            raise ValueError("Expected checkpoint_dir= to resume from; got none. Pass a folder.")
        return None
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"Expected checkpoint_dir to be a folder; got the file {directory}.")
    directory.mkdir(parents=True, exist_ok=True)
    if not resume and has_checkpoints(directory):
        raise ValueError(
            f"Expected a checkpoint_dir without checkpoints for a new run; got some in "
            f"{directory}. Pass resume=True to go on from them, or another folder."
        )
    return directory


def check_same_run(path: Path, state: dict[str, Any], run: dict[str, Any], epochs: int) -> None:
    """Refuse the checkpoint of a run with other data or settings, or one that is too far."""
    saved = state.get("settings", {})
    different = [
        f"{name} {saved.get(name)} instead of {value}"
        for name, value in run.items()
        if saved.get(name) != value
    ]
    if different:
        raise ValueError(
            f"Expected a checkpoint of this run in {path}; got one with {'; '.join(different)}. "
            f"Resume with the same data and settings, or start afresh in another checkpoint_dir."
        )
    finished = len(state["pair"]["means"]["epochs"].get("loss", []))
    if finished > epochs:
        raise ValueError(
            f"Expected epochs >= {finished}, which the checkpoint {path} has behind it; got "
            f"{epochs}. Pass more epochs, or start afresh in another checkpoint_dir."
        )
