"""Time of a compiled step under several objectives."""

from collections.abc import Callable
from typing import Any

from benchmarks.problems import own_parameters, vae
from benchmarks.report import Timed
from benchmarks.timing import interleaved
from pyro_lvm import MMD, CompiledStep, TraceInfo_ELBO
from pyro_lvm.divergences import RBF

__all__ = ["objectives"]

OBJECTIVES: dict[str, Callable[[], TraceInfo_ELBO]] = {
    "ELBO": TraceInfo_ELBO,
    "InfoVAE, MMD": lambda: _info(MMD()),
    "InfoVAE, MMD of one kernel": lambda: _info(MMD(RBF([1.0]))),
}


def objectives(batch_size: int = 512, rounds: int = 15) -> Timed:
    """Times of a step of the VAE of `benchmarks.problems`.

    Args:
        batch_size: The size of the minibatch.
        rounds: How many times of each.
    """
    steps = {name: _step(make(), batch_size) for name, make in OBJECTIVES.items()}
    return Timed(f"objectives, batch {batch_size}", interleaved(steps, rounds=rounds), "ELBO")


def _info(divergence: MMD) -> TraceInfo_ELBO:
    return TraceInfo_ELBO(alpha=0.5, lambda_=10.0, divergence=divergence)


def _step(elbo: TraceInfo_ELBO, batch_size: int) -> Callable[[], Any]:
    pair = vae(batch_size)
    step = CompiledStep(elbo, pair.model, pair.guide)
    return own_parameters(lambda: step(*pair.args))
