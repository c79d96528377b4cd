"""A prior that is the average posterior of a few learned inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_lvm.checks import check_data, check_positive
from pyro_lvm.configured import Configured
from pyro_lvm.distributions import EqualMixture
from pyro_lvm.nn.shapes import as_sizes

__all__ = ["VampPrior"]


class VampPrior(Configured, nn.Module):
    """The variational mixture of posteriors (Tomczak and Welling 2018, eq. 9).

        p(z) = (1/K) sum_k q(z | u_k)

    with the encoder q(z | x) of a VAE, and pseudo-inputs u_k that are learned with all else. It is
    what the best prior, the aggregate posterior of all data, would be with K data::

        encoder = lvm.nn.MLP(784, [300], head=lvm.nn.NormalHead(40))
        prior = lvm.nn.VampPrior(encoder, 500, 784, bounds=(0.0, 1.0)).initialize(x_train)
        vae = lvm.VAE(encoder, decoder, prior=prior)

    The encoder is one module in two places, and is trained by both. A step costs one more pass of
    it, over the K pseudo-inputs.

    Args:
        encoder: A module, x ``N x in_shape`` -> a Distribution over z, batch shape ``N``.
        num_components: ``K``.
        in_shape: Shape of one input.
        bounds: Between which values pseudo-inputs are cut off, (0, 1) for images, as in the paper;
            None for no bounds. A value beyond them has no gradient.

    Raises:
        ValueError: If a size is not positive, or the bounds are not in order.
        TypeError: If a size is not an integer.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_components: int,
        in_shape: int | Sequence[int],
        *,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        check_positive("num_components", num_components, minimum=1)
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"Expected bounds (low, high), low < high; got {bounds}.")
        self.encoder, self.num_components, self.bounds = encoder, num_components, bounds
        self.in_shape = as_sizes("in_shape", in_shape)
        start = torch.randn(num_components, *self.in_shape)
        if bounds is not None:
            start.uniform_(*bounds)
        like = next(encoder.parameters(), start)
        self.raw_inputs = nn.Parameter(start.to(like))

    @property
    def pseudo_inputs(self) -> Tensor:
        """u, ``K x in_shape``."""
        return self.raw_inputs if self.bounds is None else self.raw_inputs.clamp(*self.bounds)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> "VampPrior":
        """Start the pseudo-inputs at K data, drawn by torch's global generator.

        Args:
            x: ``N x in_shape``, at least K.

        Returns:
            The prior itself.
        """
        check_data("x", x, floating=True)
        if x.shape[1:] != self.in_shape or len(x) < self.num_components:
            raise ValueError(
                f"Expected at least {self.num_components} data of shape {self.in_shape} to start "
                f"from; got {tuple(x.shape)}."
            )
        rows = torch.randperm(len(x))[: self.num_components]
        self.raw_inputs.copy_(x[rows.to(x.device)])
        return self

    def forward(self) -> EqualMixture:
        """Return p(z), a Distribution without batch shape."""
        return EqualMixture(self.encoder(self.pseudo_inputs))

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"{self.num_components}, in_shape={self.in_shape}, bounds={self.bounds}"
