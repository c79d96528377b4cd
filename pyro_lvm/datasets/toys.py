"""Toys: points in the plane that a picture shows whole."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lvm.checks import check_positive
from pyro_lvm.datasets.checks import check_features

__all__ = ["pinwheel", "ring_of_gaussians", "ring_of_gaussians_log_prob", "two_moons"]


def two_moons(num_data: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Two interleaved half circles of radius 1, drawn alike, with Gaussian noise of 0.1.

    Args:
        num_data: How many points, N.
        generator: Source of randomness, which also says the device; the global one if None.

    Returns:
        ``N x 2``.

    Raises:
        ValueError: If ``num_data`` is below one.
    """
    check_positive("num_data", num_data, minimum=1)
    source = _source(generator)
    lower = torch.rand(num_data, **source) < 0.5
    angle = math.pi * torch.rand(num_data, **source)
    upper_moon = torch.stack([angle.cos(), angle.sin()], -1)
    # The same arc upside down, its end in the middle of the other one.
    lower_moon = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
    moons = torch.where(lower.unsqueeze(-1), lower_moon, upper_moon)
    return moons + 0.1 * torch.randn(num_data, 2, **source)


def _source(generator: torch.Generator | None) -> dict[str, Any]:
    """How to draw from the generator, on its own device."""
    return {} if generator is None else {"generator": generator, "device": generator.device}


def pinwheel(num_data: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Five arms that wind about the origin.

    Along an arm the radius is r ~ N(1, 0.3), across it the offset is t ~ N(0, 0.1); the point
    (r, t) is turned by 2 pi k / 5 + exp(r) / 4 for the arm k (Johnson et al. 2016).

    Args:
        num_data: How many points, N.
        generator: Source of randomness, which also says the device; the global one if None.

    Returns:
        ``N x 2``.

    Raises:
        ValueError: If ``num_data`` is below one.
    """
    check_positive("num_data", num_data, minimum=1)
    source = _source(generator)
    arm = torch.randint(5, (num_data,), **source)
    radius = 1 + 0.3 * torch.randn(num_data, **source)
    offset = 0.1 * torch.randn(num_data, **source)
    angle = 2 * math.pi * arm / 5 + radius.exp() / 4
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * radius - sin * offset, sin * radius + cos * offset], -1)


_RING_COMPONENTS, _RING_RADIUS, _RING_SCALE = 8, 2.0, 0.2


def ring_of_gaussians(num_data: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Eight Gaussians of scale 0.2 and equal weight, evenly on a circle of radius 2.

    Their density is :func:`ring_of_gaussians_log_prob`.

    Args:
        num_data: How many points, N.
        generator: Source of randomness, which also says the device; the global one if None.

    Returns:
        ``N x 2``.

    Raises:
        ValueError: If ``num_data`` is below one.
    """
    check_positive("num_data", num_data, minimum=1)
    source = _source(generator)
    noise = torch.randn(num_data, 2, **source)
    component = torch.randint(_RING_COMPONENTS, (num_data,), **source)
    return _ring_locs(noise)[component] + _RING_SCALE * noise


def _ring_locs(like: Tensor) -> Tensor:
    angle = 2 * math.pi * torch.arange(_RING_COMPONENTS).to(like) / _RING_COMPONENTS
    return _RING_RADIUS * torch.stack([angle.cos(), angle.sin()], -1)  # 8 x 2


def ring_of_gaussians_log_prob(x: Tensor) -> Tensor:
    """Exact log density of :func:`ring_of_gaussians`.

        log p(x) = log (1/8) sum_k N(x; m_k, 0.2^2 I)

    Args:
        x: Points, ``N x 2``.

    Returns:
        ``N``, in nats.

    Raises:
        TypeError: If ``x`` is no tensor of a floating point type.
        ValueError: If ``x`` is not ``N x 2`` or not finite.
    """
    check_features(x, 2)
    per_component = dist.Normal(_ring_locs(x), _RING_SCALE).log_prob(x.unsqueeze(-2)).sum(-1)
    return per_component.logsumexp(-1) - math.log(_RING_COMPONENTS)
