"""The maximum mean discrepancy."""

from typing import Literal

from torch import Tensor, nn

from pyro_lvm.divergences.kernels import IMQ, Kernel, squared_distances

__all__ = ["MMD"]


class MMD(nn.Module):
    """The squared maximum mean discrepancy between two distributions, from a sample of each.

        MMD^2(q, p) = E k(x, x') + E k(y, y') - 2 E k(x, y),    x, x' ~ q,    y, y' ~ p

    It is 0 if q = p and, for the kernels of this package, positive otherwise. From B1 and B2 draws,

        u:  sum_{i != j} k(x_i, x_j) / (B1 (B1 - 1)) + sum_{i != j} k(y_i, y_j) / (B2 (B2 - 1))
            - 2 sum_{ij} k(x_i, y_j) / (B1 B2)
        v:  sum_{ij} k(x_i, x_j) / B1^2 + sum_{ij} k(y_i, y_j) / B2^2
            - 2 sum_{ij} k(x_i, y_j) / (B1 B2)

    The U-statistic is unbiased at every batch size, and hence negative now and then when q and p
    are close. The V-statistic is a squared norm, never negative, and biased upwards by
    ``E[k(x, x) - k(x, x')] / B1 + E[k(y, y) - k(y, y')] / B2``. It has no unit, since the kernel
    has none, and is at most 2. Time and memory grow as ``(B1 + B2)^2``.

    Args:
        kernel: Any ``kernel(squared_distance, dim)``; see :mod:`pyro_lvm.divergences.kernels`.
        estimator: The U- or the V-statistic.

    Raises:
        ValueError: If the estimator is an unknown word.
        TypeError: If the kernel can't be called.

    Reference:
        Gretton et al. 2012, "A kernel two-sample test", JMLR 13: Lemma 6, eq. 3 (U) and 5 (V).
    """

    def __init__(self, kernel: Kernel = IMQ(), *, estimator: Literal["u", "v"] = "u") -> None:  # noqa: B008
        super().__init__()
        if not callable(kernel):
            raise TypeError(
                f"Expected kernel to be callable as kernel(squared_distance, dim); got {kernel!r}. "
                f"Try lvm.divergences.IMQ()."
            )
        if estimator not in ("u", "v"):
            raise ValueError(f"Expected estimator to be 'u' or 'v'; got {estimator!r}.")
        self.kernel = kernel
        self.estimator = estimator

    def forward(self, q_samples: Tensor, p_samples: Tensor) -> Tensor:
        """Estimate MMD^2(q, p); the gradient flows to both samples.

        Args:
            q_samples: ``B1 x D``, independent draws from q.
            p_samples: ``B2 x D``, independent draws from p.

        Returns:
            A scalar.

        Raises:
            TypeError: If a sample is not a floating point tensor.
            ValueError: If a sample is not ``B x D``, the widths D differ, or there are too few
                draws: two are needed for the U-statistic, one for the V-statistic.
        """
        self._check("q_samples", q_samples)
        self._check("p_samples", p_samples)
        if q_samples.shape[1] != p_samples.shape[1]:
            raise ValueError(
                f"Expected q_samples and p_samples of one width D; got {q_samples.shape[1]} and "
                f"{p_samples.shape[1]}. Flatten the same sites for both."
            )
        return (
            self._within(q_samples)  # E k(x, x')
            + self._within(p_samples)  # E k(y, y')
            - 2 * self._gram(q_samples, p_samples).mean()  # E k(x, y)
        )

    def _within(self, x: Tensor) -> Tensor:
        """The mean over pairs of one sample: of different draws (U), or of all (V)."""
        gram, size = self._gram(x, x), len(x)
        if self.estimator == "v":
            return gram.mean()
        return (gram.sum() - gram.trace()) / (size * (size - 1))

    def _gram(self, x: Tensor, y: Tensor) -> Tensor:
        return self.kernel(squared_distances(x, y), x.shape[1])  # B1 x B2

    def _check(self, name: str, x: Tensor) -> None:
        """Refuse a sample by its type and shape alone: safe to trace."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"Expected {name} to be a floating point tensor; got {got}. "
                f"A divergence of samples is for continuous latents."
            )
        if x.dim() != 2 or x.shape[1] == 0:
            raise ValueError(
                f"Expected {name} of shape B x D; got {tuple(x.shape)}. Try {name}.reshape(B, -1)."
            )
        least = 2 if self.estimator == "u" else 1
        if len(x) < least:
            raise ValueError(
                f"Expected {name} with at least {least} row(s) for estimator={self.estimator!r}; "
                f"got {len(x)}. Use a larger batch (drop the last, incomplete one), or "
                f"estimator='v', which is biased upwards."
            )

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"kernel={self.kernel!r}, estimator={self.estimator!r}"
