"""Latents as vectors in all of the reals, where a chain moves freely."""

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import VonMises, biject_to, constraints

from pyro_lvm.terms import sample_table

__all__ = ["Coordinates", "support_of"]


class _Site(NamedTuple):
    """Where a site is in the vector: its shape behind ``K x N``, and the way to its support."""

    shape: torch.Size
    transform: Any

    @property
    def size(self) -> int:
        return self.shape.numel()


class Coordinates:
    """The latents of each chain and datum as one vector, and back.

        z = T(u),    log |det dT/du|    beside it, as densities of u need it

    T is torch's bijection from the reals to a site's support, the identity where that is the reals.

    Args:
        sites: Site -> a site of the model as `sample_prior_sites` has it.
        others: The same sites of another run, with other values.
        plate: Name of the data plate.

    Raises:
        ValueError: If the support of a site differs between the runs, and so depends on latents.
    """

    def __init__(
        self, sites: Mapping[str, dict], others: Mapping[str, dict], *, plate: str
    ) -> None:
        for name, site in sites.items():
            _check_support(name, support_of(site), support_of(others[name]))
        self.sites = {name: _site_of(site, plate) for name, site in sites.items()}

    @property
    def dimension(self) -> int:
        """``D``, of the vector of a datum."""
        return sum(site.size for site in self.sites.values())

    def position(self, values: Mapping[str, Tensor]) -> Tensor:
        """Vectors of latents.

        Args:
            values: Site -> ``K x N x (nested plates) x event``.

        Returns:
            ``K x N x D``.

        Raises:
            ValueError: If a value is outside of its site's support, or on its edge.
        """
        parts = []
        for name, site in self.sites.items():
            part = site.transform.inv(values[name])
            _check_inside(name, part)
            parts.append(part.reshape(*part.shape[:2], site.size))
        return torch.cat(parts, -1)

    def values(self, position: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Latents of vectors, the inverse of `position`.

        Args:
            position: ``K x N x D``.

        Returns:
            Site -> ``K x N x (nested plates) x event``; and log |det dT/du|, ``K x N``.
        """
        values, log_det = {}, torch.zeros_like(position[..., 0])
        parts = position.split([site.size for site in self.sites.values()], -1)
        for (name, site), part in zip(self.sites.items(), parts, strict=True):
            u = part.reshape(*part.shape[:2], *site.shape)
            values[name] = site.transform(u)
            each = site.transform.log_abs_det_jacobian(u, values[name])
            log_det = log_det + each.reshape(*part.shape[:2], -1).sum(-1)
        return values, log_det


def support_of(site: dict) -> Any:
    """The constraint of a site's values; all of the reals for a distribution that has none."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if isinstance(fn, VonMises):  # whose density goes on in periods, and is that of one of them
        interval = constraints.interval(-math.pi, math.pi)
        event_dim = site["fn"].event_dim
        return constraints.independent(interval, event_dim) if event_dim else interval
    try:
        return site["fn"].support
    except NotImplementedError:
        return constraints.real


def _site_of(site: dict, plate: str) -> _Site:
    support = support_of(site)
    try:
        transform = biject_to(_in_table(support, site, plate))
    except NotImplementedError as error:
        raise ValueError(
            f"Expected a latent that torch can map to the reals one to one; got support {support} "
            f"at site '{site['name']}'. Write it as a function of unconstrained latents."
        ) from error
    example = sample_table(site, plate)
    return _Site(transform.inv(example).shape[2:], transform)


def _in_table(support: Any, site: dict, plate: str) -> Any:
    """A constraint whose bounds, where they are tensors, are laid out as the site's table."""
    if isinstance(support, constraints.independent):
        inner = _in_table(support.base_constraint, site, plate)
        return constraints.independent(inner, support.reinterpreted_batch_ndims)
    bounds = _bounds(support)
    if not bounds:
        return support
    support = copy.copy(support)
    for name, bound in bounds.items():
        full = {**site, "value": bound.detach().expand(site["value"].shape)}
        setattr(support, name, sample_table(full, plate))
    return support


def _bounds(support: Any) -> dict[str, Tensor]:
    return {k: v for k, v in vars(support).items() if isinstance(v, Tensor) and v.numel() > 1}


def _check_support(name: str, support: Any, other: Any) -> None:
    while isinstance(support, constraints.independent):
        support, other = support.base_constraint, other.base_constraint
    pairs = ((a, getattr(other, k)) for k, a in vars(support).items() if isinstance(a, Tensor))
    if not all(torch.equal(a, b) for a, b in pairs):
        raise ValueError(
            f"Expected the support of site '{name}' to be the same whatever the other latents are; "
            f"got {support} in one run and {other} in another. Draw it from a fixed range, as "
            f"Uniform(0, 1), and scale the draw."
        )


def _check_inside(name: str, part: Tensor) -> None:
    outside = int((~part.isfinite()).sum())
    if outside:
        raise ValueError(
            f"Expected draws within the support of site '{name}'; got {outside} outside of it or "
            f"at its edge. Give the guide the support that the model has, or, if draws are rounded "
            f"to the edge, more digits by dtype=torch.float64."
        )
