"""Fitting pairs: minibatches, validation, early stopping and devices, on Lightning.

`pyro_lvm.training.lightning` holds the module that joins a pair, an objective and an optimiser; it
is imported only where Lightning is needed.
"""

from typing import TYPE_CHECKING, Any

from pyro_lvm.training.batches import Batches
from pyro_lvm.training.fit import Fit, fit

if TYPE_CHECKING:
    from pyro_lvm.training.collapse_metrics import CollapseMetrics

__all__ = ["Batches", "CollapseMetrics", "Fit", "fit"]


def __getattr__(name: str) -> Any:
    """Callbacks, with which Lightning is imported."""
    if name == "CollapseMetrics":
        from pyro_lvm.training.collapse_metrics import CollapseMetrics

        return CollapseMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
