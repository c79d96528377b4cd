"""The history of a training run, term by term."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_lvm.plots.axes import COLORS, axes_or_new, open_frame

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_history"]

_VALIDATION = "validation/"


def plot_history(
    history: Mapping[str, Sequence[float]],
    *,
    terms: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Training curves term by term: training solid, validation dashed in the same colour.

    Args:
        history: The values of each term, one per epoch, in nats per datum. The term ``"loss"``
            on validation data is called ``"validation/loss"``.
        terms: The terms to draw, without the prefix; all parts of the loss if None, and so nothing
            that a callback has measured, such as ``"latents/active_units"``.
        ax: Where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ValueError: If a term is not in ``history``, or there is nothing to draw.
    """
    known = list(dict.fromkeys(name.removeprefix(_VALIDATION) for name in history))
    parts = [name for name in known if "/" not in name]
    chosen = parts if terms is None else list(dict.fromkeys(terms))
    unknown = [term for term in chosen if term not in known]
    if unknown or not chosen:
        raise ValueError(f"Expected terms among {known}; got {unknown or 'none'}.")
    from matplotlib.ticker import MaxNLocator

    curves = {name: _curve(name, values) for name, values in history.items()}
    ax = axes_or_new(ax, 6.4, 4.0)
    for index, term in enumerate(chosen):
        for name, linestyle in ((term, "solid"), (_VALIDATION + term, "dashed")):
            if name in curves:
                _draw_curve(ax, name, curves[name], index, linestyle)
    ax.set(xlabel="epoch", ylabel="nats per datum", title="Training history")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    open_frame(ax)
    # below the axes, where no curve is
    ax.legend(
        fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False
    )
    return ax


def _curve(name: str, values: Sequence[float]) -> np.ndarray:
    curve = np.asarray(values, dtype=float)
    if curve.ndim != 1:
        raise ValueError(f"Expected one number per epoch for {name}; got shape {curve.shape}.")
    return curve


def _draw_curve(ax: Axes, name: str, values: np.ndarray, index: int, linestyle: str) -> None:
    cycle, place = divmod(index, len(COLORS))
    marker = ("", "o", "s", "^")[cycle % 4]  # where the colours come round again
    ax.plot(
        np.arange(1, len(values) + 1),
        values,
        color=COLORS[place],
        linestyle=linestyle,
        marker=marker or ("o" if len(values) == 1 else ""),  # one epoch makes no line
        markersize=4,
        label=name,
    )
