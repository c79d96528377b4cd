"""Images as tiles of one picture: by themselves, above their reconstructions, as means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pyro_lvm.checks import check_data, check_positive
from pyro_lvm.plots.axes import axes_or_new, to_numpy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_images", "plot_means", "plot_reconstructions"]


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
    pixels = to_numpy(check_data(name, images))
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
    ax = axes_or_new(ax, max(inches + left, 2.8), inches * height / width + top)  # 2.8: for a title
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
    values = to_numpy(check_data("weights", weights, ndim=1))
    if len(values) != num_components or values.min() < 0 or values.sum() <= 0:
        raise ValueError(
            f"Expected {num_components} non-negative weights, one for each component; got "
            f"{len(values)} with sum {values.sum():.4g} and minimum {values.min():.4g}."
        )
    return values / values.sum()
