"""A table of Gaussians, and data that miss some features: what is alike is factorised once."""

import torch
from torch import Tensor

from pyro_lvm.distributions.marginal_normal import (
    covariance_of,
    dense_log_prob,
    diagonal_log_prob,
    regression,
)
from pyro_lvm.distributions.patterns import in_groups, patterns_of, when_needed
from pyro_lvm.distributions.recorded import is_recorded
from pyro_lvm.distributions.whitening import columns_at_once

__all__ = ["observed_log_prob_table", "regression_by_pattern"]


def observed_log_prob_table(
    value: Tensor, loc: Tensor, scale: Tensor, tril: Tensor | None, mask: Tensor
) -> Tensor:
    """Log N(x_o; loc_o, S_oo) under every Gaussian of a table, ``... x C``, nats.

    Args:
        value: ``... x D``; what stands at missing features does not count.
        loc: Means, ``... x C x D``, where ``...`` are batch dimensions.
        scale: Of S = L L^T, L = diag(scale) (I + tril); ``... x C x D`` or broadcastable to it.
        tril: ``... x C x D x D``, or broadcastable to it; None for diagonal covariances.
        mask: Which features are observed, ``... x D``.
    """
    mask = mask.expand(*mask.shape[:-1], loc.shape[-1])
    x = torch.where(mask, value, 0.0)
    if tril is None:
        return _diagonal(x, loc, scale, mask)
    covariance = covariance_of(scale.expand(*scale.shape[:-1], loc.shape[-1]), tril)
    batch = torch.broadcast_shapes(loc.shape[:-2], covariance.shape[:-3])
    data = max(
        1, x.dim() - 1
    )  # dimensions of the data, in which a table that they share has size 1
    if is_recorded() or batch[-data:].numel() > 1:
        return dense_log_prob(x.unsqueeze(-1), loc, covariance, mask).squeeze(-1)
    particles = batch[:-data]
    loc = loc.reshape(*loc.shape[:-2][:-data], *loc.shape[-2:])
    covariance = covariance.reshape(*covariance.shape[:-3][:-data], *covariance.shape[-3:])
    found = _by_pattern(x, loc, covariance, mask, len(particles))
    return found.reshape(*torch.broadcast_shapes(batch, x.shape[:-1]), loc.shape[-2])


def regression_by_pattern(
    residual: Tensor, covariance: Tensor, index: Tensor, mask: Tensor
) -> Tensor:
    """S_.o S_oo^-1 r_o with the Gaussian that each datum has, ``... x D``.

    Args:
        residual: r = x - loc, ``... x D``; what stands at missing features does not count.
        covariance: S, ``C x D x D``, float64, where ``C`` may be 1.
        index: Which Gaussian, ``...``.
        mask: Which features are observed, ``... x D``.
    """
    rows = torch.broadcast_shapes(index.shape, residual.shape[:-1], mask.shape[:-1])
    patterns, number = patterns_of(mask)
    flat = torch.where(mask, residual, 0.0).expand(*rows, -1).reshape(-1, residual.shape[-1])
    index = index if len(covariance) > 1 else torch.zeros_like(index)
    keys = (number * len(covariance) + index).expand(rows).flatten()

    def compute(key: Tensor, numbers: Tensor) -> Tensor:
        own, seen = covariance[key % len(covariance)], patterns[key // len(covariance)]
        return when_needed(regression, flat[numbers].mT, own, seen)  # G x D x n

    most = columns_at_once(residual.shape[-1:], residual.device)
    found = in_groups(compute, keys, most=most, least=residual.shape[-1])
    return found.T.reshape(*rows, -1)


def _by_pattern(x: Tensor, loc: Tensor, covariance: Tensor, mask: Tensor, particles: int) -> Tensor:
    """Densities of data that share a table, ``(particles) x R x C``."""
    patterns, number = patterns_of(mask)
    flat = x.reshape(-1, x.shape[-1])  # R x D

    def compute(key: Tensor, numbers: Tensor) -> Tensor:
        seen, columns = patterns[key], flat[numbers].mT  # G x D, G x D x n
        for _ in range(particles):
            seen, columns = seen.unsqueeze(1), columns.unsqueeze(1)
        return dense_log_prob(columns, loc, covariance, seen)  # G x (particles) x C x n

    keys = number.expand(x.shape[:-1]).flatten()
    shape = torch.broadcast_shapes(loc.shape, covariance.shape[:-1])
    most = columns_at_once(shape, x.device)
    return in_groups(compute, keys, most=most, least=x.shape[-1]).mT


def _diagonal(x: Tensor, loc: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    """Densities for diagonal covariances, ``... x C``, of some data at a time."""
    most = columns_at_once(loc.shape[-2:], x.device)
    shared = loc.shape[:-2].numel() == scale.shape[:-2].numel() == 1
    if is_recorded() or not shared or x.shape[:-1].numel() <= most:
        return diagonal_log_prob(x, loc, scale, mask)
    loc, scale = loc.reshape(loc.shape[-2:]), scale.reshape(scale.shape[-2:])
    data = (t.expand(x.shape).reshape(-1, x.shape[-1]).split(most) for t in (x, mask))
    parts = [
        when_needed(lambda x, mask: diagonal_log_prob(x, loc, scale, mask), *some)
        for some in zip(*data, strict=True)
    ]
    return torch.cat(parts).reshape(*x.shape[:-1], -1)
