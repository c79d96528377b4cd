"""Data in the coordinates of many Gaussians at once, where each of these is N(0, I).

Data are columns here, ``... x D x N``, and so the results are rows of N numbers. A factor L of each
covariance comes as its inverse, ``... x C x D x D``, or ``... x C x 1 x D`` for the diagonal of a
diagonal one. ``C`` may be 1 in either of mean and factor, which all Gaussians share then.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.distributions.recorded import is_recorded

__all__ = [
    "columns_at_once",
    "inverse_factor",
    "log_normaliser",
    "middle",
    "squared_lengths",
    "whiten",
    "whitened_means",
]

# Numbers of the whitened data at a time: they stay in a processor's cache, and are few beside what
# a GPU holds and enough to keep it busy.
_AT_ONCE = {"cpu": 2**19, "cuda": 2**25}


def columns_at_once(shape: torch.Size, device: torch.device) -> int:
    """How many data to whiten at a time with means of this shape, ``... x C x D``."""
    return max(1, _AT_ONCE.get(device.type, 2**25) // shape.numel())


def middle(loc: Tensor) -> Tensor:
    """What to subtract from data and means, ``... x D``, so that rounding does little harm.

    One of the means in each feature, the middle one: it is among the data whatever the farthest
    means are, and what is near it loses nothing when it is subtracted. It has no gradient, as the
    densities don't depend on it.
    """
    return loc.detach().sort(-2).values[..., loc.shape[-2] // 2, :]


def inverse_factor(scale: Tensor, tril: Tensor | None) -> Tensor:
    """L^-1 of L = diag(scale) (I + tril), or the diagonal of that where ``tril`` is None.

    Args:
        scale: ``... x C x D``, or broadcastable to it.
        tril: Strictly lower triangular, ``... x C x D x D``, or broadcastable to it.
    """
    if tril is None:
        return scale.reciprocal().unsqueeze(-2)
    identity = torch.eye(tril.shape[-1]).to(tril)
    unit = tril + identity
    unit = torch.linalg.solve_triangular(unit, identity, upper=False, unitriangular=True)
    return unit / scale.unsqueeze(-2)


def log_normaliser(scale: Tensor, num_features: int) -> Tensor:
    """Log |L| + D/2 log 2 pi, ``... x C``, nats."""
    log_det = scale.log().expand(*scale.shape[:-1], num_features).sum(-1)
    return log_det + 0.5 * num_features * math.log(2 * math.pi)


def whitened_means(loc: Tensor, inverse: Tensor) -> Tensor:
    """L^-1 loc, ``... x C x D``."""
    if inverse.shape[-2] == 1:
        return loc * inverse.squeeze(-2)
    return (inverse @ loc.unsqueeze(-1)).squeeze(-1)


def whiten(columns: Tensor, means: Tensor, inverse: Tensor, *, out: Tensor | None = None) -> Tensor:
    """L^-1 (x - loc) = L^-1 x - L^-1 loc, ``... x C x D x N``, one matrix product for all factors.

    Its rounding errors are those of rounding x: data have to be near the origin.

    Args:
        columns: x, ``... x D x N``.
        means: L^-1 loc, ``... x C x D``.
        inverse: L^-1, ``... x C x D x D`` or ``... x C x 1 x D``.
        out: Where to write it, if no gradient is wanted.
    """
    means = means.unsqueeze(-1)
    if inverse.shape[-2] == 1:
        return torch.addcmul(-means, columns.unsqueeze(-3), inverse.mT, out=out)
    if inverse.shape[-3] == 1:
        return torch.sub(inverse @ columns.unsqueeze(-3), means, out=out)
    affine = torch.cat([inverse.expand(*means.shape[:-1], -1), -means], -1)  # ... x C x D x (D + 1)
    columns = torch.cat([columns, torch.ones_like(columns[..., :1, :])], -2)
    out = None if out is None else out.flatten(-3, -2)
    return torch.matmul(affine.flatten(-3, -2), columns, out=out).unflatten(-2, means.shape[-3:-1])


def squared_lengths(columns: Tensor, means: Tensor, inverse: Tensor) -> Tensor:
    """|L^-1 (x - loc)|^2, ``... x C x N``, from arguments as those of `whiten`.

    The whitened data exist for some columns at a time only. A gradient computes them anew, which
    takes less time than to write and read them, and can be differentiated again.
    """
    size = columns_at_once(means.shape, columns.device)
    # A program that is recorded has no use for chunks, as its compiler fuses these operations, and
    # what torch.func transforms has to be plain.
    if columns.shape[-1] <= size or is_recorded():
        return _squared_lengths(columns, means, inverse)
    return _InChunks.apply(columns, means, inverse, size)


def _squared_lengths(columns: Tensor, means: Tensor, inverse: Tensor) -> Tensor:
    return whiten(columns, means, inverse).square().sum(-2)


class _InChunks(torch.autograd.Function):
    """`_squared_lengths` of some columns at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, means: Tensor, inverse: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(columns, means, inverse)
        ctx.size = size
        return torch.cat([_squared_lengths(x, means, inverse) for x in columns.split(size, -1)], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        columns, *table = ctx.saved_tensors
        chunks = zip(columns.split(ctx.size, -1), gradient.split(ctx.size, -1), strict=True)
        parts = [_gradients((x, *table), g, ctx.needs_input_grad[:3]) for x, g in chunks]
        of_columns, *of_table = zip(*parts, strict=True)
        whole = None if of_columns[0] is None else torch.cat(of_columns, -1)
        return whole, *(None if grads[0] is None else sum(grads) for grads in of_table), None


def _gradients(
    inputs: tuple[Tensor, ...], gradient: Tensor, needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Those of `_squared_lengths`, None where it is not needed."""
    again = torch.is_grad_enabled()  # somebody will differentiate the gradient
    with torch.enable_grad():
        own = [x.view_as(x) if again else x.detach() for x in inputs]
        wanted = [x if again else x.requires_grad_() for x, n in zip(own, needed, strict=True) if n]
        white = whiten(*own)
        slope = 2 * gradient.unsqueeze(-2) * (white if again else white.detach())
        found = iter(torch.autograd.grad(white, wanted, slope, create_graph=again))
    return [next(found) if n else None for n in needed]
