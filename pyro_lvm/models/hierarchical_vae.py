"""The variational autoencoder with several layers of latents as a Pyro pair."""

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_lvm.checks import check_data
from pyro_lvm.models.base import Model
from pyro_lvm.models.latents import check_prior, draws, head_shape, prior_of
from pyro_lvm.pair import Masks

__all__ = ["HierarchicalVAE"]


class HierarchicalVAE(Model):
    """A VAE with L layers of latents, one above the other (Rezende et al. 2014, Burda et al. 2016).

        model:  z_L ~ p(z_L),  z_l ~ p(z_l | z_l+1) = decoders[l](z_l+1),  x ~ decoders[0](z_1)
        guide:  z_1 ~ q(z_1 | x) = encoders[0](x),  z_l+1 ~ q(z_l+1 | z_l) = encoders[l](z_l)

    with sites "z1" to "zL" and "x" in the plate "data": the model draws from the top down, the
    guide from the data up. Both lists are in the order from the data up, so that ``encoders[l]``
    and ``decoders[l]`` are between the same two layers::

        encoders = [MLP(784, [200], head=NormalHead(50)), MLP(50, [100], head=NormalHead(10))]
        decoders = [MLP(50, [200], head=BernoulliHead(784)), MLP(10, [100], head=NormalHead(50))]

    Model and guide take the data ``x``, ``N x event``, and a mask of the entries that count.

    Args:
        encoders: L modules or functions, at least 2, each from a layer to a Distribution over the
            one above.
        decoders: L modules or functions, each from a layer to a Distribution over the one below.
        prior: p(z_L), a Distribution, or a module that returns one when it is called. If None, a
            standard normal of the last encoder's event shape.
        plate: Name of the data plate.

    Raises:
        ValueError: If there are fewer than two layers, or not as many encoders as decoders, or if
            the prior has a batch shape.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        decoders: Sequence[nn.Module],
        *,
        prior: dist.Distribution | nn.Module | None = None,
        plate: str = "data",
    ) -> None:
        super().__init__()
        if len(encoders) != len(decoders) or len(encoders) < 2:
            raise ValueError(
                f"Expected as many encoders as decoders, one of each for every layer of latents, "
                f"and at least two layers; got {len(encoders)} and {len(decoders)}. One layer is "
                f"lvm.VAE."
            )
        check_prior(prior)
        self.upwards, self.downwards = nn.ModuleList(encoders), nn.ModuleList(decoders)
        self.prior, self.plate = prior, plate
        self._latent_shape = head_shape(self.upwards[-1])
        like = next(self.parameters(), torch.zeros(()))
        self.register_buffer("_zero", like.new_zeros(()), persistent=False)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.upwards)

    @pyro_method
    def model(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The generative story, conditioned on x ``N x event``."""
        self._check(x)
        with Masks(x=mask), pyro.plate(self.plate, len(x)):
            z = pyro.sample(f"z{self.num_layers}", self._prior_given(x))
            for layer in range(self.num_layers - 1, 0, -1):
                z = pyro.sample(f"z{layer}", self.downwards[layer](z))
            return pyro.sample("x", self.downwards[0](z), obs=x)

    @pyro_method
    def guide(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The amortised posterior, from x ``N x event`` up; it sees all of x."""
        self._check(x)
        with pyro.plate(self.plate, len(x)):
            z = x
            for layer, encoder in enumerate(self.upwards, start=1):
                q = encoder(z)
                z = pyro.sample(f"z{layer}", q)
            self._latent_shape = q.event_shape  # for the default prior
            return z

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x' | z_1] at the mean z_1 of q(z_1 | x), ``N x event``."""
        return self.downwards[0](self.upwards[0](x).mean).mean

    @torch.no_grad()
    def sample(self, num_samples: int, *, mean: bool = False) -> Tensor:
        """Draws of x, ``num_samples x event``, from the top down.

        Args:
            num_samples: How many.
            mean: Whether to return E[x | z_1] in place of a draw of x.
        """
        z = draws(self.prior_distribution(), num_samples)
        for layer in range(self.num_layers - 1, 0, -1):
            z = self.downwards[layer](z).sample()
        likelihood = self.downwards[0](z)
        return likelihood.mean if mean else likelihood.sample()

    def prior_distribution(self) -> Any:
        """p(z_L), a Distribution without batch shape.

        Raises:
            ValueError: If the prior is the default one and the encoders have not been run yet.
        """
        return prior_of(self.prior, self._latent_shape, self._zero)

    def _prior_given(self, x: Tensor) -> Any:
        if self.prior is None and self._latent_shape is None:
            with torch.no_grad():
                z = x
                for encoder in self.upwards:
                    q = encoder(z)
                    z = q.mean
            self._latent_shape = q.event_shape
        return self.prior_distribution()

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() < 1 or len(x) == 0:
            check_data("x", x)  # says what is wrong with it
