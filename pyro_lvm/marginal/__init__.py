"""Estimates of log p(x), per datum and with error bars, for any (model, guide) pair."""

from pyro_lvm.marginal.exact import exact
from pyro_lvm.marginal.importance import importance_sampling
from pyro_lvm.marginal.log_marginal import LogMarginal
from pyro_lvm.marginal.proposal import widened

__all__ = ["LogMarginal", "exact", "importance_sampling", "widened"]
