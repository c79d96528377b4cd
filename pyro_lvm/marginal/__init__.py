"""Estimates of log p(x), per datum and with error bars, for any (model, guide) pair."""

from pyro_lvm.marginal.annealing import (
    HMC,
    AdaptiveTemperatures,
    AnnealedLogMarginal,
    BidirectionalBound,
    LinearTemperatures,
    SigmoidTemperatures,
    Temperatures,
    annealed_importance_sampling,
    bidirectional,
)
from pyro_lvm.marginal.evidence import evidence
from pyro_lvm.marginal.exact import exact
from pyro_lvm.marginal.importance import importance_sampling
from pyro_lvm.marginal.imputation import Imputation, impute
from pyro_lvm.marginal.kernel_density import kernel_density
from pyro_lvm.marginal.log_marginal import LogMarginal
from pyro_lvm.marginal.naive import naive_monte_carlo
from pyro_lvm.marginal.noise import with_gaussian_noise
from pyro_lvm.marginal.proposal import widened
from pyro_lvm.marginal.refined import refined

__all__ = [
    "HMC",
    "AdaptiveTemperatures",
    "AnnealedLogMarginal",
    "BidirectionalBound",
    "Imputation",
    "LinearTemperatures",
    "LogMarginal",
    "SigmoidTemperatures",
    "Temperatures",
    "annealed_importance_sampling",
    "bidirectional",
    "evidence",
    "exact",
    "importance_sampling",
    "impute",
    "kernel_density",
    "naive_monte_carlo",
    "refined",
    "widened",
    "with_gaussian_noise",
]
