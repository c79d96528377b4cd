"""Generators of data from noise as Pyro stories, unconditional and given a condition."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from torch import Tensor, nn

from pyro_lvm.checks import check_count, check_data
from pyro_lvm.models.base import Model
from pyro_lvm.models.latents import check_prior, draws, prior_of
from pyro_lvm.nn.shapes import as_sizes

__all__ = ["GAN", "ConditionalGAN"]


class _Generator(Model):
    """What both stories share: noise, a network, and no guide."""

    guide: ClassVar[None] = None
    """A story without a guide: it is compared with the data by draws of its own."""

    def __init__(
        self,
        generator: nn.Module,
        latent_shape: int | Sequence[int],
        *,
        prior: dist.Distribution | nn.Module | None = None,
        plate: str = "data",
    ) -> None:
        super().__init__()
        check_prior(prior)
        self.generator, self.prior, self.plate = generator, prior, plate
        self.latent_shape = as_sizes("latent_shape", latent_shape)
        # where the standard normal lives: with the parameters, from device to device
        like = next(self.parameters(), torch.zeros(()))
        self.register_buffer("_zero", like.new_zeros(()), persistent=False)

    def prior_distribution(self) -> Any:
        """p(z), a Distribution without batch shape."""
        return prior_of(self.prior, self.latent_shape, self._zero)

    def _given(self, z: Tensor, *conditions: Tensor) -> Any:
        """p(x | z), a point mass where the generator returns a tensor."""
        x = self.generator(z, *conditions)
        batch_dim = z.dim() - len(self.latent_shape)
        if not isinstance(x, Tensor):
            return x
        if x.shape[:batch_dim] != z.shape[:batch_dim]:
            raise ValueError(
                f"Expected the generator to return one x for each z, of batch shape "
                f"{tuple(z.shape[:batch_dim])}; got a tensor of shape {tuple(x.shape)}."
            )
        return dist.Delta(x, event_dim=x.dim() - batch_dim)

    def _observe(self, x: Tensor, *conditions: Tensor) -> Tensor:
        """Sample z and x in the plate."""
        z = pyro.sample("z", self.prior_distribution())
        given = self._given(z, *conditions)
        if given.event_shape != x.shape[1:]:
            raise ValueError(
                f"Expected data of the shape that the generator makes, {tuple(given.event_shape)} "
                f"each; got {tuple(x.shape[1:])}. Reshape x, or end the generator in its shape."
            )
        return pyro.sample("x", given, obs=x)


class GAN(_Generator):
    """A generator: data that are a function of noise (Goodfellow et al. 2014).

        z_i ~ p(z),  x_i = G(z_i)

    with sites "z" and "x" in the plate "data". x has no density, so that the story is trained by a
    comparison of its draws with the data. By a discriminator D it is a generative adversarial
    network; by a kernel, a generative moment matching network (GMMN: Li, Swersky and Zemel 2015),
    which is the same story without a second player:

        fit(gan.model, None, x, elbo=ImplicitDivergence(Adversarial(D, learning_rate=2e-4)))
        fit(gan.model, None, x, elbo=ImplicitDivergence(MMD()))

    One optimiser serves both players of the former; little momentum keeps them from circling each
    other: ``optimizer=lambda p: Adam(p, lr=2e-4, betas=(0.5, 0.999))``. log p(x) is that of the
    story with an observation noise, which has to be stated: ``marginal.with_gaussian_noise``; or
    that of a kernel density around its draws, ``marginal.kernel_density``.

    Args:
        generator: Module from z ``... x latent_shape`` to x ``... x event``; or to a Distribution
            over x with batch shape ``...`` and reparameterised draws, which are x then
            (`nn.DeltaHead` is one without noise).
        latent_shape: Shape of z, or its size.
        prior: A Distribution over z, or a module that returns one when it is called. A standard
            normal if None.
        plate: Name of the data plate.

    Raises:
        ValueError: If the prior is a Distribution with a batch shape, or a size is not positive.
        TypeError: If a size is not an integer.
    """

    @pyro_method
    def model(self, x: Tensor) -> Tensor:
        """The generative story, with x ``N x event`` observed."""
        _check("x", x)
        with pyro.plate(self.plate, len(x)):
            return self._observe(x)

    def generate(self, z: Tensor) -> Any:
        """p(x | z), a Distribution with the batch shape of z ``... x latent_shape``."""
        return self._given(z)

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Draws of x, ``num_samples x event``."""
        check_count("num_samples", num_samples)
        return self._given(draws(self.prior_distribution(), num_samples)).sample()


class ConditionalGAN(_Generator):
    """A generator given a condition y, such as a label (Mirza and Osindero 2014).

        z_i ~ p(z),  x_i = G(z_i, y_i)

    with sites "z" and "x" in the plate "data", and y at the site "y", where it is observed and has
    no probability. The divergence sees y beside the draws and the data. It ties x to y by a
    discriminator that is given y, or by one that has to name the label (AC-GAN, Odena et al. 2017):

        elbo = ImplicitDivergence(Adversarial(D), conditions=["y"])    # D(x, y): logits
        elbo = ImplicitDivergence(AuxiliaryClassifier(D, 10), conditions=["y"])    # D(x): 1 + 10
        fit(gan.model, None, (x, y), elbo=elbo)

    `nn.Joined` makes networks of several inputs, with labels as indicator vectors. For the rest
    see `GAN`.

    Args:
        generator: Module from z ``... x latent_shape`` and y to x ``... x event``, or to a
            Distribution over x with batch shape ``...`` and reparameterised draws.
        latent_shape: Shape of z, or its size.
        prior: A Distribution over z, the same for all y, or a module that returns one when it is
            called. A standard normal if None.
        plate: Name of the data plate.

    Raises:
        ValueError: If the prior is a Distribution with a batch shape, or a size is not positive.
        TypeError: If a size is not an integer.
    """

    @pyro_method
    def model(self, x: Tensor, y: Tensor) -> Tensor:
        """The generative story given y, with x ``N x event`` observed.

        Args:
            x: ``N x event``.
            y: Conditions: labels, integers ``N``, or vectors ``N x size``.
        """
        _check("x", x)
        _check("y", y)
        if len(x) != len(y):
            raise ValueError(
                f"Expected a condition for each datum, {len(x)}; got {len(y)}. The first dimension "
                f"of x and y is the data."
            )
        with pyro.plate(self.plate, len(x)):
            return self._observe(x, pyro.deterministic("y", y, event_dim=y.dim() - 1))

    def generate(self, z: Tensor, y: Tensor) -> Any:
        """p(x | z, y), a Distribution with the batch shape of z ``... x latent_shape``."""
        return self._given(z, y)

    @torch.no_grad()
    def sample(self, y: Tensor) -> Tensor:
        """One draw of x for each condition, ``N x event``."""
        _check("y", y)
        return self._given(draws(self.prior_distribution(), len(y)), y).sample()


def _check(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.dim() < 1 or len(value) == 0:
        check_data(name, value)  # says what is wrong with it
