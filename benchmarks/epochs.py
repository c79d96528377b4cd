"""Time of an epoch of `fit` beside a bare loop of compiled steps on the same data.

The VAE of `benchmarks.problems` on 60,000 rows of random bits, the size of MNIST. The loop runs
between the epochs of the fit, so that both meet the same machine.
"""

import time
from collections.abc import Callable

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.problems import VAE, own_parameters, vae
from benchmarks.report import Timed
from pyro_lvm import CompiledStep, TraceInfo_ELBO, fit

__all__ = ["epochs"]

NUM_DATA = 60_000


def epochs(batch_size: int = 128, rounds: int = 7) -> Timed:
    """Times of an epoch of fit and of the loop.

    Args:
        batch_size: The size of the minibatches.
        rounds: How many epochs of each.
    """
    x = (torch.rand(NUM_DATA, VAE["features"]) < 0.3).float()
    bare = own_parameters(_bare_loop(x, batch_size))
    bare()  # compiles
    turns = _InTurns(bare)
    pair = vae(batch_size)
    own_parameters(
        lambda: fit(
            pair.model,
            pair.guide,
            x,
            elbo=TraceInfo_ELBO(),
            epochs=rounds + 2,
            batch_size=batch_size,
            compile=True,
            callbacks=[turns],
            progress=False,
        )
    )()
    title = f"an epoch of {NUM_DATA:,} data, batch {batch_size}"
    return Timed(title, turns.times, "bare_loop")


class _InTurns(pl.Callback):
    """Times every epoch but the first two, in which fit compiles, and a bare one after each."""

    def __init__(self, bare: Callable[[], None]) -> None:
        self.bare = bare
        self.times: dict[str, list[float]] = {"fit": [], "bare_loop": []}
        self.started = 0.0

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """End an epoch of fit, and run a bare one."""
        end = time.perf_counter()
        self.bare()
        now = time.perf_counter()
        if trainer.current_epoch >= 2:
            self.times["fit"].append(1e3 * (end - self.started))
            self.times["bare_loop"].append(1e3 * (now - end))
        self.started = now


def _bare_loop(x: Tensor, batch_size: int) -> Callable[[], None]:
    pair = vae(batch_size)
    step = CompiledStep(TraceInfo_ELBO(), pair.model, pair.guide, batch_size=batch_size)

    def epoch() -> None:
        for _ in range(len(x) // batch_size):
            step(x)

    return epoch
