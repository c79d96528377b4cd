"""A comparison of models by their held-out scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_lvm.plots.axes import axes_or_new, legend_below, open_frame

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["plot_comparison"]

_GREY = "0.55"


def plot_comparison(comparison: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Held-out scores of models, the best on top, and their paired differences to it.

    A black point is a model's mean score with its standard error. The grey triangle beside it
    is the same value seen as a difference to the best, with the standard error of that paired
    difference: an interval that keeps clear of the dotted line is a model that is worse.

    Args:
        comparison: A row for each model, the best first, with the columns ``mean`` and ``se``
            (of log p(x), nats per datum), ``diff`` (mean difference to the best, at most 0) and
            ``dse`` (its paired standard error). The index names the models.
        ax: Where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ValueError: If a column is missing, there is no row, or the best is not first.
    """
    _check_comparison(comparison)
    rows = np.arange(len(comparison))
    mean, se, diff, dse = (comparison[column].to_numpy(float) for column in _SCORES)
    ax = axes_or_new(ax, 6.4, 1.7 + 0.5 * len(rows))
    ax.axvline(mean[0], color=_GREY, linestyle="dotted", zorder=1)
    ax.errorbar(
        mean, rows, xerr=se, fmt="o", color="black", capsize=3, label="mean ± standard error"
    )
    if len(rows) > 1:
        ax.errorbar(
            (mean[0] + diff)[1:],
            rows[1:] - 0.25,
            xerr=dse[1:],
            fmt="^",
            color=_GREY,
            capsize=3,
            label="difference to the best ± standard error",
        )
    ax.set_yticks(rows, [str(name) for name in comparison.index])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set(xlabel="held-out log p(x), nats per datum", title="Model comparison")
    open_frame(ax)
    legend_below(ax)
    return ax


_SCORES = ["mean", "se", "diff", "dse"]


def _check_comparison(comparison: pd.DataFrame) -> None:
    missing = [column for column in _SCORES if column not in comparison.columns]
    if missing:
        raise ValueError(
            f"Expected the columns {', '.join(_SCORES)}; got a comparison without "
            f"{', '.join(missing)}."
        )
    if len(comparison) == 0:
        raise ValueError("Expected at least one model to compare; got no row.")
    if not comparison["mean"].is_monotonic_decreasing:
        raise ValueError(
            f"Expected the best model first; got means {comparison['mean'].tolist()}. Try "
            f"comparison.sort_values('mean', ascending=False)."
        )
