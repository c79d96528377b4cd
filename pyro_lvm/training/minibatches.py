"""The data of a run in minibatches, and the device that they are for."""

import torch
from torch.utils.data import DataLoader

from pyro_lvm.training.batches import Batches
from pyro_lvm.training.loaders import Loaded
from pyro_lvm.training.preflight import check_alike
from pyro_lvm.training.sources import Data
from pyro_lvm.training.transform import Transform

__all__ = ["Minibatches", "device_for", "in_minibatches"]

Minibatches = Batches | Loaded
_EVALUATION_BATCH = 1024  # validation needs no gradients, so that larger batches fit


def in_minibatches(
    data: Data | DataLoader,
    validation: Data | DataLoader | None,
    batch_size: int,
    transform: Transform | None = None,
) -> tuple[Minibatches, Minibatches | None]:
    """Training data, shuffled, and validation data if there are any.

    The latter have to be like the former as the pair sees them, which are transformed.
    """
    batches = _minibatches(data, batch_size, shuffle=True, name="data")
    if validation is None:
        return batches, None
    size = max(batch_size, _EVALUATION_BATCH)
    held_out = _minibatches(validation, size, shuffle=False, name="validation")
    check_alike(batches, held_out, transform)
    return batches, held_out


def device_for(device: str | torch.device, batches: Minibatches) -> torch.device:
    """The device that is meant, for these data."""
    if device != "auto":
        target = torch.device(device)
        if target.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"Expected a device of this machine; got '{device}', without CUDA.")
        return target
    if batches.device.type == "cuda":
        return batches.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _minibatches(
    data: Data | DataLoader, batch_size: int, *, shuffle: bool, name: str
) -> Minibatches:
    if isinstance(data, DataLoader):
        return Loaded(data, name=name)
    return Batches(data, batch_size, shuffle=shuffle, name=name)
