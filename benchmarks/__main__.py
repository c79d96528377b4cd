"""Time per training step of the same model and batch in several libraries.

    python -m benchmarks --problem vae mixture --rounds 15 --threads 1

Pyro's validation is off, as NumPyro's is by default.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch

from benchmarks.peers import PEERS
from benchmarks.timing import interleaved, machine, table, versions

__all__ = ["compare"]

_PACKAGES = ("torch", "pyro-ppl", "numpyro", "jax", "funsor", "pythae")


def compare(
    problem: str, others: Mapping[str, Callable[[], Any]] | None = None, **settings: Any
) -> dict[str, list[float]]:
    """Milliseconds per step of all peers of a problem, and of others that are given.

    Args:
        problem: A key of `PEERS`.
        others: Name -> what builds a step.
        settings: Those of `interleaved`.
    """
    builders = {**PEERS[problem], **(others or {})}
    return interleaved({name: build() for name, build in builders.items()}, **settings)


def main() -> None:
    """Print a table per problem."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--problem", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.1, help="the least time of one turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores to use")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    if hasattr(os, "sched_setaffinity"):  # for JAX, which has no number of threads to set
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    pyro.enable_validation(False)
    print(machine(), versions(*_PACKAGES), sep="\n")
    for problem in settings.problem:
        times = compare(problem, rounds=settings.rounds, seconds=settings.seconds)
        print(f"\n{problem}, time per step\n{table(times, baseline='pyro_svi')}")


if __name__ == "__main__":
    main()
