"""What models without latents share: a story of one line, whose log p(x) is exact."""

from typing import Any

import pyro
import torch
from pyro.nn import pyro_method
from torch import Tensor

from pyro_lvm.checks import check_data
from pyro_lvm.distributions import Incomplete
from pyro_lvm.models.base import Model
from pyro_lvm.models.latents import draws
from pyro_lvm.pair import Masks
from pyro_lvm.pair.masks import entry_mask

__all__ = ["DensityModel"]

_AT_ONCE = 1000  # data whose log-density is computed at a time


class DensityModel(Model):
    """A story without latents.

        model:  x_i ~ p(x)

    with the site "x" in the plate "data", and an empty guide. A subclass has ``forward``, which
    returns p(x); called, such a model is a module that returns a Distribution, as a learned prior
    of a `VAE` has to be.

    Args:
        plate: Name of the data plate.
    """

    def __init__(self, *, plate: str = "data") -> None:
        super().__init__()
        self.plate = plate

    def forward(self) -> Any:
        """p(x), a Distribution without batch shape."""
        raise NotImplementedError

    @pyro_method
    def model(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The story, conditioned on the observed entries of x ``N x event``."""
        p = self()
        self._check(x, p)
        with Masks(x=mask), pyro.plate(self.plate, len(x)):
            return pyro.sample("x", p, obs=x)

    @pyro_method
    def guide(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Nothing: there are no latents."""

    def log_prob(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log p(x_i), ``N``, nats, of some data at a time.

        Args:
            x: ``N x event``.
            mask: As for ``model``: then it is the log-density of the observed entries.
        """
        p = self()
        self._check(x, p)
        if mask is None:
            return torch.cat([p.log_prob(some) for some in x.split(_AT_ONCE)])
        seen = self._seen(x, mask).expand_as(x)
        chunks = zip(x.split(_AT_ONCE), seen.split(_AT_ONCE), strict=True)
        return torch.cat([Incomplete(p, mask).log_prob(some) for some, mask in chunks])

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Draws of x, ``num_samples x event``."""
        return draws(self(), num_samples)

    def _seen(self, x: Tensor, mask: Tensor) -> Tensor:
        """The mask with the dimensions of x."""
        return entry_mask("x", mask, x.shape[:1], x.shape[1:])

    def _check(self, x: Tensor, p: Any) -> None:
        if not isinstance(x, Tensor) or x.dim() < 1 or len(x) == 0:
            check_data("x", x)  # says what is wrong with it
        if x.shape[1:] != p.event_shape:
            raise ValueError(
                f"Expected x with data of shape {tuple(p.event_shape)}, as p(x) has them; got "
                f"{tuple(x.shape)}, {tuple(x.shape[1:])} each. Try x.reshape, or .to_event on p(x)."
            )
