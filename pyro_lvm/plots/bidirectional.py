"""Lower and upper bounds of log p(x) on simulated data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from pyro_lvm.plots.axes import COLORS, axes_or_new, legend_below, open_frame, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_bidirectional"]


class _Scores(Protocol):
    @property
    def log_prob(self) -> Tensor: ...


class _Bound(Protocol):
    @property
    def forward(self) -> _Scores: ...

    @property
    def reverse(self) -> _Scores: ...


def plot_bidirectional(
    bound: _Bound, *, exact: Tensor | None = None, ax: Axes | None = None
) -> Axes:
    """Both bounds of log p(x) of each simulated datum, and the gap between them.

    Data are sorted by the middle of their bounds. A bar spans the gap of a datum, from its lower
    bound to its upper one; where noise has turned the two around the bar is red.

    Args:
        bound: What `marginal.bidirectional` returns.
        exact: The exact log p(x) of the data, ``N``, if it is known; drawn as ticks.
        ax: Where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ValueError: If ``exact`` has not an entry for each datum.
    """
    lower, upper = (to_numpy(score.log_prob) for score in (bound.forward, bound.reverse))
    order = np.argsort(lower + upper)
    lower, upper, rank = lower[order], upper[order], np.arange(len(order))
    ax = axes_or_new(ax, 6.4, 4.2)
    colors = np.where(upper >= lower, "0.75", COLORS[1])
    ax.vlines(rank, lower, upper, colors=colors.tolist(), linewidth=2.5, zorder=1)
    ax.plot(rank, upper, "v", color=COLORS[0], markersize=4, label="upper bound (reverse)")
    ax.plot(rank, lower, "^", color=COLORS[2], markersize=4, label="lower bound (forward)")
    if exact is not None:
        _check_exact(exact, len(order))
        ax.plot(rank, to_numpy(exact)[order], "_", color="black", markersize=9, label="exact")
    gap = upper - lower
    ax.set(
        xlabel="simulated datum, sorted",
        ylabel="log p(x), nats",
        title=f"Bidirectional Monte Carlo: mean gap {gap.mean():.2f} nats",
    )
    open_frame(ax)
    legend_below(ax, ncols=3)
    return ax


def _check_exact(exact: Tensor, num_data: int) -> None:
    if exact.shape != (num_data,):
        raise ValueError(
            f"Expected exact values of shape ({num_data},), one for each datum; got "
            f"{tuple(exact.shape)}."
        )
