"""Any distribution as a Pyro pair without latents."""

from typing import Any

import pyro.distributions as dist
from torch import nn

from pyro_lvm.models.density_model import DensityModel

__all__ = ["Density"]


class Density(DensityModel):
    """A distribution of the data as it is, a story without latents.

        model:  x_i ~ distribution()

    with the site "x" in the plate "data", and an empty guide. It makes a pair of whatever has a
    density, an autoregressive network or a flow, so that ``fit``, ``marginal.exact``, ``to_arviz``
    and ``compare`` are the same for it as for a latent variable model; log p(x) has no sampling
    error.

    Of a mask, True where an entry is observed, the model counts the observed entries alone, if
    their marginal has a closed form: independent entries and normals have one.

    Args:
        distribution: A module that returns a Distribution of Pyro's when it is called, with no
            batch shape and the event shape of a datum (a flow of Zuko's is one inside
            ``pyro.contrib.zuko.ZukoToPyro``); or a Distribution, which stays as it is, and where.
        plate: Name of the data plate.

    Raises:
        TypeError: If it is neither, or the module returns something else.
        ValueError: If the Distribution has a batch shape.
    """

    def __init__(self, distribution: nn.Module | dist.Distribution, *, plate: str = "data") -> None:
        super().__init__(plate=plate)
        if not isinstance(distribution, nn.Module):
            _check_distribution("distribution", distribution)
        self.distribution = distribution

    def forward(self) -> Any:
        """p(x), a Distribution without batch shape."""
        if not isinstance(self.distribution, nn.Module):
            return self.distribution
        p = self.distribution()
        _check_distribution("distribution()", p)
        return p


def _check_distribution(name: str, value: Any) -> None:
    if not isinstance(value, dist.Distribution):
        raise TypeError(
            f"Expected {name} to be a Distribution of pyro.distributions; got "
            f"{type(value).__module__}.{type(value).__name__}. Take Pyro's class of that name, or "
            f"wrap it by pyro.contrib.zuko.ZukoToPyro."
        )
    if value.batch_shape:
        raise ValueError(
            f"Expected {name} without batch shape; got {tuple(value.batch_shape)}. Try "
            f".to_event({len(value.batch_shape)})."
        )
