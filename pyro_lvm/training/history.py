"""The means of an epoch, and those of all epochs."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

__all__ = ["History"]


class History:
    """Sums the values of minibatches into means over the data of an epoch.

    Attributes:
        epochs: Name -> one mean per finished epoch; nan where it has none.
    """

    def __init__(self) -> None:
        self.epochs: dict[str, list[float]] = {}
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, int] = defaultdict(int)

    @property
    def num_epochs(self) -> int:
        """Finished epochs."""
        return len(next(iter(self.epochs.values()), []))

    def add(self, values: dict[str, Tensor], size: int, prefix: str = "") -> None:
        """Add the means of a minibatch of this size."""
        for name, value in values.items():
            total = self._sums.get(prefix + name)
            # on the device, without waiting for it
            self._sums[prefix + name] = (
                value * size if total is None else torch.add(total, value, alpha=size)
            )
            self._weights[prefix + name] += size

    def now(self, prefix: str = "") -> dict[str, float]:
        """Means over the data of this epoch so far."""
        return {
            name: float(total) / self._weights[name]
            for name, total in self._sums.items()
            if name.startswith(prefix)
        }

    def end_epoch(self) -> dict[str, float]:
        """Keep the means of this epoch, and start the next one."""
        means, finished = self.now(), self.num_epochs
        for name in {**self.epochs, **means}:
            self.epochs.setdefault(name, [math.nan] * finished).append(means.get(name, math.nan))
        self._sums, self._weights = {}, defaultdict(int)
        return means

    def state_dict(self) -> dict[str, Any]:
        """All of it, in the middle of an epoch too."""
        return {"epochs": self.epochs, "sums": self._sums, "weights": dict(self._weights)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what `state_dict` returned, with sums on a device."""
        self.epochs = {name: list(values) for name, values in state["epochs"].items()}
        self._sums = {name: value.to(device) for name, value in state["sums"].items()}
        self._weights = defaultdict(int, state["weights"])
