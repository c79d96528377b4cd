"""Divergences between two samples: ``forward(q_samples, p_samples) -> scalar``, tensors only."""

from pyro_lvm.divergences.kernels import IMQ, RBF
from pyro_lvm.divergences.mmd import MMD

__all__ = ["IMQ", "MMD", "RBF"]
