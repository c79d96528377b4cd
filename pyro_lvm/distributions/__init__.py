"""Distributions that torch, Pyro and Zuko lack, or have with less than their precision."""

from pyro_lvm.distributions.autoregressive import Autoregressive
from pyro_lvm.distributions.continuous_bernoulli import ContinuousBernoulli
from pyro_lvm.distributions.equal_mixture import EqualMixture
from pyro_lvm.distributions.incomplete import Incomplete
from pyro_lvm.distributions.indexed_normal import IndexedNormal
from pyro_lvm.distributions.kernel_density import KernelDensity

__all__ = [
    "Autoregressive",
    "ContinuousBernoulli",
    "EqualMixture",
    "Incomplete",
    "IndexedNormal",
    "KernelDensity",
]
