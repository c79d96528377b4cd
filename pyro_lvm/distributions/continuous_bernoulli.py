"""The continuous Bernoulli, exact at every logit."""

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["ContinuousBernoulli"]


class ContinuousBernoulli(TorchDistribution):
    """The continuous Bernoulli as an exponential family in its logit l, on [0, 1].

        log p(x) = l x - A(l),    A(l) = log((exp(l) - 1) / l),    mean A'(l),    variance A''(l)

    Each is written in a = abs(l), where nothing overflows, and by its Taylor series near 0, where
    both forms cancel. The series is what makes the gradient right at l = 0 exactly.
    ``pyro.distributions`` has this distribution in terms of a probability, which float32 rounds:
    from ``abs(l) = 16`` on its density no longer integrates to 1.

    Args:
        logits: ``l``, of any shape.
        validate_args: As in torch.

    Reference:
        Loaiza-Ganem and Cunningham 2019, "The continuous Bernoulli", arXiv 1907.06845.
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012
    support = constraints.unit_interval
    has_rsample = True
    # Where the series takes over. Its error in A is 2e-9 l^10 = 2e-15; that of the derivatives of
    # the direct form, by cancellation, is a few times the machine precision over l^2.
    _near_zero = 0.25

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "ContinuousBernoulli":
        """The same distribution over more batch dimensions."""
        return ContinuousBernoulli(self.logits.expand(batch_shape), validate_args=False)

    def _split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Whether l is near 0; l there and 0 elsewhere; abs(l) elsewhere and 1 there."""
        near = self.logits.abs() < self._near_zero
        inner = torch.where(near, self.logits, torch.zeros_like(self.logits))
        outer = torch.where(near, torch.ones_like(self.logits), self.logits.abs())
        return near, inner, outer

    def _log_normalizer(self) -> Tensor:
        """A(l) - max(l, 0): without the part that white pixels at a large l have to cancel."""
        near, x, a = self._split()
        s = x * x
        series = x / 2 + s * (1 / 24 - s * (1 / 2880 - s * (1 / 181440 - s / 9676800)))
        direct = (-torch.expm1(-a)).log() - a.log()
        return torch.where(near, series - x.relu(), direct)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density on [0, 1], nats."""
        if self._validate_args:
            self._validate_sample(value)
        return self.logits * value - self.logits.relu() - self._log_normalizer()

    @property
    def mean(self) -> Tensor:
        """``A'(l)``."""
        near, x, a = self._split()
        s = x * x
        series = 0.5 + x * (1 / 12 - s * (1 / 720 - s * (1 / 30240 - s / 1209600)))
        direct = 1 / a + torch.exp(-a) / torch.expm1(-a)  # the mean at -a: 1 - mean at a
        return torch.where(near, series, torch.where(self.logits > 0, 1 - direct, direct))

    @property
    def variance(self) -> Tensor:
        """``A''(l)``."""
        near, x, a = self._split()
        s = x * x
        series = 1 / 12 - s * (1 / 240 - s * (1 / 6048 - s / 172800))
        direct = 1 / a**2 - torch.exp(-a) / torch.expm1(-a) ** 2
        return torch.where(near, series, direct)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws by the inverse of the distribution function."""
        shape = self._extended_shape(sample_shape)
        u = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device)
        return self._inverse_cdf(u)

    def _inverse_cdf(self, u: Tensor) -> Tensor:
        """``log(1 + u (exp(l) - 1)) / l``: the cumulants of Bernoulli(u) are its series in l.

        Five of them leave an error below 3e-7, a few of float32's steps.
        """
        near, x, a = self._split()
        v, skew = u * (1 - u), 1 - 2 * u
        fifth = 1 - 12 * v
        series = u + v * x * (
            1 / 2 + x * (skew / 6 + x * ((1 - 6 * v) / 24 + x * skew * fifth / 120))
        )
        log_u, log_1mu = u.log(), torch.log1p(-u)
        above = 1 + torch.logaddexp(log_u, log_1mu - a) / a
        below = -torch.logaddexp(log_1mu, log_u - a) / a
        # rounding may step out of the support by one unit in the last place
        direct = torch.where(self.logits > 0, above, below).clamp(0.0, 1.0)
        return torch.where(near, series, direct)
