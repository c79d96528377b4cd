"""What each dimension of the latents costs, and which ones say something of the data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pyro_lvm.diagnostics import CollapseReport
from pyro_lvm.plots.axes import COLORS, axes_or_new, open_frame, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_collapse"]

_GREY = "0.75"
_MOST_NAMED = 30  # bars with a name each


def plot_collapse(report: CollapseReport, *, ax: Axes | None = None) -> Axes:
    """The KL of each latent dimension, the largest first, and what latents know of the data.

    Bars are mean_x KL(q(z_d | x) || p(z_d)) in nats; those of active units are coloured, those of
    units that do not vary with the data are grey. Discrete latents, which have no units, are in a
    colour of their own. The title has I_q(x; z) between its bounds, with the largest value log N
    that data of this number can show, and the rest of the mean KL, KL(q(z) || p(z)).

    Args:
        report: A report of `pyro_lvm.diagnostics.collapse_report`.
        ax: Where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ValueError: If no dimension has a KL of its own.
    """
    names, kl, kinds = _bars(report)
    if not names:
        raise ValueError(
            "Expected latents whose KL is known dimension by dimension; got none. The report "
            "itself has the KL of each site."
        )
    order = np.argsort(-kl, kind="stable")
    ax = axes_or_new(ax, 6.4, 4.4)
    places = np.arange(len(names))
    for kind, color in (("active", COLORS[0]), ("inactive", _GREY), ("discrete", COLORS[1])):
        chosen = kinds[order] == kind
        if chosen.any():
            ax.bar(places[chosen], kl[order][chosen], color=color, label=f"{kind} ({chosen.sum()})")
    _name_bars(ax, [names[i] for i in order])
    ax.set_ylabel("KL, nats")
    ax.set_title(_title(report), fontsize="medium")
    ax.axhline(0.0, color="black", linewidth=0.8)
    open_frame(ax)
    ax.legend(loc="upper right", fontsize="small", frameon=False)  # the low bars are there
    return ax


def _bars(report: CollapseReport) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, KLs and kinds of all dimensions that have a KL."""
    names: list[str] = []
    kl: list[float] = []
    kinds: list[str] = []
    for latent in report.latents:
        if latent.kl_of_dimensions is None:
            continue
        names += [latent.name_of(d) for d in range(latent.num_dimensions)]
        kl += to_numpy(latent.kl_of_dimensions).tolist()
        if latent.active is None:
            kinds += ["discrete"] * latent.num_dimensions
        else:
            kinds += ["active" if a else "inactive" for a in latent.active.tolist()]
    return names, np.asarray(kl), np.asarray(kinds)


def _name_bars(ax: Axes, names: list[str]) -> None:
    if len(names) > _MOST_NAMED:
        ax.set_xticks([])
        ax.set_xlabel(f"{len(names)} latent dimensions")
        return
    turned = 90 if len(names) > 8 else 0
    ax.set_xticks(np.arange(len(names)), names, rotation=turned, fontsize="small")


def _title(report: CollapseReport) -> str:
    lines = [f"{report.num_active} of {report.num_units} units active, KL {report.kl.value:.2f}"]
    found = report.information
    if found is not None:
        lines += [
            f"I(x; z) from {found.lower.value:.2f} to {found.upper.value:.2f}, log N = "
            f"{math.log(found.num_data):.2f}",
            f"KL(q(z) || p(z)) from {found.kl_lower.value:.2f} to {found.kl_upper.value:.2f}",
        ]
    return "\n".join(lines)
