"""Fitting pairs: minibatches, validation, early stopping and devices, on Lightning.

`pyro_lvm.training.lightning` holds the module that joins a pair, an objective and an optimiser; it
is imported only where Lightning is needed.
"""

from pyro_lvm.training.batches import Batches
from pyro_lvm.training.fit import Fit, fit

__all__ = ["Batches", "Fit", "fit"]
