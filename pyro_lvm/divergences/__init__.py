"""Divergences between two samples: ``forward(q_samples, p_samples) -> scalar``, tensors only.

One, `Stein`, takes the density of p in place of its samples, and says so by ``against``.
"""

from pyro_lvm.divergences.adversarial import Adversarial
from pyro_lvm.divergences.auxiliary_classifier import AuxiliaryClassifier
from pyro_lvm.divergences.kernels import IMQ, RBF
from pyro_lvm.divergences.mmd import MMD
from pyro_lvm.divergences.sliced_wasserstein import SlicedWasserstein
from pyro_lvm.divergences.stein import Stein

__all__ = ["IMQ", "MMD", "RBF", "Adversarial", "AuxiliaryClassifier", "SlicedWasserstein", "Stein"]
