"""Pyro as its users run it: ``SVI`` with an objective of Pyro's and ``pyro.optim.Adam``."""

from collections.abc import Callable

import pyro
from pyro.infer import ELBO, SVI, TraceMeanField_ELBO

from benchmarks import problems
from benchmarks.problems import Problem, own_parameters

__all__ = ["factor_analysis", "mixture", "regression", "vae", "vae_mean_field"]


def vae(batch_size: int = 128, device: str = "cpu") -> Callable[[], float]:
    """With ``Trace_ELBO``."""
    return _step(problems.vae(batch_size, device))


def vae_mean_field(batch_size: int = 128, device: str = "cpu") -> Callable[[], float]:
    """With the KL in closed form."""
    return _step(problems.vae(batch_size, device), TraceMeanField_ELBO(max_plate_nesting=1))


def factor_analysis(device: str = "cpu") -> Callable[[], float]:
    """With ``Trace_ELBO``."""
    return _step(problems.factor_analysis(device))


def mixture(device: str = "cpu") -> Callable[[], float]:
    """With ``TraceEnum_ELBO``."""
    return _step(problems.mixture(device))


def regression(device: str = "cpu") -> Callable[[], float]:
    """With ``Trace_ELBO`` and ``AutoNormal``."""
    return _step(problems.regression(device))


def _step(problem: Problem, elbo: ELBO | None = None) -> Callable[[], float]:
    svi = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 1e-3}), elbo or problem.elbo)
    return own_parameters(lambda: svi.step(*problem.args))
