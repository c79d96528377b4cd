"""How the time of a step grows with the size of what it computes."""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from pyro.infer import Trace_ELBO

from benchmarks.mixtures import em_alone
from benchmarks.problems import own_parameters, vae
from benchmarks.timing import interleaved
from pyro_lvm import CompiledStep

__all__ = ["Growth", "growth", "plot", "table"]

Build = Callable[[int], Callable[[], Any]]


class Growth(NamedTuple):
    """Milliseconds by size.

    Attributes:
        what: What grows.
        sizes: The sizes.
        times: Medians.
    """

    what: str
    sizes: tuple[int, ...]
    times: list[float]

    @property
    def worst(self) -> float:
        """The steepest part: the factor in time over the factor in size, 1 if linear."""
        return max(
            (t1 / t0) / (n1 / n0)
            for (n0, n1), (t0, t1) in zip(
                zip(self.sizes, self.sizes[1:], strict=False),
                zip(self.times, self.times[1:], strict=False),
                strict=True,
            )
        )


def growth() -> Iterator[Growth]:
    """Time whatever grows, one after the other."""
    for what, (sizes, build) in _GROWING.items():
        times = []
        for size in sizes:
            steps = {what: build(size)}
            times.append(statistics.median(interleaved(steps, rounds=3, warm_up=1)[what]))
        yield Growth(what, sizes, times)


def plot(found: list[Growth], path: Path) -> None:
    """Draw time over size, beside a line that is linear in size."""
    figure, axes = plt.subplots(1, len(found), figsize=(3.2 * len(found), 3), layout="constrained")
    for ax, grown in zip(axes, found, strict=True):
        ax.loglog(grown.sizes, grown.times, "o-", label="measured")
        last = grown.times[-1] / grown.sizes[-1]
        ax.loglog(grown.sizes, [last * n for n in grown.sizes], ":", color="grey", label="linear")
        ax.set(xlabel=grown.what, ylabel="ms" if ax is axes[0] else "")
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(found: list[Growth]) -> str:
    """Times by size, and the steepest growth."""
    lines = ["| what | size: ms | steepest, linear is 1 |", "|---|---|---|"]
    for grown in found:
        values = zip(grown.sizes, grown.times, strict=True)
        shown = ", ".join(f"{size:,}: {time:.3g}" for size, time in values)
        lines.append(f"| {grown.what} | {shown} | {grown.worst:.2f} |")
    return "\n".join(lines)


def _vae_step(batch_size: int = 128, latents: int = 20, particles: int = 1) -> Callable[[], Any]:
    pair = vae(batch_size, latents=latents)
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    step = CompiledStep(elbo, pair.model, pair.guide)
    return own_parameters(lambda: step(*pair.args))


_GROWING: dict[str, tuple[tuple[int, ...], Build]] = {
    "VAE: batch": ((32, 128, 512, 2048, 8192), _vae_step),
    "VAE: latents": ((2, 8, 32, 128, 512), lambda n: _vae_step(latents=n)),
    "VAE, batch 20: particles": ((1, 10, 100, 1000), lambda n: _vae_step(20, particles=n)),
    "mixture: data": ((1000, 10_000, 100_000, 1_000_000, 10_000_000), em_alone),
}
