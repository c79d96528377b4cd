"""Distributions of values that are observed in part."""

from functools import singledispatch
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal

from pyro_lvm.checks import check_boolean
from pyro_lvm.distributions.indexed_normal import IndexedNormal
from pyro_lvm.distributions.marginal_normal import low_rank_log_prob, low_rank_regression
from pyro_lvm.distributions.recorded import is_recorded
from pyro_lvm.distributions.supports import inside_support

__all__ = ["Incomplete", "completed", "observed_entries"]


class Incomplete(TorchDistribution):
    """A distribution of which some entries of the value are missing.

        log_prob(x) = log p(x_o) = log int p(x_o, x_m) dx_m

    with o the entries under the mask's True and m the others. What stands at these, NaN too,
    changes neither value nor gradient. Draws, mean and support are those of whole values, so that a
    story draws what it would draw anyway; `sample_given` draws x_m given x_o.

    Where the entries of an event are independent (``.to_event``) the missing ones are left out. The
    marginals of ``MultivariateNormal``, ``LowRankMultivariateNormal`` and `IndexedNormal` are taken
    in closed form. Of other dependent entries all or none may be missing.

    Args:
        base_dist: The distribution of whole values.
        mask: Booleans, True where an entry is observed; broadcastable to ``batch x event``, so that
            a mask of whole events ends in dimensions of size 1.

    Raises:
        TypeError: If the mask is not a tensor of booleans.
        ValueError: If its shape does not fit, or the marginal of the entries has no closed form.
    """

    base_dist: Any
    observed: Tensor  # the mask, which has another name since ``mask`` is a method of Pyro's
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch's interface

    def __init__(self, base_dist: Any, mask: Tensor) -> None:
        event_dim = len(base_dist.event_shape)
        _check_mask(base_dist, mask)
        inner = observed_entries(base_dist)
        mask = mask if inner is None else mask & inner.to(mask.device)
        while isinstance(base_dist, Incomplete | MaskedDistribution):
            base_dist = base_dist.base_dist
        rows = mask.shape[: mask.dim() - event_dim]
        batch_shape = torch.broadcast_shapes(base_dist.batch_shape, rows)
        if batch_shape != base_dist.batch_shape:
            base_dist = base_dist.expand(batch_shape)
        self.base_dist, self.observed = base_dist, mask
        super().__init__(batch_shape, base_dist.event_shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Incomplete":
        """The same distribution over more batch dimensions; the mask is shared."""
        return Incomplete(self.base_dist.expand(torch.Size(batch_shape)), self.observed)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of the observed entries, nats; 0 where there are none."""
        if not is_recorded() and bool(self.observed.all()):
            return self.base_dist.log_prob(value)
        return _log_prob(self.base_dist, value, self.observed)

    def sample_given(self, value: Tensor) -> Tensor:
        """Draws of the missing entries given the observed ones, which stay as they are.

        A draw x' of the whole is moved by what the observed entries say: of normal entries,
        x'_m + S_mo S_oo^-1 (x_o - x'_o) has the conditional distribution (Matheron's rule).

        Args:
            value: ``... x event``.

        Returns:
            ``batch x event``, without gradient.
        """
        with torch.no_grad():
            return self._given(value, self.base_dist.sample())

    def mean_given(self, value: Tensor) -> Tensor:
        """E[x_m | x_o] at the missing entries, the value itself at the observed ones."""
        return self._given(value, self.base_dist.mean)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws of whole values."""
        return self.base_dist.rsample(sample_shape)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws of whole values."""
        return self.base_dist.sample(sample_shape)

    @property
    def has_rsample(self) -> bool:
        """Whether whole values have reparameterised draws."""
        return self.base_dist.has_rsample

    @property
    def support(self) -> Any:
        """That of whole values."""
        return self.base_dist.support

    @property
    def mean(self) -> Tensor:
        """That of whole values."""
        return self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        """That of whole values."""
        return self.base_dist.variance

    def _given(self, value: Tensor, whole: Tensor) -> Tensor:
        moved = whole + _regression(self.base_dist, value - whole, self.observed)
        return torch.where(self.observed, value, moved.to(value.dtype))


def observed_entries(distribution: Any) -> Tensor | None:
    """Which entries of a value count in a log-probability, broadcastable to ``batch x event``.

    Args:
        distribution: Any; masks are found under ``to_event`` too.

    Returns:
        Booleans; None where there is no mask.
    """
    if isinstance(distribution, Incomplete):
        return distribution.observed
    if isinstance(distribution, Independent):
        return observed_entries(distribution.base_dist)
    if not isinstance(distribution, MaskedDistribution):
        return None
    own, inner = _mask_of_events(distribution), observed_entries(distribution.base_dist)
    if isinstance(own, bool):
        own = torch.tensor(own).reshape([1] * len(distribution.event_shape))
    return own if inner is None else own & inner


def completed(distribution: Any, value: Tensor) -> Tensor:
    """A value, with what is not observed drawn from the distribution given the rest.

    Args:
        distribution: Any, also one without a mask.
        value: ``... x event``.

    Returns:
        ``batch x event``, without gradient.
    """
    if isinstance(distribution, Incomplete):
        return distribution.sample_given(value)
    if isinstance(distribution, Independent):
        return completed(distribution.base_dist, value)
    if isinstance(distribution, MaskedDistribution):
        rest = completed(distribution.base_dist, value)
        own = torch.as_tensor(_mask_of_events(distribution)).to(value.device)
        return torch.where(own, rest, distribution.sample().to(value.dtype))
    return value


def _check_mask(base_dist: Any, mask: Tensor) -> None:
    check_boolean("a distribution", mask)
    event = base_dist.event_shape
    own = mask.shape[mask.dim() - len(event) :] if mask.dim() >= len(event) else None
    if own is None or any(size not in (1, full) for size, full in zip(own, event, strict=True)):
        raise ValueError(
            f"Expected a mask that ends in the event shape {tuple(event)}, or in 1 for each of its "
            f"dimensions; got shape {tuple(mask.shape)}."
        )
    if not _has_marginals(base_dist, own):
        raise ValueError(
            f"Expected entries that are independent or normal; got {type(base_dist).__name__}, "
            f"whose entries depend on each other, and no marginal is known. Mask whole events, by "
            f"a mask without the dimensions of the event, or let the entries be independent given "
            f"a latent (.to_event), or sites of their own."
        )


def _has_marginals(distribution: Any, mask_shape: torch.Size) -> bool:
    """Whether entries can be left out by a mask that has this shape in an event."""
    event_dim = len(distribution.event_shape)
    whole = all(size == 1 for size in mask_shape[len(mask_shape) - event_dim :])
    if whole or isinstance(
        distribution, Incomplete | MultivariateNormal | LowRankMultivariateNormal | IndexedNormal
    ):
        return True
    if isinstance(distribution, Independent | MaskedDistribution):
        return _has_marginals(distribution.base_dist, mask_shape)
    return False


@singledispatch
def _log_prob(distribution: Any, value: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of observed entries, ``batch``; here of events that are there or not."""
    rows = mask.reshape(mask.shape[: mask.dim() - len(distribution.event_shape)])
    value = torch.where(mask, value, inside_support(distribution, value))
    return torch.where(rows, distribution.log_prob(value), 0.0)


@_log_prob.register
def _(distribution: Independent, value: Tensor, mask: Tensor) -> Tensor:
    log_prob = _log_prob(distribution.base_dist, value, mask)
    dims = distribution.reinterpreted_batch_ndims
    return log_prob.reshape(*log_prob.shape[: log_prob.dim() - dims], -1).sum(-1)


@_log_prob.register
def _(distribution: MaskedDistribution, value: Tensor, mask: Tensor) -> Tensor:
    return _log_prob(distribution.base_dist, value, mask & _mask_of_events(distribution))


@_log_prob.register
def _(distribution: IndexedNormal, value: Tensor, mask: Tensor) -> Tensor:
    _check_observed(distribution, value, mask)
    return distribution.observed_log_prob(value, mask)


@_log_prob.register
def _(distribution: MultivariateNormal, value: Tensor, mask: Tensor) -> Tensor:
    _check_observed(distribution, value, mask)
    return _as_table(distribution).observed_log_prob(value - distribution.loc, mask)


@_log_prob.register
def _(distribution: LowRankMultivariateNormal, value: Tensor, mask: Tensor) -> Tensor:
    _check_observed(distribution, value, mask)
    residual = value - distribution.loc
    return low_rank_log_prob(residual, *_factors(distribution), mask.expand(residual.shape))


@singledispatch
def _regression(distribution: Any, residual: Tensor, mask: Tensor) -> Tensor:
    """By how much the observed entries move what is to be expected of the missing ones.

    Args:
        distribution: Of whole values; here one whose entries say nothing of each other.
        residual: What the observed entries are beyond x', from which the others are moved.
        mask: Which entries are observed.
    """
    return torch.zeros_like(residual)


@_regression.register
def _(distribution: Independent, residual: Tensor, mask: Tensor) -> Tensor:
    return _regression(distribution.base_dist, residual, mask)


@_regression.register
def _(distribution: MaskedDistribution, residual: Tensor, mask: Tensor) -> Tensor:
    return _regression(distribution.base_dist, residual, mask & _mask_of_events(distribution))


@_regression.register
def _(distribution: IndexedNormal, residual: Tensor, mask: Tensor) -> Tensor:
    return distribution.observed_regression(residual, mask)


@_regression.register
def _(distribution: MultivariateNormal, residual: Tensor, mask: Tensor) -> Tensor:
    return _as_table(distribution).observed_regression(residual, mask)


@_regression.register
def _(distribution: LowRankMultivariateNormal, residual: Tensor, mask: Tensor) -> Tensor:
    return low_rank_regression(residual, *_factors(distribution), mask.expand(residual.shape))


def _as_table(distribution: Any) -> IndexedNormal:
    """Its covariance, as the only Gaussian of a table with mean 0."""
    factor = distribution._unbroadcasted_scale_tril  # ... x D x D, without the dimensions of loc
    scale = factor.diagonal(dim1=-2, dim2=-1)
    unit = (factor / scale.unsqueeze(-1)).unsqueeze(-3)
    index = torch.zeros((), dtype=torch.long, device=factor.device)
    return IndexedNormal(index, torch.zeros_like(factor[..., :1, :]), scale.unsqueeze(-2), unit)


def _factors(distribution: Any) -> tuple[Tensor, Tensor]:
    """W and d of the covariance W W^T + diag(d)."""
    return distribution._unbroadcasted_cov_factor, distribution._unbroadcasted_cov_diag


def _mask_of_events(distribution: Any) -> Tensor | bool:
    """The mask of a distribution's own, which is of whole events."""
    mask = distribution._mask
    return mask if isinstance(mask, bool) else mask[(..., *[None] * len(distribution.event_shape))]


def _check_observed(distribution: Any, value: Tensor, mask: Tensor) -> None:
    """As every distribution checks a value, if it does."""
    if distribution._validate_args:
        distribution._validate_sample(torch.where(mask, value, 0.0))
