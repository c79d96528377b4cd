"""The variational autoencoder whose decoder draws pixel by pixel, as a Pyro pair."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_lvm.checks import check_count
from pyro_lvm.models.latents import head_shape
from pyro_lvm.models.vae import VAE

__all__ = ["PixelCNNVAE"]


class PixelCNNVAE(VAE):
    """A VAE with an autoregressive decoder, such as `nn.PixelCNN` (Gulrajani et al. 2017).

        model:  z_i ~ p(z),  x_i ~ p(x | z_i) = prod_d p(x_id | x_i1, ..., x_i(d-1), z_i)
        guide:  z_i ~ q(z | x_i) = encoder(x_i)

    It is a `VAE` in all but what it shows of p(x | z): draws, since the mean has no closed form.

        encoder = lvm.nn.MLP(784, [200], head=lvm.nn.NormalHead(10))
        decoder = lvm.nn.PixelCNN((28, 28), context_features=10)
        vae = lvm.PixelCNNVAE(encoder, decoder)

    Such a decoder can model the data by itself, and the ELBO is then greatest where z is left
    unused (Chen et al. 2017): there log p(x) is that of the decoder, and q(z | x) that of the
    prior. An objective that asks for information in z, ``TraceInfo_ELBO(alpha=1.0, lambda_=...,
    divergence=MMD())``, has it used (Zhao et al. 2017, section 4); ``diagnostics.collapse_report``
    tells.

    Entries that are missing can't be left out of p(x | z): masks are of whole data.

    Args:
        encoder: Module or function, x ``N x event`` -> a Distribution over z, batch shape ``N``.
        decoder: Module or function, z ``... x latent`` -> a Distribution over x with batch shape
            ``...``.
        prior: As for `VAE`.
        plate: Name of the data plate.
        fill: As for `VAE`.

    Raises:
        ValueError: If the prior has a batch shape, or the decoder's context is not of the size of
            the encoder's z.
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
        super().__init__(encoder, decoder, prior, plate=plate, fill=fill)
        _check_sizes(head_shape(encoder), decoder)

    @torch.no_grad()
    def reconstruct(
        self, x: Tensor, mask: Tensor | None = None, *, num_draws: int | None = None
    ) -> Tensor:
        """Draws x' ~ p(x' | z) at the mean z of q(z | x), ``N x event``.

        Args:
            x: ``N x event``.
            mask: What of it the encoder sees, see `VAE`.
            num_draws: Average so many, an estimate of E[x' | z]; None for a single draw.
        """
        return self._shown(self.encode(x, mask).mean, num_draws)

    @torch.no_grad()
    def interpolate(
        self, start: Tensor, end: Tensor, num_steps: int = 8, *, num_draws: int | None = None
    ) -> Tensor:
        """Draws of x given z on the straight line between the mean z of two data, both included.

        Args:
            start: ``N x event``.
            end: ``N x event``.
            num_steps: ``S``, at least 2.
            num_draws: Average so many, as in `reconstruct`; None for a single draw.

        Returns:
            ``S x N x event``.
        """
        return self._shown(self._between(start, end, num_steps), num_draws)

    def _shown(self, z: Tensor, num_draws: int | None) -> Tensor:
        """What is shown of p(x | z)."""
        likelihood: Any = self.decode(z)
        if num_draws is None:
            return likelihood.sample()
        check_count("num_draws", num_draws)
        return likelihood.sample((num_draws,)).to(z.dtype).mean(0)


def _check_sizes(latent: torch.Size | None, decoder: nn.Module) -> None:
    """Refuse a decoder for vectors of another size than the encoder's, where both say theirs."""
    if latent is None or not hasattr(decoder, "context_features"):
        return
    if latent != (decoder.context_features,):
        raise ValueError(
            f"Expected a decoder for z of shape {tuple(latent)}, as the encoder has it; got one of "
            f"context_features={decoder.context_features}. Build it with context_features="
            f"{latent.numel()}, and the encoder's head for a single size."
        )
