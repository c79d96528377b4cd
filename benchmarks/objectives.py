"""Time of a compiled step under several objectives, beside the ELBO's."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from benchmarks.problems import VAE, own_parameters, vae
from benchmarks.report import Timed
from benchmarks.timing import interleaved
from pyro_lvm import MMD, CompiledStep, TraceInfo_ELBO
from pyro_lvm.divergences import IMQ, RBF, Adversarial, SlicedWasserstein, Stein

__all__ = ["objectives"]

ROUNDS = {128: 15, 512: 15, 2048: 7, 8192: 3}
"""Batch sizes, and how many times of each at most: some divergences are quadratic."""

DIVERGENCES: dict[str, Callable[[], nn.Module]] = {
    "MMD": MMD,
    "MMD, IMQ of one width": lambda: MMD(IMQ([1.0])),
    "MMD, RBF": lambda: MMD(RBF()),
    "MMD, RBF of one width": lambda: MMD(RBF([1.0])),
    "MMD, linear": lambda: MMD(estimator="linear"),
    "MMD, median heuristic": lambda: MMD(median_heuristic=True),
    "sliced Wasserstein": SlicedWasserstein,
    "adversarial, JS": lambda: Adversarial(_discriminator()),
    "adversarial, KL": lambda: Adversarial(_discriminator(), objective="kl"),
    "Stein": Stein,
}


def objectives(rounds: int = 15) -> Iterator[Timed]:
    """Times of a step of the VAE of `benchmarks.problems`.

    Args:
        rounds: How many times of each, at most.
    """
    for batch_size, most in ROUNDS.items():
        steps = {"ELBO": _step(TraceInfo_ELBO(), batch_size)}
        for name, make in DIVERGENCES.items():
            steps[name] = _step(_info(make()), batch_size)
        times = interleaved(steps, rounds=min(rounds, most), warm_up=2)
        yield Timed(f"objectives, batch {batch_size}", times, "ELBO")


def _discriminator() -> nn.Module:
    hidden = VAE["hidden"]
    return nn.Sequential(
        nn.Linear(VAE["latents"], hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 1),
    )


def _info(divergence: nn.Module) -> TraceInfo_ELBO:
    return TraceInfo_ELBO(alpha=0.5, lambda_=10.0, divergence=divergence)


def _step(elbo: TraceInfo_ELBO, batch_size: int) -> Callable[[], Any]:
    pair = vae(batch_size)
    step = CompiledStep(elbo, pair.model, pair.guide)
    return own_parameters(lambda: step(*pair.args))
