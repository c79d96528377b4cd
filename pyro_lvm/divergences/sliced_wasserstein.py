"""The sliced Wasserstein distance."""

import torch
from torch import Tensor, nn

from pyro_lvm.checks import check_count, check_positive
from pyro_lvm.divergences.samples import check_two_samples, full_precision, in_one_type

__all__ = ["SlicedWasserstein"]


class SlicedWasserstein(nn.Module):
    """The Wasserstein distance of one-dimensional projections, averaged over directions.

        SW_p^p(q, p) = E W_p^p(theta . x, theta . y),    theta uniform on the unit sphere
        W_p^p(u, v) = integral_0^1 |F_u^{-1}(t) - F_v^{-1}(t)|^p dt

    The mean over directions is estimated without bias from fresh ones in every call, drawn by
    torch's global generator; the one-dimensional distance of the two samples is exact, by sorting,
    also where their sizes differ. As an estimate of that of the distributions it is biased upwards
    at every finite size, as the distance is convex in the pair: positive at q = p, where it falls
    as B^{-p/2} (p = 1; p = 2 and bounded samples without gaps) or hardly slower (log log B / B for
    p = 2 and normals). For normals of one covariance, ``m`` apart, it is |m|^2 / D at p = 2.

    Time grows as B log B, memory as B, times the number of projections.

    Args:
        num_projections: The number of directions per call.
        order: The power p, from 1 on.

    Raises:
        ValueError: If the number of projections is not a positive integer, or the order below 1.

    Reference:
        Rabin et al. 2012, "Wasserstein barycenter and its application to texture mixing"; Bonneel
        et al. 2015, "Sliced and Radon Wasserstein barycenters of measures"; Kolouri et al. 2018,
        "Sliced-Wasserstein autoencoder", arXiv 1804.01947, for latents.
    """

    def __init__(self, num_projections: int = 50, *, order: float = 2) -> None:
        super().__init__()
        check_count("num_projections", num_projections)
        check_positive("order", order, minimum=1)
        self.num_projections = num_projections
        self.order = order

    def forward(self, q_samples: Tensor, p_samples: Tensor) -> Tensor:
        """Estimate SW_p^p(q, p), in the unit of the samples to the power p.

        Args:
            q_samples: ``B1 x D``, draws from q.
            p_samples: ``B2 x D``, draws from p.

        Returns:
            A scalar; the gradient flows to both samples.

        Raises:
            TypeError: If a sample is not a floating point tensor.
            ValueError: If a sample is not ``B x D`` with at least one row, or the widths D differ.
        """
        check_two_samples(q_samples, p_samples)
        x, y = in_one_type(q_samples, p_samples)
        directions = _directions(self.num_projections, x)  # D x L
        with full_precision(x):
            return self._distance(x @ directions, y @ directions).mean()  # E over theta

    def _distance(self, u: Tensor, v: Tensor) -> Tensor:
        """W_p^p of the columns of ``u`` (B1 x L) and ``v`` (B2 x L): L values."""
        u, v = u.sort(0).values, v.sort(0).values  # row i is F^{-1} on (i / B, (i + 1) / B]
        if len(u) == len(v):
            return self._cost(u - v).mean(0)
        i, j, width = _common_steps(len(u), len(v), u.device)
        return width.to(u.dtype) @ self._cost(u[i] - v[j])

    def _cost(self, difference: Tensor) -> Tensor:
        return difference.abs() ** self.order

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"num_projections={self.num_projections}, order={self.order}"


def _directions(number: int, like: Tensor) -> Tensor:
    """Directions of normal draws, which are uniform; as columns, of the type and device given."""
    draws = torch.randn(like.shape[1], number, dtype=like.dtype, device=like.device)
    return draws / torch.linalg.vector_norm(draws, dim=0)


def _common_steps(first: int, second: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The intervals of (0, 1] on which both quantile functions are constant.

    Breakpoints are counted in units of 1 / (first * second), as integers, so none is missed or met
    twice by rounding. Where the two functions step at once there is an interval of width 0.

    Returns:
        For each interval the index into the first and the second sorted sample, and its width.
    """
    steps = torch.arange(1, first + 1, device=device) * second
    others = torch.arange(1, second + 1, device=device) * first
    ends = torch.cat([steps, others]).sort().values
    widths = ends.diff(prepend=ends.new_zeros(1)).double() / (first * second)
    return (ends - 1) // second, (ends - 1) // first, widths
