"""The variational autoencoder as a Pyro pair."""

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

__all__ = ["VAE"]


class VAE(Model):
    """A deep latent variable model with an amortised guide (Kingma and Welling 2014).

        model:  z_i ~ p(z),  x_i ~ p(x | z_i) = decoder(z_i)
        guide:  z_i ~ q(z | x_i) = encoder(x_i)

    with sites "z" and "x" in the plate "data". ``vae.model`` and ``vae.guide`` take the data ``x``,
    ``N x event``, and are an ordinary pair for Pyro.

    Both take a mask beside the data, True where an entry is observed (``N x event`` or
    broadcastable to it, or ``N`` for whole data). The model counts the observed entries alone, and
    the encoder sees ``fill`` at the others (Nazabal et al. 2020, Mattei and Frellsen 2019): a bound
    holds for any guide, so that this one learns from incomplete data what to make of them. Train
    with ``fit(vae.model, vae.guide, (x.nan_to_num(), mask))``, draw what is missing with
    ``marginal.impute``.

    Args:
        encoder: Module or function, x ``N x event`` -> a Distribution over z, batch shape ``N``.
        decoder: Module or function, z ``... x latent`` -> a Distribution over x with batch shape
            ``...``.
        prior: A Distribution over z, or a module that returns one when it is called (a learned
            prior). If None, a standard normal of the encoder's event shape.
        plate: Name of the data plate.
        fill: What the encoder sees in the place of a missing entry; the mean of standardised data
            is 0.

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
        # where the standard normal lives: with the parameters, from device to device
        like = next(self.parameters(), torch.zeros(()))
        self.register_buffer("_zero", like.new_zeros(()), persistent=False)

    @pyro_method
    def model(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The generative story, conditioned on the observed entries of x ``N x event``."""
        self._check(x)
        with Masks(x=mask), pyro.plate(self.plate, len(x)):
            z = pyro.sample("z", self._prior_given(x))
            return pyro.sample("x", self.decoder(z), obs=x)

    @pyro_method
    def guide(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The amortised posterior of z given the observed entries of x ``N x event``."""
        self._check(x)
        with pyro.plate(self.plate, len(x)):
            q = self.encode(x, mask)
            self._latent_shape = q.event_shape  # for the default prior
            return pyro.sample("z", q)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Any:
        """q(z | x), a Distribution with batch shape ``N``; see the class for the mask."""
        return self.encoder(x if mask is None else self._filled(x, mask))

    def decode(self, z: Tensor) -> Any:
        """p(x | z), a Distribution with the batch shape of z ``... x latent``."""
        return self.decoder(z)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """E[x' | z] at the mean z of q(z | x), ``N x event``; see the class for the mask."""
        return self.decode(self.encode(x, mask).mean).mean

    @torch.no_grad()
    def sample(self, num_samples: int, *, mean: bool = False) -> Tensor:
        """Draws of x, ``num_samples x event``, from z ~ p(z), x ~ p(x | z).

        Args:
            num_samples: How many.
            mean: Whether to return E[x | z] in place of a draw of x.
        """
        likelihood = self.decode(draws(self.prior_distribution(), num_samples))
        return likelihood.mean if mean else likelihood.sample()

    @torch.no_grad()
    def interpolate(self, start: Tensor, end: Tensor, num_steps: int = 8) -> Tensor:
        """E[x | z] on the straight line between the mean z of two data, both included.

        Args:
            start: ``N x event``.
            end: ``N x event``.
            num_steps: ``S``, at least 2.

        Returns:
            ``S x N x event``.
        """
        return self.decode(self._between(start, end, num_steps)).mean

    def prior_distribution(self) -> Any:
        """p(z), a Distribution without batch shape.

        Raises:
            ValueError: If the prior is the default one and the encoder has not been run yet.
        """
        return prior_of(self.prior, self._latent_shape, self._zero)

    def _between(self, start: Tensor, end: Tensor, num_steps: int) -> Tensor:
        """Steps from the mean z of some data to that of others, ``S x N x latent``."""
        if num_steps < 2:
            raise ValueError(f"Expected num_steps >= 2, both ends included; got {num_steps}.")
        a, b = self.encode(start).mean, self.encode(end).mean
        t = torch.linspace(0, 1, num_steps, dtype=a.dtype, device=a.device)
        return torch.lerp(a, b, t.reshape(-1, *[1] * a.dim()))

    def _prior_given(self, x: Tensor) -> Any:
        if self.prior is None and self._latent_shape is None:
            with torch.no_grad():
                self._latent_shape = self.encoder(x).event_shape
        return self.prior_distribution()

    def _filled(self, x: Tensor, mask: Tensor) -> Tensor:
        """What the encoder sees of incomplete data."""
        return torch.where(entry_mask("x", mask, x.shape[:1], x.shape[1:]), x, self.fill)

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() < 1 or len(x) == 0:
            check_data("x", x)  # says what is wrong with it
