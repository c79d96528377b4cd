"""The maximum mean discrepancy."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pyro_lvm.divergences.kernel_mean import kernel_mean
from pyro_lvm.divergences.kernels import IMQ, Kernel, check_kernel, squared_distances
from pyro_lvm.divergences.samples import check_two_samples, full_precision, in_one_type

__all__ = ["MMD"]

Estimator = Literal["u", "v", "linear"]

MEDIAN_ROWS = 256
"""Rows of each sample that the median is taken of: 131,000 distances between 512."""


class MMD(nn.Module):
    """The squared maximum mean discrepancy between two distributions, from a sample of each.

        MMD^2(q, p) = E k(x, x') + E k(y, y') - 2 E k(x, y),    x, x' ~ q,    y, y' ~ p

    It is 0 if q = p and, for the kernels of this package, positive otherwise. From B draws each,

        u:       sum_{i != j} [k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)] / (B (B - 1))
        v:       sum_{ij} [k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)] / B^2
        linear:  sum_i [k(x_i, x_i') + k(y_i, y_i') - k(x_i, y_i') - k(x_i', y_i)] / B,
                 i' = i + 1, and 1 after B

    The U-statistic is unbiased at every batch size, and hence negative now and then when q and p
    are close. It leaves out i = j between the samples too: where ``y_i`` is drawn under the
    condition of datum i, as ``x_i`` is, the two are alike although q and p are compared over all
    conditions, and their pairs would pull the estimate down. Each ``(x_i, y_i)`` is to be
    independent of the others. Samples of different sizes have no such pairs, so all are used:

        u:       sum_{i != j} k(x_i, x_j) / (B1 (B1 - 1)) + sum_{i != j} k(y_i, y_j) / (B2 (B2 - 1))
                 - 2 sum_{ij} k(x_i, y_j) / (B1 B2)

    The V-statistic is a squared norm, never negative, and biased upwards: for independent samples
    by ``E[k(x, x) - k(x, x')] / B1 + E[k(y, y) - k(y, y')] / B2``.

    The linear statistic is the U-statistic of neighbours on a ring: also unbiased, at a cost that
    grows as B, with a variance that falls as 1 / B also at q = p, where that of the U-statistic
    falls as 1 / B^2. Its value depends on the order of rows; its mean over all orders is the
    U-statistic. Of different sizes, each ring within a sample has all of its rows and the one
    between them the first min(B1, B2) of each.

    It has no unit, since the kernel has none, and is at most 2 (times the number of widths). Time
    grows as ``(B1 + B2)^2`` (but for ``"linear"``). Memory grows with the samples alone: above
    `pyro_lvm.divergences.kernel_mean.LARGEST_GRAM` pairs the kernel's values come and go in blocks,
    and the gradient is found with the value; it is exact, but has no gradient of its own.

    Args:
        kernel: Any ``kernel(squared_distance, dim)``; see :mod:`pyro_lvm.divergences.kernels`. One
            that is an ``nn.Module`` gets a gradient, which is of use to those who maximise it.
        estimator: The U-, the V- or the linear statistic.
        median_heuristic: Whether distances are measured in the median squared distance between two
            rows of the pooled sample, in place of the 2 D that the kernels take for it: the kernel
            is given ``|x - y|^2 * 2 D / median``. The median is found anew for every call and has
            no gradient; it is that of all rows up to 256 from each sample, and of 256 evenly
            spaced rows of a larger one. It treats both samples alike, so that the U-statistic keeps
            its mean of 0 at q = p (nearly so if B1 and B2 differ and one is above 256). Each call
            has a kernel of its own: values of different batches or steps have no scale in common.
            Where the median is 0, distances are left as they are.

    Raises:
        ValueError: If the estimator is an unknown word.
        TypeError: If the kernel can't be called.

    Reference:
        Gretton et al. 2012, "A kernel two-sample test", JMLR 13: Lemma 6, eq. 3 (U, for different
        sizes) and 4 (U over pairs), eq. 5 (V), section 6 (linear, there over disjoint pairs),
        section 8 (median heuristic).
    """

    def __init__(
        self,
        kernel: Kernel = IMQ(),  # noqa: B008
        *,
        estimator: Estimator = "u",
        median_heuristic: bool = False,
    ) -> None:
        super().__init__()
        check_kernel(kernel)
        if estimator not in get_args(Estimator):
            raise ValueError(f"Expected estimator to be 'u', 'v' or 'linear'; got {estimator!r}.")
        self.kernel = kernel
        self.estimator = estimator
        self.median_heuristic = median_heuristic

    def forward(self, q_samples: Tensor, p_samples: Tensor) -> Tensor:
        """Estimate MMD^2(q, p); the gradient flows to both samples.

        Args:
            q_samples: ``B1 x D``, independent draws from q.
            p_samples: ``B2 x D``, independent draws from p. Row i may share its condition with row
                i of ``q_samples`` if B1 = B2.

        Returns:
            A scalar.

        Raises:
            TypeError: If a sample is not a floating point tensor.
            ValueError: If a sample is not ``B x D``, the widths D differ, or there are too few
                draws: two are needed for the unbiased statistics, one for the V-statistic.
        """
        self._check(q_samples, p_samples)
        x, y = in_one_type(q_samples, p_samples)
        with full_precision(x):
            if self.median_heuristic:
                scale = _median_scale(x.detach(), y.detach())
                x, y = x * scale, y * scale
            return self._on_rings(x, y) if self.estimator == "linear" else self._over_pairs(x, y)

    def _over_pairs(self, x: Tensor, y: Tensor) -> Tensor:
        unbiased = self.estimator == "u"
        paired = unbiased and len(x) == len(y)
        return (
            kernel_mean(self.kernel, x, x, distinct=unbiased)  # E k(x, x')
            + kernel_mean(self.kernel, y, y, distinct=unbiased)  # E k(y, y')
            - 2 * kernel_mean(self.kernel, x, y, distinct=paired)  # E k(x, y)
        )

    def _on_rings(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean over neighbours in place of all pairs."""
        shared = min(len(x), len(y))
        u, v = x[:shared], y[:shared]
        between = self._neighbours(u, v) + self._neighbours(v, u)
        return self._neighbours(x, x) + self._neighbours(y, y) - between

    def _neighbours(self, x: Tensor, y: Tensor) -> Tensor:
        distances = (x - y.roll(-1, 0)).square().sum(-1)  # of x_i and y_{i+1}
        return self.kernel(distances, x.shape[1]).mean()

    def _check(self, x: Tensor, y: Tensor) -> None:
        if self.estimator == "v":
            check_two_samples(x, y)
            return
        purpose = f" for estimator={self.estimator!r}"
        remedy = ", or estimator='v', which is biased upwards"
        check_two_samples(x, y, least=2, purpose=purpose, remedy=remedy)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        kernel = "" if isinstance(self.kernel, nn.Module) else f"kernel={self.kernel!r}, "
        median = ", median_heuristic=True" if self.median_heuristic else ""
        return f"{kernel}estimator={self.estimator!r}{median}"


def _median_scale(x: Tensor, y: Tensor) -> Tensor:
    """What to multiply samples with for a median squared distance of 2 D; 1 if it is 0.

    Rows of equal index are taken from samples of equal size, so that exchanging ``x_i`` and ``y_i``
    for all i changes nothing: under that symmetry the U-statistic has a mean of 0.
    """
    pooled = torch.cat([_evenly_spaced(x), _evenly_spaced(y)])
    i, j = torch.triu_indices(len(pooled), len(pooled), offset=1, device=x.device)
    median = squared_distances(pooled, pooled)[i, j].median()
    unit, limits = 2 * x.shape[1], torch.finfo(x.dtype)
    # what rounding makes of the distance of equal points, and what has no finite reciprocal
    rounding = unit * ((2 * limits.eps * pooled.abs().max()).square() + limits.tiny)
    return torch.where(median > rounding, unit / median, torch.ones_like(median)).sqrt()


def _evenly_spaced(x: Tensor) -> Tensor:
    if len(x) <= MEDIAN_ROWS:
        return x
    return x[torch.arange(MEDIAN_ROWS, device=x.device) * len(x) // MEDIAN_ROWS]
