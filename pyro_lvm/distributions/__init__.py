"""Distributions that torch, Pyro and Zuko lack, or have with less than their precision."""

from pyro_lvm.distributions.continuous_bernoulli import ContinuousBernoulli
from pyro_lvm.distributions.incomplete import Incomplete
from pyro_lvm.distributions.indexed_normal import IndexedNormal

__all__ = ["ContinuousBernoulli", "Incomplete", "IndexedNormal"]
