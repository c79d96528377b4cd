"""A mixture whose components all have the same weight."""

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_lvm.distributions.indexed_normal import IndexedNormal

__all__ = ["EqualMixture"]


class EqualMixture(TorchDistribution):
    """One of ``K`` distributions, all alike: p(z) = (1 / K) sum_k p_k(z).

    No weight is learned, so that the choice of a component has no gradient that could be missing:
    where the components have reparameterised draws, the mixture has them too. With a mixture of
    learned weights (``MixtureSameFamily``) it is not so.

    Components that are vectors of independent normals are evaluated in chunks, so that memory does
    not grow with their number.

    Args:
        components: A Distribution with batch shape ``... x K``.
        validate_args: As in torch.

    Raises:
        ValueError: If the components have no batch shape.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch's interface

    def __init__(self, components: Any, *, validate_args: bool | None = None) -> None:
        if not components.batch_shape:
            raise ValueError(
                "Expected components with a batch shape ... x K; got a single distribution."
            )
        self.components = components
        super().__init__(
            components.batch_shape[:-1], components.event_shape, validate_args=validate_args
        )

    @property
    def num_components(self) -> int:
        """``K``."""
        return self.components.batch_shape[-1]

    @property
    def has_rsample(self) -> bool:
        """Whether the components' draws are reparameterised."""
        return self.components.has_rsample

    @property
    def support(self) -> Any:
        """That of the components."""
        return self.components.support

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "EqualMixture":
        """The same distribution over more batch dimensions; the components are shared."""
        new = self._get_checked_instance(EqualMixture, _instance)
        new.components = self.components
        batch_shape = torch.Size(batch_shape)
        super(EqualMixture, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(z), nats, of values ``... x event``."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = torch.logsumexp(self.log_prob_table(value), -1) - math.log(self.num_components)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def log_prob_table(self, value: Tensor) -> Tensor:
        """Log p_k(z), ``... x K``, of values ``... x event``."""
        normal = _vector_of_normals(self.components)
        if normal is None:
            return self.components.log_prob(value.unsqueeze(-1 - self.event_dim))
        first = torch.zeros((), dtype=torch.long, device=value.device)
        return IndexedNormal(first, normal.loc, normal.scale).log_prob_table(value)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws, ``sample_shape x batch x event``."""
        return self._draw(sample_shape, "rsample")

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, ``sample_shape x batch x event``."""
        return self._draw(sample_shape, "sample")

    def _draw(self, sample_shape: torch.Size, method: str) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        components, normal = self.components, _vector_of_normals(self.components)
        if normal is not None:  # a draw of the chosen one alone
            index = torch.randint(self.num_components, shape, device=normal.loc.device)
            return IndexedNormal(index, normal.loc, normal.scale).rsample()
        draws = getattr(components.expand((*shape, self.num_components)), method)()
        index = torch.randint(self.num_components, shape, device=draws.device)
        index = index.reshape(*shape, *[1] * (1 + self.event_dim))
        index = index.expand(*shape, 1, *self.event_shape)
        return draws.gather(len(shape), index).squeeze(len(shape))

    @property
    def mean(self) -> Tensor:
        """E[z], ``batch x event``."""
        return self._averaged(self.components.mean)

    @property
    def variance(self) -> Tensor:
        """Var[z], ``batch x event``."""
        second = self.components.variance + self.components.mean.square()
        return self._averaged(second) - self.mean.square()

    def _averaged(self, table: Tensor) -> Tensor:
        return table.mean(-1 - self.event_dim).expand(self.batch_shape + self.event_shape)


def _vector_of_normals(distribution: Any) -> Any:
    """The normals of a distribution over vectors with independent entries; None of another."""
    if not isinstance(distribution, torch.distributions.Independent):
        return None
    base = distribution.base_dist
    is_vector = len(distribution.event_shape) == 1
    return base if is_vector and isinstance(base, torch.distributions.Normal) else None
