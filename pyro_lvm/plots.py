"""Pictures of images, latents, training and comparisons: ``plot_*(data, *, ax=None) -> Axes``.

Every function draws into the Axes that it is given, or into a new figure, and returns the Axes.
Nothing is shown and no setting of matplotlib is changed. Tensors may be on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_lvm.checks import check_data, check_positive

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = [
    "plot_aggregate_posterior",
    "plot_comparison",
    "plot_history",
    "plot_images",
    "plot_means",
    "plot_reconstructions",
]

# The palette of Okabe and Ito, told apart by colour-blind readers; its yellow, too pale for a thin
# line on white, is left out.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_GREY = "0.55"


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    """The Axes given, or those of a new figure of that size in inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


# ---------------------------------------------------------------------------------------- images


def plot_images(
    images: Tensor,
    *,
    image_shape: Sequence[int] | None = None,
    columns: int | None = None,
    vmin: float = 0.0,
    vmax: float = 1.0,
    ax: Axes | None = None,
) -> Axes:
    """Images side by side in one Axes, row by row.

    Args:
        images: ``N x H x W``, ``N x 1 x H x W`` or, in colour, ``N x 3 x H x W``; or rows
            ``N x D`` with ``image_shape``.
        image_shape: The shape of one image, ``(H, W)`` or ``(C, H, W)``.
        columns: How many images in a row; if None the grid is about square.
        vmin: Value drawn black; values below are clipped to it.
        vmax: Value drawn white; values above are clipped to it.
        ax: Where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        TypeError: If ``images`` is not a tensor.
        ValueError: If the shape is none of these, values are not finite, or ``vmin >= vmax``.
    """
    pixels = _as_images("images", images, image_shape)
    columns = _columns(columns, len(pixels), math.ceil(math.sqrt(len(pixels))))
    return _draw(_tile(pixels, columns), vmin, vmax, ax, columns)


def _as_images(name: str, images: Tensor, image_shape: Sequence[int] | None) -> np.ndarray:
    """``N x H x W`` or ``N x H x W x 3``."""
    pixels = _to_numpy(check_data(name, images))
    if image_shape is not None:
        if pixels[0].size != math.prod(image_shape):
            raise ValueError(
                f"Expected {name} of {math.prod(image_shape)} values each for image_shape="
                f"{tuple(image_shape)}; got {pixels[0].size}, shape {pixels.shape}."
            )
        pixels = pixels.reshape(len(pixels), *image_shape)
    if pixels.ndim == 4 and pixels.shape[1] == 1:
        return pixels[:, 0]
    if pixels.ndim == 4 and pixels.shape[1] == 3:
        return np.moveaxis(pixels, 1, -1)
    if pixels.ndim != 3:
        raise ValueError(
            f"Expected {name} of shape N x H x W, N x 1 x H x W or N x 3 x H x W, or N x D with "
            f"image_shape=; got {pixels.shape}."
        )
    return pixels


def _columns(columns: int | None, num_images: int, default: int) -> int:
    if columns is None:
        return default
    check_positive("columns", columns, minimum=1)
    return min(columns, num_images)


def _tile(images: np.ndarray, columns: int, *, below: int = 0) -> np.ndarray:
    """One array of all images, with one pixel of NaN about each and ``below`` more under it."""
    num_images, height, width, *channels = images.shape
    rows = math.ceil(num_images / columns)
    cells = np.full((rows * columns, height + 1 + below, width + 1, *channels), np.nan)
    cells[:num_images, :height, :width] = images
    grid = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)  # rows x H x columns x W
    canvas = grid.reshape(rows * cells.shape[1], columns * cells.shape[2], *channels)
    outer = [(1, 0), (1, 0)] + [(0, 0)] * len(channels)
    return np.pad(canvas, outer, constant_values=np.nan)


def _draw(
    canvas: np.ndarray,
    vmin: float,
    vmax: float,
    ax: Axes | None,
    columns: int,
    *,
    left: float = 0.0,
    top: float = 0.0,
) -> Axes:
    """Draw the tiles; a new figure gets so many inches more for labels at the left and the top."""
    if not vmin < vmax:
        raise ValueError(f"Expected vmin < vmax; got {vmin} and {vmax}.")
    height, width = canvas.shape[:2]
    inches = min(0.8 * columns, 10.0)  # 0.8 inch an image, and no wider than a page
    ax = _axes(ax, max(inches + left, 2.8), inches * height / width + top)  # 2.8: for a title
    canvas = canvas.clip(vmin, vmax)  # NaN stays NaN, and is drawn in the colour of the Axes
    if canvas.ndim == 3:
        canvas = np.nan_to_num((canvas - vmin) / (vmax - vmin), nan=1.0)
    ax.imshow(canvas, cmap="gray", vmin=vmin, vmax=vmax, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    return ax


def plot_reconstructions(
    originals: Tensor,
    reconstructions: Tensor,
    *,
    image_shape: Sequence[int] | None = None,
    columns: int | None = None,
    vmin: float = 0.0,
    vmax: float = 1.0,
    ax: Axes | None = None,
) -> Axes:
    """Pairs of rows: images, and under each one its reconstruction.

    Args:
        originals: Images, in any of the shapes of :func:`plot_images`.
        reconstructions: As many images of the same size.
        image_shape: The shape of one image, ``(H, W)`` or ``(C, H, W)``.
        columns: How many pairs in a row; at most ten if None.
        vmin: Value drawn black; values below are clipped to it.
        vmax: Value drawn white; values above are clipped to it.
        ax: Where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        TypeError: If either is not a tensor.
        ValueError: If a shape is wrong, the two do not match, or values are not finite.
    """
    above = _as_images("originals", originals, image_shape)
    under = _as_images("reconstructions", reconstructions, image_shape)
    if above.shape != under.shape:
        raise ValueError(
            f"Expected as many reconstructions as originals, of one size; got images of "
            f"{under.shape} and {above.shape}."
        )
    columns = _columns(columns, len(above), min(len(above), 10))
    height = above.shape[1]
    between = np.full_like(above[:, :1], np.nan)
    pairs = np.concatenate([above, between, under], axis=1)
    gap = math.ceil(height / 8)
    ax = _draw(_tile(pairs, columns, below=gap), vmin, vmax, ax, columns, left=1.2, top=0.3)
    tops = 1 + np.arange(math.ceil(len(above) / columns)) * (2 * height + 2 + gap)
    middles = np.stack([tops, tops + height + 1], axis=1).ravel() + (height - 1) / 2
    ax.set_yticks(middles, ["original", "reconstruction"] * len(tops))
    ax.tick_params(axis="y", length=0)
    return ax


def plot_means(
    loc: Tensor,
    *,
    weights: Tensor | None = None,
    image_shape: Sequence[int] | None = None,
    columns: int | None = None,
    vmin: float = 0.0,
    vmax: float = 1.0,
    ax: Axes | None = None,
) -> Axes:
    """The means of the components of a mixture as images, their weights as captions.

    Args:
        loc: Means of K components, in any of the shapes of :func:`plot_images` with N = K.
        weights: Weights of the components, ``K``, non-negative; drawn in percent of their sum.
        image_shape: The shape of one image, ``(H, W)`` or ``(C, H, W)``.
        columns: How many images in a row; at most ten if None.
        vmin: Value drawn black; values below are clipped to it.
        vmax: Value drawn white; values above are clipped to it.
        ax: Where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        TypeError: If either is not a tensor.
        ValueError: If a shape is wrong, weights are negative or all zero, or values not finite.
    """
    pixels = _as_images("loc", loc, image_shape)
    shares = None if weights is None else _shares(weights, len(pixels))
    num_means, height, width = pixels.shape[:3]
    columns = _columns(columns, num_means, min(num_means, 10))
    gap = 0 if shares is None else math.ceil(0.3 * height)  # room for a line of text
    ax = _draw(_tile(pixels, columns, below=gap), vmin, vmax, ax, columns, top=0.3)
    ax.set_title("Component means" if shares is None else "Component means and weights")
    for k, share in enumerate(() if shares is None else shares):
        row, column = divmod(k, columns)
        x = 1 + column * (width + 1) + (width - 1) / 2
        y = (row + 1) * (height + 1 + gap) - gap / 2
        ax.text(x, y, f"{share:.1%}", ha="center", va="center", fontsize="small")
    return ax


def _shares(weights: Tensor, num_components: int) -> np.ndarray:
    values = _to_numpy(check_data("weights", weights, ndim=1))
    if len(values) != num_components or values.min() < 0 or values.sum() <= 0:
        raise ValueError(
            f"Expected {num_components} non-negative weights, one for each component; got "
            f"{len(values)} with sum {values.sum():.4g} and minimum {values.min():.4g}."
        )
    return values / values.sum()


# --------------------------------------------------------------------------------------- latents

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
    ax = _axes(ax, 5.5, 6.1)
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
    draws = _to_numpy(z.reshape(-1, num_dims)[:, list(dims)])
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
    ax.contour(*grid, values, levels, colors=_COLORS[0], linewidths=0.8, zorder=3)


def _line_contours(
    ax: Axes, grid: list[np.ndarray], density: _Density, levels: list[float]
) -> None:
    values = _evaluate(density, grid)
    ax.contour(
        *grid, values, levels, colors=_COLORS[1], linewidths=1.6, linestyles="dashed", zorder=4
    )


def _contour_legend(ax: Axes) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shades = [
        Patch(facecolor=shade, edgecolor=_COLORS[0], label=f"{mass:.0%} of q(z)")
        for mass, shade in zip(_MASSES[::-1], _SHADES[::-1], strict=True)
    ]
    dashed = Line2D([], [], color=_COLORS[1], linestyle="dashed", label="the same of p(z)")
    _legend_below(ax, handles=[*shades, dashed], ncols=2)


def _legend_below(ax: Axes, **settings: Any) -> None:
    """A legend that hides nothing: under the label of the x axis, 4.5 font sizes down."""
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        borderaxespad=4.5,
        fontsize="small",
        frameon=False,
        **settings,
    )


# ------------------------------------------------------------------------- training and comparison

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
        terms: The terms to draw, without the prefix; all of them if None.
        ax: Where to draw; a new figure if None.

    Returns:
        The Axes.

    Raises:
        ValueError: If a term is not in ``history``, or there is nothing to draw.
    """
    known = list(dict.fromkeys(name.removeprefix(_VALIDATION) for name in history))
    chosen = known if terms is None else list(dict.fromkeys(terms))
    unknown = [term for term in chosen if term not in known]
    if unknown or not chosen:
        raise ValueError(f"Expected terms among {known}; got {unknown or 'none'}.")
    from matplotlib.ticker import MaxNLocator

    curves = {name: _curve(name, values) for name, values in history.items()}
    ax = _axes(ax, 6.4, 4.0)
    for index, term in enumerate(chosen):
        for name, linestyle in ((term, "solid"), (_VALIDATION + term, "dashed")):
            if name in curves:
                _draw_curve(ax, name, curves[name], index, linestyle)
    ax.set(xlabel="epoch", ylabel="nats per datum", title="Training history")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _open_frame(ax)
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
    cycle, place = divmod(index, len(_COLORS))
    marker = ("", "o", "s", "^")[cycle % 4]  # where the colours come round again
    ax.plot(
        np.arange(1, len(values) + 1),
        values,
        color=_COLORS[place],
        linestyle=linestyle,
        marker=marker or ("o" if len(values) == 1 else ""),  # one epoch makes no line
        markersize=4,
        label=name,
    )


def _open_frame(ax: Axes) -> None:
    ax.grid(alpha=0.3)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


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
    ax = _axes(ax, 6.4, 1.7 + 0.5 * len(rows))
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
    _open_frame(ax)
    _legend_below(ax)
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
