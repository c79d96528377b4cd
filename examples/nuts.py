"""Pyro's NUTS, as the examples that compare posteriors call it."""

from collections.abc import Callable
from typing import Any

from pyro.infer import MCMC, NUTS

__all__ = ["nuts"]

_MAX_TREE_DEPTH = 8  # at most 255 leapfrog steps for a draw


def nuts(model: Callable, *args: Any, draws: int, warmup: int = 500, chains: int = 2) -> list[MCMC]:
    """Chains from different starts, one after another in this process.

    ``MCMC(num_chains=...)`` would have processes of its own, which can't use a GPU that this one
    has used. Draws of the warm-up, no more than those that are kept, are thrown away.
    """
    runs = []
    for _ in range(chains):
        kernel = NUTS(
            model,
            max_plate_nesting=1,  # the data's
            max_tree_depth=_MAX_TREE_DEPTH,
            jit_compile=True,
            ignore_jit_warnings=True,
        )
        run = MCMC(kernel, num_samples=draws, warmup_steps=min(warmup, draws), disable_progbar=True)
        run.run(*args)
        runs.append(run)
    return runs
