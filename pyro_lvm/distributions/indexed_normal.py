"""A Gaussian chosen from a table, as the component of a mixture is by its label."""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

from pyro_lvm.distributions.marginal_normal import covariance_of, regression
from pyro_lvm.distributions.marginal_table import observed_log_prob_table, regression_by_pattern
from pyro_lvm.distributions.patterns import in_groups
from pyro_lvm.distributions.recorded import is_recorded
from pyro_lvm.distributions.whitening import (
    columns_at_once,
    inverse_factor,
    log_normaliser,
    middle,
    squared_lengths,
    whitened_means,
)

__all__ = ["IndexedNormal"]


class IndexedNormal(TorchDistribution):
    """A Gaussian chosen by an index from a table of ``C`` of them, N(x; loc[index], S[index]).

    It is what a mixture's component is given its label. With the label enumerated,
    ``MultivariateNormal(loc[z], scale_tril=scale_tril[z])`` would solve one triangular system per
    datum and component; here the data are whitened for all components by one matrix product, and
    the whitened data are never held together.

    The covariance is S = L L^T with L = diag(scale) (I + tril), where ``tril`` is strictly lower
    triangular (its upper part is ignored) and free: L is invertible for every positive ``scale``,
    and no matrix is ever factorised.

    Args:
        index: Which Gaussian, integers of any shape.
        loc: Means, ``... x C x D``, where ``...`` are batch dimensions.
        scale: Conditional standard deviations of each feature given those before it,
            ``... x C x D`` or broadcastable to it (spherical ``C x 1``, tied ``1 x D``).
        tril: ``... x C x D x D``, or broadcastable (``1 x D x D`` for tied ones); None for a
            diagonal covariance.
        validate_args: As in torch.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch's interface
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        index: Tensor,
        loc: Tensor,
        scale: Tensor,
        tril: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.index, self.loc, self.scale = index, loc, scale
        self.tril = None if tril is None else tril.tril(-1)
        tables = [loc.shape[:-2], scale.shape[:-2], () if tril is None else tril.shape[:-3]]
        batch_shape = torch.broadcast_shapes(index.shape, *tables)
        super().__init__(batch_shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "IndexedNormal":
        """The same distribution over more batch dimensions; the table is shared."""
        new = self._get_checked_instance(IndexedNormal, _instance)
        batch_shape = torch.Size(batch_shape)  # Pyro's plates hand over a list
        new.index, new.loc, new.scale, new.tril = self.index, self.loc, self.scale, self.tril
        super(IndexedNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log N(value; loc[index], S[index]), nats."""
        if self._validate_args:
            self._validate_sample(value)
        return self._of_index(self.log_prob_table(value))

    def observed_log_prob(self, value: Tensor, mask: Tensor) -> Tensor:
        """The log-density of the observed features, log N(x_o; loc_o[index], S_oo[index]), nats.

        Args:
            value: ``... x D``; what stands at missing features does not count, NaN neither.
            mask: Which features are observed, ``... x D``.
        """
        return self._of_index(self.observed_log_prob_table(value, mask))

    def log_prob_table(self, value: Tensor) -> Tensor:
        """The log-density under every Gaussian of the table, ``... x C``, nats."""
        inverse = inverse_factor(self.scale, self.tril)
        batch = torch.broadcast_shapes(value.shape[:-1], self.loc.shape[:-2], inverse.shape[:-3])
        loc = self.loc if self.loc.dim() > 2 else self.loc.unsqueeze(0)
        inverse = inverse if inverse.dim() > 3 else inverse.unsqueeze(0)
        centre = middle(loc)  # ... x D
        x, means = value - centre, whitened_means(loc - centre.unsqueeze(-2), inverse)
        if means.shape[-3] == 1:  # the data share a table: they are the columns of a matrix
            lengths = squared_lengths(x.mT, means.squeeze(-3), inverse.squeeze(-4)).mT
        else:  # each datum is a matrix of one column
            lengths = squared_lengths(x.unsqueeze(-1), means, inverse).squeeze(-1)
        log_prob = -0.5 * lengths - log_normaliser(self.scale, self.loc.shape[-1])
        return log_prob.reshape(*batch, self.loc.shape[-2])

    def observed_log_prob_table(self, value: Tensor, mask: Tensor) -> Tensor:
        """`observed_log_prob` under every Gaussian of the table, ``... x C``.

        Data that miss the same features share the factorisations, and some of these are in memory
        at a time, also of a gradient. Where tensors are recorded each datum has its own.
        """
        if not is_recorded() and bool(mask.all()):
            return self.log_prob_table(value)
        return observed_log_prob_table(value, self.loc, self.scale, self.tril, mask)

    def observed_regression(self, residual: Tensor, mask: Tensor) -> Tensor:
        """What is to be expected of missing features, beyond their means, given the observed ones.

            S_mo S_oo^-1 r_o,    r = x - loc[index]

        Args:
            residual: r, ``... x D``.
            mask: Which features are observed, ``... x D``.

        Returns:
            ``... x D``; at observed features r itself, up to rounding.
        """
        if self.tril is None:
            return torch.where(mask, residual, 0.0)
        mask = mask.expand(*mask.shape[:-1], self.loc.shape[-1])
        index = self.index.expand(self.batch_shape)
        covariance = covariance_of(
            self.scale.expand(*self.scale.shape[:-1], mask.shape[-1]), self.tril
        )
        if is_recorded() or covariance.shape[:-3].numel() > 1:
            residual = torch.where(mask, residual, 0.0).unsqueeze(-1)
            return regression(residual, self._choose(covariance, index, 2), mask).squeeze(-1)
        covariance = covariance.reshape(covariance.shape[-3:])
        return regression_by_pattern(residual, covariance, index, mask)

    @property
    def mean(self) -> Tensor:
        """loc[index], ``batch x D``."""
        return self._choose(self.loc, self.index.expand(self.batch_shape), 1)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Reparameterised draws, ``sample_shape x batch x D``."""
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        index = self.index.expand(self.batch_shape)
        if self.tril is not None:
            noise = noise + self._mixed(noise, self.tril)
        return self._choose(self.loc, index, 1) + self._choose(self.scale, index, 1) * noise

    def _mixed(self, noise: Tensor, tril: Tensor) -> Tensor:
        """tril[index] noise, ``... x D``; draws of one Gaussian are the columns of a matrix."""
        index = self.index.expand(self.batch_shape).expand(noise.shape[:-1])
        if is_recorded() or tril.shape[:-3].numel() > 1:
            return (self._choose(tril, index, 2) @ noise.unsqueeze(-1)).squeeze(-1)
        table, columns = tril.reshape(tril.shape[-3:]), noise.reshape(-1, noise.shape[-1])
        keys = index.flatten() if len(table) > 1 else torch.zeros_like(index.flatten())

        def compute(key: Tensor, numbers: Tensor) -> Tensor:
            return table[key] @ columns[numbers].mT  # G x D x n

        return in_groups(
            compute, keys, most=columns_at_once(noise.shape[-1:], noise.device)
        ).T.reshape(noise.shape)

    def _of_index(self, table: Tensor) -> Tensor:
        """The column of the index in a table ``... x C``."""
        shape = torch.broadcast_shapes(self.batch_shape, table.shape[:-1])
        outer = max(self.index.dim() - table.dim() + 1, 0)
        if self.index.shape[outer:].numel() == 1:  # one label for all data: take whole columns
            chosen = table.movedim(-1, 0).index_select(0, self.index.flatten())
            return chosen.reshape(self.index.shape[:outer] + table.shape[:-1]).expand(shape)
        index = self.index.expand(shape).unsqueeze(-1)
        return table.expand(*shape, table.shape[-1]).gather(-1, index).squeeze(-1)

    def _choose(self, table: Tensor, index: Tensor, event_dim: int) -> Tensor:
        event = (slice(None),) * event_dim
        if table.shape[-1 - event_dim] == 1:  # shared by all Gaussians
            index = torch.zeros_like(index)
        return Vindex(table)[(..., index, *event)]
