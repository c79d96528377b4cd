"""Time of a step of SVI and of an iteration of EM for mixtures with full covariances.

    python -m benchmarks.mixtures --threads 1
    python -m benchmarks.mixtures --many        # 10 million data, EM only

SVI is on all data, beside the same story written in plain Pyro; EM is beside scikit-learn and,
where it is installed, pomegranate, all in float32 from the same start. Pyro's validation is off.
"""

import argparse
import resource
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from torch import Tensor
from torch.distributions import constraints

from benchmarks.problems import own_parameters
from benchmarks.timing import ManySteps, interleaved, machine, table, versions
from pyro_lvm.models import GaussianMixture

__all__ = ["em", "mixture_data", "svi"]

SIZES = {"features": 16, "components": 32}
ITERATIONS = 5  # and all libraries compute the log-likelihood once more at the end
_LARGEST_PLAIN_SVI = 100_000  # it holds some ten tables of N x C x D numbers
_LARGEST_POMEGRANATE = 1_000_000


def mixture_data(num_data: int) -> Tensor:
    """Draws from as many Gaussians as will be fitted."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(SIZES["components"], (num_data,), generator=generator)
    noise = torch.randn(num_data, SIZES["features"], generator=generator)
    return _centres()[labels] + noise


def svi(x: Tensor) -> dict[str, Callable[[], Any]]:
    """A step of SVI with the label summed out, on all data."""
    steps = {"pyro_lvm": own_parameters(_svi_step(*_pair(), x))}
    if len(x) <= _LARGEST_PLAIN_SVI:
        steps["pyro"] = own_parameters(_svi_step(_plain_model(), lambda x: None, x))
    return steps


def em(x: Tensor) -> dict[str, Callable[[], Any]]:
    """Iterations of exact EM, each library through its own interface."""
    steps = {"pyro_lvm": _em_by_pyro_lvm(x), "scikit-learn": _em_by_sklearn(x)}
    if find_spec("pomegranate") and len(x) <= _LARGEST_POMEGRANATE:
        steps["pomegranate"] = _em_by_pomegranate(x)
    return steps


def main() -> None:
    """Print two tables per number of data."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixtures", description=__doc__)
    parser.add_argument("--data", nargs="+", type=int, default=[1000, 20_000, 100_000, 1_000_000])
    parser.add_argument("--many", action="store_true", help="10 million data instead, EM only")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    pyro.enable_validation(False)
    print(machine(), versions("torch", "pyro-ppl", "scikit-learn", "pomegranate"), sep="\n")
    if not find_spec("pomegranate"):
        print("pomegranate isn't installed: pip install pomegranate")
    for num_data in [10_000_000] if settings.many else settings.data:
        x = mixture_data(num_data)
        shape = f"{num_data:,} x {SIZES['features']}, {SIZES['components']} full covariances"
        if settings.many:
            _print_one(f"EM, {shape}", _em_by_pyro_lvm(x))
            continue
        rounds = settings.rounds if num_data < 500_000 else 3
        timing = {"rounds": rounds, "warm_up": 2 if num_data < 500_000 else 1}
        for title, steps, baseline in (
            ("SVI, ms per step", svi(x), "pyro"),
            ("EM, ms per iteration", em(x), "scikit-learn"),
        ):
            times = interleaved(steps, **timing)
            shown = table(times, baseline if baseline in times else None)
            print(f"\n{title}, {shape}\n{shown}", flush=True)


def _print_one(title: str, steps: ManySteps) -> None:
    times = interleaved({"pyro_lvm": steps}, rounds=2, warm_up=1)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{title}, ms per iteration; at most {memory:.1f} GiB\n{table(times)}")


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
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    stepper = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    return lambda: stepper.step(x)


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


if __name__ == "__main__":
    main()
