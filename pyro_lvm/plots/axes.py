"""What the pictures share: Axes, colours, a frame, a legend, and numbers that can be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "axes_or_new", "legend_below", "open_frame", "to_numpy"]

# The palette of Okabe and Ito, told apart by colour-blind readers; its yellow, too pale for a thin
# line on white, is left out.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def axes_or_new(ax: Axes | None, width: float, height: float) -> Axes:
    """The Axes given, or those of a new figure of that size in inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def open_frame(ax: Axes) -> None:
    """A faint grid behind the curves, and no frame at the top and the right."""
    ax.grid(alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def legend_below(ax: Axes, **settings: Any) -> None:
    """A legend that hides nothing: under the label of the x axis, 4.5 font sizes down."""
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        borderaxespad=4.5,
        fontsize="small",
        frameon=False,
        **settings,
    )


def to_numpy(x: Tensor) -> np.ndarray:
    """The values in double precision, off the device and the graph."""
    return x.detach().cpu().double().numpy()
