"""Time of a step of SVI and of an iteration of EM for mixtures with full covariances.

SVI is on all data, beside the same story written in plain Pyro; EM is beside scikit-learn and
pomegranate, all in float32 from the same start.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from torch import Tensor
from torch.distributions import constraints

from benchmarks.problems import own_parameters
from benchmarks.report import Timed
from benchmarks.timing import ManySteps, interleaved
from pyro_lvm import CompiledStep
from pyro_lvm.models import GaussianMixture

__all__ = ["em_alone", "mixtures"]

SIZES = {"features": 16, "components": 32}
ITERATIONS = 5  # and all libraries compute the log-likelihood once more at the end


def mixture_data(num_data: int) -> Tensor:
    """Draws from as many Gaussians as will be fitted."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(SIZES["components"], (num_data,), generator=generator)
    noise = torch.randn(num_data, SIZES["features"], generator=generator)
    return _centres()[labels] + noise


def svi(x: Tensor) -> dict[str, Callable[[], Any]]:
    """A step of SVI with the label summed out, on all data; ours compiled, and in Pyro's SVI."""
    compiled = CompiledStep(_objective(), *_pair())
    return {
        "pyro_lvm_step": own_parameters(lambda: compiled(x)),
        "pyro_lvm_svi": own_parameters(_svi_step(*_pair(), x)),
        "pyro_svi": own_parameters(_svi_step(_plain_model(), lambda x: None, x)),
    }


def em(x: Tensor) -> dict[str, Callable[[], Any]]:
    """Iterations of exact EM, each library through its own interface."""
    return {
        "pyro_lvm": _em_by_pyro_lvm(x),
        "scikit-learn": _em_by_sklearn(x),
        "pomegranate": _em_by_pomegranate(x),
    }


def mixtures(num_data: int, rounds: int = 7) -> list[Timed]:
    """Times of a step of SVI, and of an iteration of EM.

    Args:
        num_data: How many data.
        rounds: How many times of each.
    """
    x = mixture_data(num_data)
    shape = f"{num_data:,} x {SIZES['features']}, {SIZES['components']} full covariances"
    timing = {"rounds": rounds, "warm_up": 2}
    return [
        Timed(f"SVI, {shape}", interleaved(svi(x), **timing), "pyro_svi"),
        Timed(f"EM, {shape}", interleaved(em(x), **timing), "scikit-learn"),
    ]


def em_alone(num_data: int) -> ManySteps:
    """Iterations of our EM on as many data as the memory holds."""
    return _em_by_pyro_lvm(mixture_data(num_data))


def _centres() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SIZES["components"], SIZES["features"], generator=generator)


def _start() -> Tensor:
    """Means to start from, some standard deviations away from the right ones."""
    return _centres() + 0.5


def _pair() -> tuple[Callable, Callable]:
    mixture = GaussianMixture(SIZES["components"], SIZES["features"])
    mixture.loc = _start()
    return mixture.model, mixture.guide


def _plain_model() -> Callable:
    num_components, num_features = SIZES["components"], SIZES["features"]
    start = _start()

    def model(x: Tensor) -> None:
        weights = pyro.param(
            "weights", torch.ones(num_components) / num_components, constraint=constraints.simplex
        )
        loc = pyro.param("loc", start)
        scale_tril = pyro.param(
            "scale_tril",
            torch.eye(num_features).repeat(num_components, 1, 1),
            constraint=constraints.lower_cholesky,
        )
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            normal = dist.MultivariateNormal(loc[z], scale_tril=scale_tril[z])
            pyro.sample("x", normal, obs=x)

    return model


def _svi_step(model: Callable, guide: Callable, x: Tensor) -> Callable[[], float]:
    stepper = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), _objective())
    return lambda: stepper.step(x)


def _objective() -> TraceEnum_ELBO:
    return TraceEnum_ELBO(max_plate_nesting=1)


def _em_by_pyro_lvm(x: Tensor) -> ManySteps:
    def fit() -> Any:
        mixture = GaussianMixture(SIZES["components"], SIZES["features"])
        mixture.loc = _start()
        fit = mixture.fit_em(x, max_iterations=ITERATIONS, tolerance=0.0)
        assert fit.iterations == ITERATIONS
        return fit

    return ManySteps(fit, ITERATIONS)


def _em_by_sklearn(x: Tensor) -> ManySteps:
    from sklearn.mixture import GaussianMixture as SklearnMixture

    num_components, data = SIZES["components"], x.numpy()
    identity = torch.eye(SIZES["features"]).repeat(num_components, 1, 1)

    def fit() -> Any:
        with warnings.catch_warnings():  # it is not meant to converge
            warnings.simplefilter("ignore")
            return SklearnMixture(
                num_components,
                weights_init=(torch.ones(num_components) / num_components).numpy(),
                means_init=_start().numpy(),
                precisions_init=identity.numpy(),
                max_iter=ITERATIONS,
                tol=0.0,
            ).fit(data)

    return ManySteps(fit, ITERATIONS)


def _em_by_pomegranate(x: Tensor) -> ManySteps:
    threads = torch.get_num_threads()
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    torch.set_num_threads(threads)  # numba, which it imports, changes them

    def fit() -> Any:
        normals = [Normal(mean.clone(), torch.eye(SIZES["features"])) for mean in _start()]
        mixture = GeneralMixtureModel(normals)
        for _ in range(ITERATIONS):
            mixture.summarize(x)
            mixture.from_summaries()
        return mixture

    return ManySteps(fit, ITERATIONS)
