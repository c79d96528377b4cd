"""What a file may name: the classes that are built, and handed over, when it is loaded."""

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
from pyro.infer import autoguide
from torch import nn
from torch.nn.modules import activation

import pyro_lvm.models
import pyro_lvm.nn
from pyro_lvm.configured import Configured

__all__ = ["CONFIGURED", "DISTRIBUTIONS", "HANDED_OVER"]

_AUTOGUIDES = [
    "AutoDelta",
    "AutoDiagonalNormal",
    "AutoLowRankMultivariateNormal",
    "AutoMultivariateNormal",
    "AutoNormal",
    "init_to_feasible",
    "init_to_mean",
    "init_to_median",
    "init_to_sample",
    "init_to_uniform",
]
_ARGUMENTS = {  # of several equivalent ones those by which log_prob is computed
    "Beta": "concentration1 concentration0",
    "Cauchy": "loc scale",
    "Dirichlet": "concentration",
    "Exponential": "rate",
    "Gamma": "concentration rate",
    "Gumbel": "loc scale",
    "HalfCauchy": "scale",
    "HalfNormal": "scale",
    "Independent": "base_distribution reinterpreted_batch_ndims",
    "InverseGamma": "concentration rate",
    "Laplace": "loc scale",
    "LogNormal": "loc scale",
    "LowRankMultivariateNormal": "loc cov_factor cov_diag",
    "MultivariateNormal": "loc scale_tril",
    "Normal": "loc scale",
    "StudentT": "df loc scale",
    "Uniform": "low high",
}


def _configured(module: Any) -> dict[str, type]:
    found = {name: getattr(module, name) for name in module.__all__}
    return {
        f"{module.__name__}.{name}": value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, Configured)
    }


CONFIGURED: Mapping[str, type] = _configured(pyro_lvm.nn) | _configured(pyro_lvm.models)
"""Public name -> class of ours, built from its arguments."""

DISTRIBUTIONS: Mapping[type, tuple[str, tuple[str, ...]]] = {
    getattr(dist, name): (f"pyro.distributions.{name}", tuple(arguments.split()))
    for name, arguments in _ARGUMENTS.items()
}
"""Class -> its public name, and the arguments that it is built from."""

_ACTIVATIONS = {f"torch.nn.{name}": getattr(nn, name) for name in ["Identity", *activation.__all__]}

HANDED_OVER: Mapping[str, Any] = _ACTIVATIONS | {
    f"pyro.infer.autoguide.{name}": getattr(autoguide, name) for name in _AUTOGUIDES
}
"""Public name -> a class or function that is an argument itself, such as an activation."""
