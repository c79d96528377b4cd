"""What a step of the same training costs elsewhere.

A peer is a function that builds a step: a closure that takes one step of Adam with a rate of 1e-3
and returns the loss, which the timing waits for. Sizes and stories are those of
`benchmarks.problems`; the data of other libraries are random draws of the same law.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.peers import by_hand, by_numpyro, by_pyro, by_pyro_lvm, by_pythae

__all__ = ["PEERS"]


def _vae(batch_size: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    peers: dict[str, Callable[..., Any]] = {
        "handwritten_eager": by_hand.vae_eager,
        "handwritten_compiled": by_hand.vae_compiled,
        "pyro_svi": by_pyro.vae,
        "pyro_svi_mean_field": by_pyro.vae_mean_field,
        "numpyro_jit": by_numpyro.vae,
        "numpyro_jit_mean_field": by_numpyro.vae_mean_field,
        "pythae": by_pythae.vae,
    }
    return {name: partial(build, batch_size) for name, build in peers.items()}


PEERS: dict[str, dict[str, Callable[[], Callable[[], Any]]]] = {
    "vae, batch 128": _vae(128),
    "vae, batch 512": _vae(512),
    "factor analysis": {
        "pyro_svi": by_pyro.factor_analysis,
        "numpyro_jit": by_numpyro.factor_analysis,
        "numpyro_scan": by_numpyro.factor_analysis_scan,
    },
    "mixture": {
        "pyro_svi": by_pyro.mixture,
        "numpyro_jit": by_numpyro.mixture,
        "numpyro_scan": by_numpyro.mixture_scan,
    },
    "regression": {
        "pyro_svi": by_pyro.regression,
        "numpyro_jit": by_numpyro.regression,
        "numpyro_scan": by_numpyro.regression_scan,
    },
}
"""Problem -> name -> what builds a step."""

for _problem, _peers in PEERS.items():
    _peers["pyro_lvm_loss"] = partial(by_pyro_lvm.compiled_loss, _problem)
    _peers["pyro_lvm_step"] = partial(by_pyro_lvm.steps, _problem)
    if not _problem.startswith("vae"):  # its time is that of its matrix products
        _peers["pyro_lvm_10_steps"] = partial(by_pyro_lvm.steps, _problem, 10)
