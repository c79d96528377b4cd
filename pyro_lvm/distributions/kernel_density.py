"""The kernel density estimate of a sample, as a distribution."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["KernelDensity"]

_NUMBERS = 2**22  # of a table of points and data that is held at a time


class KernelDensity(TorchDistribution):
    """A Gaussian of one width around each point of a sample (Parzen 1962).

        p(x) = (1/S) sum_s N(x; points_s, bandwidth^2 I)

    Squared distances are computed by a matrix product in double precision, since in single
    precision they would be off by the rounding of squared lengths; chunks of points bound the
    memory.

    Args:
        points: ``S x D``.
        bandwidth: The standard deviation of the kernel.
        batch_shape: The shape of the batch.
        validate_args: As in torch.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch's interface
    support = constraints.real_vector

    def __init__(
        self,
        points: Tensor,
        bandwidth: float | Tensor,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.points, self.bandwidth = points, bandwidth
        super().__init__(torch.Size(batch_shape), points.shape[1:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "KernelDensity":
        """The same distribution over more batch dimensions; the points are shared."""
        return KernelDensity(self.points, self.bandwidth, batch_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(x), for values ``... x D``."""
        flat = value.reshape(-1, value.shape[-1])
        total = torch.full((len(flat),), -math.inf, dtype=torch.float64, device=value.device)
        for chunk in self.log_kernels(flat):
            total = torch.logaddexp(total, chunk.logsumexp(0))
        log_prob = (total - math.log(len(self.points))).to(value.dtype)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return log_prob.reshape(value.shape[:-1]).expand(shape)

    def log_kernels(self, x: Tensor) -> Iterator[Tensor]:
        """Log N(x_i; points_s, bandwidth^2 I) for some points at a time, ``chunk x N``."""
        variance = torch.as_tensor(self.bandwidth, dtype=torch.float64, device=x.device) ** 2
        normaliser = 0.5 * x.shape[1] * (2 * math.pi * variance).log()
        for squared in squared_distances(self.points, x):
            yield -0.5 * squared / variance - normaliser

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, ``sample_shape x batch x D``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        index = torch.randint(len(self.points), shape, device=self.points.device)
        centres = self.points[index]
        return centres + self.bandwidth * torch.randn_like(centres)


def squared_distances(points: Tensor, x: Tensor) -> Iterator[Tensor]:
    """|points_s - x_i|^2 in double precision for some points at a time, ``chunk x N``."""
    centre = points.mean(0, dtype=torch.float64)
    x, size = x.double() - centre, max(1, _NUMBERS // len(x))
    lengths = x.square().sum(1)
    for start in range(0, len(points), size):
        some = points[start : start + size].double() - centre
        products = torch.addmm(lengths, some, x.T, alpha=-2.0)
        yield (products + some.square().sum(1, keepdim=True)).clamp(min=0.0)
