"""The conditional variational autoencoder as a Pyro pair."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_lvm.checks import check_data, check_finite
from pyro_lvm.models.base import Model
from pyro_lvm.models.latents import check_prior, draws, head_shape, prior_of
from pyro_lvm.pair import Masks
from pyro_lvm.pair.masks import entry_mask

__all__ = ["ConditionalVAE"]


class ConditionalVAE(Model):
    """A VAE of x given y (Sohn, Lee and Yan 2015).

        model:  z_i ~ p(z | y_i),  x_i ~ p(x | z_i, y_i) = decoder(z_i, y_i)
        guide:  z_i ~ q(z | x_i, y_i) = encoder(x_i, y_i)

    with sites "z" and "x" in the plate "data". Model and guide take the data ``x``, ``N x event``,
    and the conditions ``y``: labels, integers ``N``; vectors, ``N x size``; or a part of an image,
    of which x is the rest. What they are is up to the networks; `nn.Joined` makes networks of
    several inputs. y is given and has no probability: log p(x | y) is what is learnt and scored.

    Both take a mask of the entries of x that are observed, see `VAE`.

    Args:
        encoder: Module or function, (x, y) -> a Distribution over z, batch shape ``N``.
        decoder: Module or function, (z ``... x latent``, y) -> a Distribution over x with batch
            shape ``...``.
        prior: A module or function y -> a Distribution over z, batch shape ``N`` (a learned prior
            p(z | y)); or a Distribution, the same for all y. If None, a standard normal of the
            encoder's event shape.
        plate: Name of the data plate.
        fill: What the encoder sees in the place of a missing entry.

    Raises:
        ValueError: If the prior is a Distribution with a batch shape.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: dist.Distribution | nn.Module | None = None,
        *,
        plate: str = "data",
        fill: float = 0.0,
    ) -> None:
        super().__init__()
        check_finite("fill", fill)
        check_prior(prior)
        self.encoder, self.decoder, self.prior, self.plate = encoder, decoder, prior, plate
        self.fill = fill
        self._latent_shape = head_shape(encoder)
        like = next(self.parameters(), torch.zeros(()))
        self.register_buffer("_zero", like.new_zeros(()), persistent=False)

    @pyro_method
    def model(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The generative story given y, conditioned on the observed entries of x ``N x event``."""
        self._check(x, y)
        with Masks(x=mask), pyro.plate(self.plate, len(x)):
            z = pyro.sample("z", self._prior_given(x, y))
            return pyro.sample("x", self.decoder(z, y), obs=x)

    @pyro_method
    def guide(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The amortised posterior of z given the observed entries of x ``N x event``, and y."""
        self._check(x, y)
        with pyro.plate(self.plate, len(x)):
            q = self.encode(x, y, mask)
            self._latent_shape = q.event_shape  # for the default prior
            return pyro.sample("z", q)

    def encode(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Any:
        """q(z | x, y), a Distribution with batch shape ``N``."""
        if mask is not None:
            x = torch.where(entry_mask("x", mask, x.shape[:1], x.shape[1:]), x, self.fill)
        return self.encoder(x, y)

    def decode(self, z: Tensor, y: Tensor) -> Any:
        """p(x | z, y), a Distribution with the batch shape of z ``... x latent``."""
        return self.decoder(z, y)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """E[x' | z, y] at the mean z of q(z | x, y), ``N x event``."""
        return self.decode(self.encode(x, y, mask).mean, y).mean

    @torch.no_grad()
    def sample(self, y: Tensor, *, mean: bool = False) -> Tensor:
        """One draw of x for each condition, ``N x event``, from z ~ p(z | y), x ~ p(x | z, y).

        Args:
            y: Conditions, first dimension ``N``.
            mean: Whether to return E[x | z, y] in place of a draw of x.
        """
        prior = self.prior_distribution(y)
        z = draws(prior) if prior.batch_shape else draws(prior, len(y))
        likelihood = self.decode(z, y)
        return likelihood.mean if mean else likelihood.sample()

    def prior_distribution(self, y: Tensor) -> Any:
        """p(z | y), a Distribution with batch shape ``N``, or without one if y plays no part.

        Raises:
            ValueError: If the prior is the default one and the encoder has not been run yet.
        """
        return prior_of(self.prior, self._latent_shape, self._zero, y)

    def _prior_given(self, x: Tensor, y: Tensor) -> Any:
        if self.prior is None and self._latent_shape is None:
            with torch.no_grad():
                self._latent_shape = self.encoder(x, y).event_shape
        return self.prior_distribution(y)

    def _check(self, x: Tensor, y: Tensor) -> None:
        for name, value in (("x", x), ("y", y)):
            if not isinstance(value, Tensor) or value.dim() < 1 or len(value) == 0:
                check_data(name, value)  # says what is wrong with it
        if len(x) != len(y):
            raise ValueError(
                f"Expected a condition for each datum, {len(x)}; got {len(y)}. The first dimension "
                f"of x and y is the data."
            )
