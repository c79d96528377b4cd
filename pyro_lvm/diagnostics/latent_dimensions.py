"""What each dimension of a latent has learned: active units, and the KL that each one costs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lvm.diagnostics.estimates import Estimate
from pyro_lvm.terms.latents import LatentTables

__all__ = ["LatentSummary", "summarise"]


@dataclass(frozen=True, eq=False)
class LatentSummary:
    """The dimensions of one local latent, ``D`` of them.

    They are those of its event and of the plates inside the data plate, flattened.

    Attributes:
        site: The site's name.
        shape: The sizes of the nested plates, then those of the event; ``D`` is their product.
        discrete: Whether it is discrete: it has a KL then, and no active units.
        variance_of_mean: ``D``, Var_x(E_q[z_d | x]) over the data, in the unit of z squared; None
            for a discrete latent. With a mean that had to be sampled the variance that comes of
            that has been subtracted, so that it may be slightly negative.
        kl_of_dimensions: ``D``, mean_x KL(q(z_d | x) || p(z_d)) in nats, the marginals' for a
            multivariate normal or a Dirichlet; None where they are not known (flows, priors that
            depend on a site that the model enumerates).
        kl: Mean KL(q(z | x) || p(z)) in nats, given what comes before the site; None if it is
            shared with auxiliary sites.
        threshold: The variance above which a unit is active.
    """

    site: str
    shape: tuple[int, ...]
    discrete: bool
    variance_of_mean: Tensor | None
    kl_of_dimensions: Tensor | None
    kl: Estimate | None
    threshold: float

    @property
    def num_dimensions(self) -> int:
        """``D``."""
        return torch.Size(self.shape).numel()

    @property
    def active(self) -> Tensor | None:
        """``D``, whether a unit is active: its variance is above the threshold."""
        return None if self.variance_of_mean is None else self.variance_of_mean > self.threshold

    @property
    def num_active(self) -> int:
        """How many units are active."""
        return 0 if self.active is None else int(self.active.sum())

    def name_of(self, dimension: int) -> str:
        """A dimension's name, such as ``z[3]`` or ``w[0, 2]``."""
        if not self.shape:
            return self.site
        index = torch.unravel_index(torch.tensor(dimension), self.shape)
        return f"{self.site}[{', '.join(str(int(i)) for i in index)}]"


def summarise(
    site: str, tables: LatentTables, kl: Tensor | None, *, threshold: float
) -> LatentSummary:
    """Average the tables of a site over draws and data.

    Args:
        site: The site's name.
        tables: Its tables.
        kl: ``N``, its KL for each datum, if that is known.
        threshold: The variance above which a unit is active.
    """
    mean, by_dimension = tables.mean, tables.kl_of_dimensions
    return LatentSummary(
        site=site,
        shape=tables.shape,
        discrete=tables.discrete,
        variance_of_mean=None if mean is None else _variance_of_mean(mean.double(), tables.mask),
        kl_of_dimensions=None if by_dimension is None else by_dimension.double().mean((0, 1)),
        kl=None if kl is None else Estimate.of_mean(kl),
        threshold=threshold,
    )


def _variance_of_mean(means: Tensor, mask: Tensor | None) -> Tensor:
    """Var_x(E_q[z | x]) from conditional means at several draws, ``K x N x D`` -> ``D``.

    A mean over K draws has the variance of the exact mean and, on top, 1/K of that of the draws.
    """
    weight = torch.ones_like(means[0]) if mask is None else mask.to(means)
    count = weight.sum(0)
    of_data = means.mean(0)
    centre = (weight * of_data).sum(0) / count
    between = (weight * (of_data - centre).square()).sum(0) / (count - 1)
    within = (weight * means.var(0)).sum(0) / count / len(means)
    return between - within
