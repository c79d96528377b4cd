"""The uniform distribution over values in a list."""

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

__all__ = ["UniformOver"]


class UniformOver(TorchDistribution):
    """One of ``S`` values, all of them alike: p(z) = 1 / S.

    The log-probability of whatever else is not looked for: it is that of a value in the list.

    Args:
        values: ``S x event``, all different.
        batch_shape: The shape of the batch.
        validate_args: As in torch.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch's interface

    def __init__(
        self,
        values: Tensor,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.values = values
        super().__init__(torch.Size(batch_shape), values.shape[1:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "UniformOver":
        """The same distribution over more batch dimensions."""
        return UniformOver(self.values, batch_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """-log S, for values ``... x event``."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        shape = torch.broadcast_shapes(batch, self.batch_shape)
        return torch.full(shape, -math.log(len(self.values)), device=self.values.device)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, ``sample_shape x batch x event``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.values[torch.randint(len(self.values), shape, device=self.values.device)]
