"""The same problems in each library, one training step per call.

Every peer takes one step of Adam with a rate of 1e-3 and returns the loss, which the timing waits
for. Sizes and stories are those of `benchmarks.problems`; the data of other libraries are random
draws of the same law. A library is imported when a step of it is built.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

__all__ = ["PEERS", "built", "on_cuda"]

Build = Callable[..., Callable[[], Any]]


def built(builders: Mapping[str, Build], **settings: Any) -> dict[str, Callable[[], Any]]:
    """Steps by name; those of libraries that are not installed are left out, and named."""
    steps = {}
    for name, build in builders.items():
        try:
            steps[name] = build(**settings)
        except ModuleNotFoundError as error:
            print(f"without {name}: {error}")
    return steps


def on_cuda(batch_size: int) -> dict[str, Build]:
    """What can take steps of the VAE on a CUDA device; takes ``device``."""
    return {
        "handwritten_eager": _peer("by_hand", "vae_eager", batch_size),
        "handwritten_compiled": _peer("by_hand", "vae_compiled", batch_size),
        "handwritten_cuda_graph": _peer("by_hand", "vae_cuda_graph", batch_size),
        "pyro_svi": _peer("by_pyro", "vae", batch_size),
        "pythae": _peer("by_pythae", "vae", batch_size),
        "pyro_lvm_step": _peer("by_pyro_lvm", "steps", f"vae, batch {batch_size}"),
    }


def _peer(module: str, name: str, *args: Any) -> Build:
    def build(*args: Any, **settings: Any) -> Callable[[], Any]:
        return getattr(import_module(f"benchmarks.peers.{module}"), name)(*args, **settings)

    return partial(build, *args)


def _vae(batch_size: int) -> dict[str, Build]:
    return {
        "handwritten_eager": _peer("by_hand", "vae_eager", batch_size),
        "handwritten_compiled": _peer("by_hand", "vae_compiled", batch_size),
        "pyro_svi": _peer("by_pyro", "vae", batch_size),
        "pyro_svi_mean_field": _peer("by_pyro", "vae_mean_field", batch_size),
        "numpyro_jit": _peer("by_numpyro", "vae", batch_size),
        "numpyro_jit_mean_field": _peer("by_numpyro", "vae_mean_field", batch_size),
        "pythae": _peer("by_pythae", "vae", batch_size),
    }


def _small(name: str) -> dict[str, Build]:
    return {
        "pyro_svi": _peer("by_pyro", name),
        "numpyro_jit": _peer("by_numpyro", name),
        "numpyro_scan": _peer("by_numpyro", f"{name}_scan"),
    }


PEERS: dict[str, dict[str, Build]] = {
    "vae, batch 128": _vae(128),
    "vae, batch 512": _vae(512),
    "factor analysis": _small("factor_analysis"),
    "mixture": _small("mixture"),
    "regression": _small("regression"),
}
"""Problem -> name -> what builds a step."""

for _problem, _peers in PEERS.items():
    _peers["pyro_lvm_loss"] = _peer("by_pyro_lvm", "compiled_loss", _problem)
    _peers["pyro_lvm_step"] = _peer("by_pyro_lvm", "steps", _problem)
    if not _problem.startswith("vae"):  # its time is that of its matrix products
        _peers["pyro_lvm_10_steps"] = _peer("by_pyro_lvm", "steps", _problem, 10)
