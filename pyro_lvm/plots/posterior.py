"""The aggregate posterior: where a guide puts the latents of all data, against their prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pyro_lvm.checks import check_data, check_positive
from pyro_lvm.plots.axes import COLORS, axes_or_new, legend_below, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_aggregate_posterior"]

_MASSES = (0.95, 0.80, 0.50)  # enclosed by the contours, from the outermost in
_SHADES = ("#C6DBEF", "#6BAED6", "#2171B5")  # of blue, in the same order
_MAX_POINTS = 3000  # a kernel density of more is slow, and looks the same

_Density = Callable[[np.ndarray], np.ndarray]  # 2 x points -> points


def plot_aggregate_posterior(
    z: Tensor,
    *,
    prior: Tensor | None = None,
    dims: tuple[int, int] = (0, 1),
    bandwidth: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The aggregate posterior q(z) = (1/N) sum_i q(z | x_i) against the prior p(z).

    Contours enclose 50, 80 and 95 percent of the mass: the smallest regions that do (Hyndman
    1996), by the quantiles of the estimated density at the draws themselves. The density is a
    Gaussian kernel estimate; its default bandwidth blurs clusters that are close together.

    Args:
        z: Draws from the guide, ``N x D`` or ``num_particles x N x D``.
        prior: Draws from the prior, of the same kind; the standard normal density if None.
        dims: The two coordinates of z to draw.
        bandwidth: Width of the kernel as a share of the spread of the draws; by Scott's rule,
            ``N^(-1/6)``, if None.
        ax: Where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        TypeError: If ``z`` or ``prior`` is not a tensor.
        ValueError: If a shape is wrong, ``dims`` do not exist, or the draws have no spread in
            the plane, so that there is no density.

    Reference:
        Hyndman (1996), Computing and graphing highest density regions.
    """
    points = _plane("z", z, dims)
    posterior, levels = _kernel_density("z", points, bandwidth)
    prior_points, prior_density, prior_levels = _prior(prior, dims, bandwidth)
    ax = axes_or_new(ax, 5.5, 6.1)
    grid = _grid(points, prior_points)
    _fill_contours(ax, grid, posterior, levels)
    ax.plot(*points, ".", color="black", markersize=2, alpha=0.25, zorder=2, rasterized=True)
    _line_contours(ax, grid, prior_density, prior_levels)
    ax.set_aspect("equal")
    ax.set(xlabel=f"$z_{{{dims[0]}}}$", ylabel=f"$z_{{{dims[1]}}}$")
    ax.set_title("Aggregate posterior and prior")
    _contour_legend(ax)
    return ax


def _prior(
    prior: Tensor | None, dims: tuple[int, int], bandwidth: float | None
) -> tuple[np.ndarray, _Density, list[float]]:
    """Points that the picture has to show, the density, its values on the contours."""
    if prior is not None:
        points = _plane("prior", prior, dims)
        return points, *_kernel_density("prior", points, bandwidth)
    levels = [(1 - mass) / (2 * math.pi) for mass in _MASSES]  # P(|z| < r) = 1 - exp(-r^2 / 2)
    return np.array([[-2.5, 2.5], [-2.5, 2.5]]), _standard_normal, levels  # 95 %: r = 2.45


def _plane(name: str, z: Tensor, dims: tuple[int, int]) -> np.ndarray:
    """Some of the draws in two coordinates, ``2 x points``."""
    check_data(name, z)
    num_dims = z.shape[-1]
    if z.dim() not in (2, 3) or num_dims < 2:
        raise ValueError(
            f"Expected {name} of shape N x D or num_particles x N x D with D >= 2; got "
            f"{tuple(z.shape)}."
        )
    if len(dims) != 2 or dims[0] == dims[1] or not all(0 <= dim < num_dims for dim in dims):
        raise ValueError(f"Expected two different dims from 0 to {num_dims - 1}; got {dims}.")
    draws = to_numpy(z.reshape(-1, num_dims)[:, list(dims)])
    # A random subset by a generator of its own: a regular one could fall in step with particles.
    return np.random.default_rng(0).permutation(draws)[:_MAX_POINTS].T


def _kernel_density(
    name: str, points: np.ndarray, bandwidth: float | None
) -> tuple[_Density, list[float]]:
    """A kernel density estimate, and its values on the contours."""
    from scipy.stats import gaussian_kde

    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)
    centred = points - points.mean(axis=1, keepdims=True)
    spread = np.linalg.svd(centred, compute_uv=False).min() / math.sqrt(points.shape[1])
    if spread <= 1e-6 * np.abs(points).max():  # what float32 rounding leaves of none at all
        raise ValueError(
            f"Expected {name} with spread in both of the coordinates; got {points.shape[1]} "
            f"draw(s) on a point or a line, which have no density. Choose other dims."
        )
    density = gaussian_kde(points, bw_method=bandwidth)
    levels = np.quantile(density(points), [1 - mass for mass in _MASSES])
    # Draws that repeat can tie the levels, and contours want them to increase.
    return density, (levels * (1 + 1e-9 * np.arange(len(levels)))).tolist()


def _standard_normal(points: np.ndarray) -> np.ndarray:
    return np.exp(-(points**2).sum(0) / 2) / (2 * math.pi)


def _grid(*clouds: np.ndarray) -> list[np.ndarray]:
    """A mesh over all clouds but their last outliers, with a margin for the smoothing."""
    edges = np.stack([np.quantile(cloud, [0.005, 0.995], axis=1) for cloud in clouds])
    low, high = edges[:, 0].min(0), edges[:, 1].max(0)
    margin = 0.15 * (high - low)
    xs, ys = np.linspace(low - margin, high + margin, 128).T
    return list(np.meshgrid(xs, ys))


def _evaluate(density: _Density, grid: list[np.ndarray]) -> np.ndarray:
    return density(np.stack([axis.ravel() for axis in grid])).reshape(grid[0].shape)


def _fill_contours(
    ax: Axes, grid: list[np.ndarray], density: _Density, levels: list[float]
) -> None:
    values = _evaluate(density, grid)
    ax.contourf(*grid, values, levels, colors=_SHADES, extend="max", alpha=0.85, zorder=1)
    ax.contour(*grid, values, levels, colors=COLORS[0], linewidths=0.8, zorder=3)


def _line_contours(
    ax: Axes, grid: list[np.ndarray], density: _Density, levels: list[float]
) -> None:
    values = _evaluate(density, grid)
    ax.contour(
        *grid, values, levels, colors=COLORS[1], linewidths=1.6, linestyles="dashed", zorder=4
    )


def _contour_legend(ax: Axes) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shades = [
        Patch(facecolor=shade, edgecolor=COLORS[0], label=f"{mass:.0%} of q(z)")
        for mass, shade in zip(_MASSES[::-1], _SHADES[::-1], strict=True)
    ]
    dashed = Line2D([], [], color=COLORS[1], linestyle="dashed", label="the same of p(z)")
    legend_below(ax, handles=[*shades, dashed], ncols=2)
