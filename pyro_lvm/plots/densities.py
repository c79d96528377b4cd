"""Marginal densities of one number under several posteriors, over each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_lvm.checks import check_data, check_positive
from pyro_lvm.inference_data.summaries import posterior_of
from pyro_lvm.plots.axes import COLORS, axes_or_new, legend_below, open_frame, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_densities"]

_MAX_DRAWS = 4_000  # a kernel density of more is slow, and looks the same
_POINTS = 400
_REACH = 3.0  # bandwidths beyond the last draw
_CLIFF = 0.3  # of the peak; where a density ends at its peak, a kernel estimate has half of it
_TAIL = 0.001  # how much of a closed form may lie outside of the picture at either end


def plot_densities(
    posteriors: Mapping[str, Any],
    var: str,
    coords: Mapping[str, int] | None = None,
    *,
    bandwidth: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Marginal densities of one number under several posteriors, and in closed form.

    Draws become a Gaussian kernel estimate. Where it is still high at the last draw, as for a
    probability with its mode at 0, it is reflected there, so that a density that ends does not seem
    to fall off. Closed forms are dashed.

    Args:
        posteriors: Name -> what `to_arviz` returns, or draws of the number, ``K``, or a
            Distribution of it, with neither batch nor event shape.
        var: The variable of the posterior groups; it also names the axis.
        coords: Dimension -> position, which make the variable a single number per draw.
        bandwidth: Width of the kernel as a share of the spread of the draws; by Scott's rule,
            ``K^(-1/5)``, if None.
        ax: Where to draw; a new figure if None.

    Returns:
        The Axes, with one line for each posterior in their order.

    Raises:
        TypeError: If a posterior is of none of these kinds.
        ValueError: If there is none, if one has no such variable, is not a single number, or has
            draws without spread.
    """
    if not posteriors:
        raise ValueError("Expected at least one posterior to draw; got none.")
    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)
    coords = dict(coords or {})
    curves = {n: _curve(n, p, var, coords, bandwidth) for n, p in posteriors.items()}
    ax = axes_or_new(ax, 6.4, 4.4)
    for i, (name, (x, density)) in enumerate(curves.items()):
        exact = isinstance(posteriors[name], Distribution)
        (line,) = ax.plot(x, density, color=COLORS[i % len(COLORS)], label=name)
        if exact:
            line.set(linestyle="dashed", zorder=3)
    ax.set(xlabel=_name_of(var, coords), ylabel="density")
    ax.set_ylim(bottom=0.0)
    open_frame(ax)
    legend_below(ax, ncols=len(curves) if len(curves) < 4 else 2)
    return ax


def _curve(
    name: str, posterior: Any, var: str, coords: dict[str, int], bandwidth: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Places and the density there."""
    if isinstance(posterior, Distribution):
        return _closed_form(name, posterior)
    if isinstance(posterior, Tensor):
        draws = to_numpy(check_data(name, posterior, ndim=1))
    else:
        draws = _draws_of(name, posterior, var, coords)
    return _kernel_density(name, draws, bandwidth)


def _closed_form(name: str, distribution: Any) -> tuple[np.ndarray, np.ndarray]:
    shape = tuple(distribution.batch_shape + distribution.event_shape)
    if shape:
        raise ValueError(
            f"Expected a distribution of one number for '{name}'; got one of shape {shape}. Pass "
            f"its marginal."
        )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        draws = distribution.sample((20_000,))  # few distributions know their quantiles
        low, high = torch.quantile(draws, draws.new_tensor([_TAIL, 1 - _TAIL])).tolist()
        x = torch.linspace(low, high, _POINTS, dtype=draws.dtype, device=draws.device)
        return to_numpy(x), to_numpy(distribution.log_prob(x).exp())


def _draws_of(name: str, idata: Any, var: str, coords: dict[str, int]) -> np.ndarray:
    try:
        posterior = posterior_of(idata)
    except (KeyError, TypeError, IndexError) as error:
        raise TypeError(
            f"Expected what to_arviz returns, draws or a Distribution for '{name}'; got "
            f"{type(idata).__name__}."
        ) from error
    if var not in posterior:
        raise ValueError(
            f"Expected a variable of '{name}', among {sorted(map(str, posterior))}; got '{var}'."
        )
    values = posterior[var].isel(coords)
    rest = [dim for dim in values.dims if dim not in ("chain", "draw")]
    if rest:
        raise ValueError(
            f"Expected one number per draw of '{var}'; got dimensions {rest} as well. Choose a "
            f"position in each by coords={{{rest[0]!r}: 0, ...}}."
        )
    return values.values.ravel().astype(np.float64)


def _kernel_density(
    name: str, draws: np.ndarray, bandwidth: float | None
) -> tuple[np.ndarray, np.ndarray]:
    from scipy.stats import gaussian_kde

    # a random subset by a generator of its own: a regular one could fall in step with chains
    draws = np.random.default_rng(0).permutation(draws)[:_MAX_DRAWS]
    low, high = draws.min(), draws.max()
    if high - low <= 1e-6 * np.abs(draws).max():  # what float32 rounding leaves of no spread
        raise ValueError(
            f"Expected draws of '{name}' that spread; got {len(draws)} at {low:.4g}, which have no "
            f"density."
        )
    kernels = gaussian_kde(draws, bw_method=bandwidth)
    reach = _REACH * kernels.factor * draws.std()
    x = np.linspace(low - reach, high + reach, _POINTS)
    density, ends = kernels(x), kernels([low, high])
    for end, side, value in ((low, x >= low, ends[0]), (high, x <= high, ends[1])):
        if value > _CLIFF * density.max():
            density = np.where(side, density + kernels(2 * end - x), np.nan)
    inside = ~np.isnan(density)
    return x[inside], density[inside]


def _name_of(var: str, coords: dict[str, int]) -> str:
    return f"{var}[{', '.join(map(str, coords.values()))}]" if coords else var
