"""The variational autoencoder whose prior is a mixture of Gaussians, its label enumerated."""

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam, pyro_method
from torch import Tensor, nn

from pyro_lvm.checks import check_count, check_positive
from pyro_lvm.distributions import IndexedNormal
from pyro_lvm.models.latents import head_shape
from pyro_lvm.models.mixture import GaussianMixture
from pyro_lvm.models.vae import VAE
from pyro_lvm.pair import Masks

__all__ = ["MixtureVAE"]


class MixtureVAE(VAE):
    """A VAE that finds clusters: its prior is a mixture of Gaussians (Jiang et al. 2017).

        model:  y_i ~ Categorical(weights),  z_i ~ N(loc[y_i], diag(scale[y_i])^2),
                x_i ~ p(x | z_i) = decoder(z_i)
        guide:  z_i ~ q(z | x_i) = encoder(x_i)

    with sites "y", "z" and "x" in the plate "data". The label is summed out exactly, by enumeration
    in the model, which costs no pass of a network: the prior of z is the mixture

        p(z) = sum_c weights_c N(z; loc_c, diag(scale_c)^2)

    whose ``weights`` ``C``, ``loc`` ``C x D`` and ``scale`` ``C x D`` are learned with the
    networks. All else is as in `VAE`, the mask too. Pyro's objective for it is ``TraceEnum_ELBO``.

    The ELBO alone may leave components without data. Two remedies: fit for some epochs, call
    ``initialize`` to start the mixture at the clusters of the encoded data, and go on; or start
    there, with an encoder that was trained before.

    A divergence between samples (`MMD` and others) needs draws of the prior, by which weights can't
    learn: fix them, ``learn_weights=False``, or use `Stein`.

    Args:
        encoder: As for `VAE`; z is a vector.
        decoder: As for `VAE`.
        num_components: ``C``.
        num_latents: ``D``; what the encoder's head says if None.
        learn_weights: Whether weights are learned, or stay as they are (equal, or those of
            ``initialize``).
        plate: Name of the data plate.
        fill: What the encoder sees in the place of a missing entry.

    Raises:
        ValueError: If a size is not positive or not known, or z is no vector.

    Reference:
        Jiang et al. 2017, "Variational deep embedding", arXiv 1611.05148.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        num_components: int,
        *,
        num_latents: int | None = None,
        learn_weights: bool = True,
        plate: str = "data",
        fill: float = 0.0,
    ) -> None:
        super().__init__(encoder, decoder, plate=plate, fill=fill)
        check_positive("num_components", num_components, minimum=1)
        shape = _vector(head_shape(encoder) if num_latents is None else (num_latents,))
        self.num_components, self.learn_weights = num_components, learn_weights
        like = self._zero.new_ones(())
        self._declare(
            like.expand(num_components) / num_components,
            torch.randn(num_components, *shape).to(like),  # equal means would stay equal
            like.expand(num_components, *shape).clone(),
        )

    @pyro_method
    def model(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The generative story, conditioned on the observed entries of x ``N x event``."""
        self._check(x)
        with Masks(x=mask), pyro.plate(self.plate, len(x)):
            labels = dist.Categorical(self.weights)
            y = pyro.sample("y", labels, infer={"enumerate": "parallel"})
            z = pyro.sample("z", IndexedNormal(y, self.loc, self.scale))
            return pyro.sample("x", self.decoder(z), obs=x)

    @torch.no_grad()
    def initialize(self, x: Tensor, mask: Tensor | None = None) -> "MixtureVAE":
        """Start the mixture at the k-means clusters of the means of q(z | x).

        Args:
            x: ``N x event``; some thousand are plenty.
            mask: Which entries are observed.

        Returns:
            The model itself.
        """
        means = self.encode(x, mask).mean
        spread = self.encode(x, mask).variance.mean(0)
        start = GaussianMixture(self.num_components, means.shape[-1], "diagonal").initialize(means)
        values = start.values()
        # the clusters are those of means: draws of q(z | x) are as wide as q on top of it
        scale = (values["scale"].to(means).square() + spread).sqrt()
        weights = values["weights"].to(means) if self.learn_weights else self.weights
        self._declare(weights, values["loc"].to(means), scale)
        return self

    def prior_distribution(self) -> Any:
        """p(z), the mixture, a Distribution without batch shape."""
        components = dist.Normal(self.loc, self.scale).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(self.weights), components)

    def label_probs(self, z: Tensor) -> Tensor:
        """p(y | z), ``... x C``, of latents ``... x D``."""
        first = torch.zeros((), dtype=torch.long, device=z.device)
        table = IndexedNormal(first, self.loc, self.scale).log_prob_table(z)
        return torch.softmax(table + self.weights.log(), -1)

    @torch.no_grad()
    def responsibilities(
        self, x: Tensor, mask: Tensor | None = None, *, num_samples: int = 100
    ) -> Tensor:
        """E_q(z|x)[p(y | z)], ``N x C``: how much of each datum belongs to each component.

        Args:
            x: ``N x event``.
            mask: Which entries are observed.
            num_samples: Draws of z for each datum.
        """
        check_count("num_samples", num_samples)
        return self.label_probs(self.encode(x, mask).sample((num_samples,))).mean(0)

    @torch.no_grad()
    def sample(
        self, num_samples: int, y: Tensor | Sequence[int] | int | None = None, *, mean: bool = False
    ) -> Tensor:
        """Draws of x, ``num_samples x event``, from z ~ p(z | y), x ~ p(x | z).

        Args:
            num_samples: How many.
            y: The component of all, or of each, ``num_samples``; drawn from the weights if None.
            mean: Whether to return E[x | z] in place of a draw of x.
        """
        if y is None:
            y = dist.Categorical(self.weights).sample((num_samples,))
        label = torch.as_tensor(y, device=self.loc.device).expand(num_samples)
        likelihood = self.decode(IndexedNormal(label, self.loc, self.scale).sample())
        return likelihood.mean if mean else likelihood.sample()

    def _declare(self, weights: Tensor, loc: Tensor, scale: Tensor) -> None:
        if self.learn_weights:
            self.weights = PyroParam(weights, constraints.simplex)
        else:
            self.register_buffer("weights", weights)
        self.loc = PyroParam(loc)
        self.scale = PyroParam(scale, constraints.softplus_positive)


def _vector(shape: Sequence[int] | None) -> tuple[int]:
    if shape is None:
        raise ValueError(
            "Expected the size of z to be known; got an encoder without head.event_shape. Pass "
            "num_latents=."
        )
    if len(shape) != 1:
        raise ValueError(f"Expected an encoder of vectors z; got events of shape {tuple(shape)}.")
    check_positive("num_latents", shape[0], minimum=1)
    return (int(shape[0]),)
