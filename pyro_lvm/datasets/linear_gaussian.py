"""A problem whose log p(x) and p(z | x) are known exactly, to check estimates against."""

from dataclasses import dataclass, fields, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lvm.checks import check_data, check_positive
from pyro_lvm.datasets.checks import check_features

__all__ = ["LinearGaussian", "linear_gaussian"]


@dataclass(frozen=True, eq=False)
class LinearGaussian:
    """A linear Gaussian latent variable model, everything about which is known.

        z ~ N(0, I_L),    x = W z + b + scale * eps,    eps ~ N(0, I_D)

    Factor analysis; probabilistic PCA where all scales are equal (Tipping and Bishop 1999). Its
    ``model`` and ``guide`` are a Pyro pair with the exact posterior as the guide, so that every
    importance weight p(x, z) / q(z | x) is p(x) itself.

    Attributes:
        W: Loadings, ``D x L``.
        loc: The offset b, ``D``.
        scale: Standard deviations of the noise, ``D``.

    Raises:
        TypeError: If a field is no tensor of a floating point type.
        ValueError: If the shapes do not fit together or a scale is not positive.

    Reference:
        Tipping and Bishop (1999), Probabilistic principal component analysis, equations 2 to 9.
    """

    W: Tensor
    loc: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        check_data("W", self.W, ndim=2, floating=True)
        for name in ("loc", "scale"):
            value = check_data(name, getattr(self, name), ndim=1, floating=True)
            if len(value) != len(self.W):
                raise ValueError(
                    f"Expected {name} with an entry for each of the {len(self.W)} rows of W; got "
                    f"{len(value)}."
                )
        check_positive("scale.min()", self.scale.min().item())

    def to(self, *args: Any, **kwargs: Any) -> "LinearGaussian":
        """The same problem on another device or in another precision, as ``Tensor.to``."""
        moved = {f.name: getattr(self, f.name).to(*args, **kwargs) for f in fields(self)}
        return replace(self, **moved)

    def sample(self, num_data: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw data.

        Args:
            num_data: How many, N.
            generator: Source of randomness, on the device of ``W``; the global one if None.

        Returns:
            ``N x D``.

        Raises:
            ValueError: If ``num_data`` is below one.
        """
        check_positive("num_data", num_data, minimum=1)
        num_features, num_latents = self.W.shape
        z, noise = (
            torch.randn(
                num_data, size, generator=generator, dtype=self.W.dtype, device=self.W.device
            )
            for size in (num_latents, num_features)
        )
        return z @ self.W.T + self.loc + self.scale * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact marginal log-likelihood, log N(x; b, W W' + diag(scale^2)).

        Args:
            x: Data, ``N x D``.

        Returns:
            log p(x) of each datum, ``N``, in nats.

        Raises:
            TypeError: If ``x`` is no tensor of a floating point type.
            ValueError: If ``x`` is not ``N x D`` or not finite.
        """
        check_features(x, len(self.W))
        return dist.LowRankMultivariateNormal(self.loc, self.W, self.scale**2).log_prob(x)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Exact posterior, p(z | x) = N(z; m, C) with C = (I + W' S W)^-1 and m = C W' S (x - b).

        S = diag(scale^-2) is the precision of the noise.

        Args:
            x: Data, ``N x D``.

        Returns:
            The means m, ``N x L``, and the Cholesky factor of C, ``L x L``, common to all data.

        Raises:
            TypeError: If ``x`` is no tensor of a floating point type.
            ValueError: If ``x`` is not ``N x D`` or not finite.
        """
        check_features(x, len(self.W))
        return self._posterior(x)

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # No look at the values: the guide has to run under a tracer as well.
        weighted = self.W / self.scale.unsqueeze(-1) ** 2  # S W, D x L
        precision = self.W.new_ones(self.W.shape[1]).diag() + self.W.T @ weighted
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        return (x - self.loc) @ weighted @ covariance, torch.linalg.cholesky(covariance)

    def model(self, x: Tensor) -> None:
        """The story as a Pyro program: plate ``data``, local latent ``z``, observed ``x``.

        Args:
            x: Data, ``N x D``.
        """
        prior = dist.Normal(self.W.new_zeros(self.W.shape[1]), 1.0).to_event(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ self.W.T + self.loc, self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """The exact posterior as a Pyro program, site ``z`` in the plate ``data``.

        Args:
            x: Data, ``N x D``.
        """
        loc, scale_tril = self._posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))


def linear_gaussian(
    num_features: int,
    num_latents: int,
    *,
    scale: float = 0.5,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LinearGaussian:
    """A random :class:`LinearGaussian`: loadings and offset standard normal, one noise scale.

    Args:
        num_features: D.
        num_latents: L.
        scale: Standard deviation of the noise in every feature.
        seed: Seed of the draw; the global random state is neither read nor changed.
        dtype: Floating point type.

    Returns:
        The problem, on the CPU.

    Raises:
        ValueError: If a size is below one or the scale is not positive.
    """
    check_positive("num_features", num_features, minimum=1)
    check_positive("num_latents", num_latents, minimum=1)
    generator = torch.Generator().manual_seed(seed)
    # In double precision always, so that one seed is one problem.
    loadings = torch.randn(num_features, num_latents, dtype=torch.float64, generator=generator)
    loc = torch.randn(num_features, dtype=torch.float64, generator=generator)
    return LinearGaussian(loadings, loc, torch.full_like(loc, scale)).to(dtype)
