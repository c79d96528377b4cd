"""What latents say about data: I_q(x; z), and how far their aggregate is from the prior."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lvm.diagnostics.estimates import Estimate
from pyro_lvm.diagnostics.held import HeldPair

__all__ = ["Information", "information_of"]

_NUMBERS = 2**21  # of latents in one run of the guide: 16 MB in double precision
_LEAST_WIDTH = 64  # of the layers of a guide with a hierarchy, which grow with the draws


@dataclass(frozen=True)
class Information:
    """Estimates of I_q(x; z) and of KL(q(z) || p(z)), in nats, from ``M`` draws and ``N`` data.

    With draws z_i ~ q(z | x_i), one for each of ``M`` data, and all ``N`` data in the mixtures::

        lower:      I >= E mean_i log q(z_i | x_i) / ((1/N) sum_j q(z_i | x_j))
        upper:      I <= E mean_i log q(z_i | x_i) / ((1/(N-1)) sum_{j != i} q(z_i | x_j))
        kl_upper:   KL <= E mean_i log ((1/N) sum_j q(z_i | x_j)) / p(z_i)
        kl_lower:   KL >= E mean_i log ((1/(N-1)) sum_{j != i} q(z_i | x_j)) / p(z_i)

    where x is from the population that the data are from. The first is at most log N: it is the
    multi-sample bound (InfoNCE) with the best critic. If the data themselves
    are taken for the population, the first and the third estimate I and KL without such a bias:
    I is then that between the latent and the number of a datum (Hoffman and Johnson 2016).

    In a conditional story p(z) is the mixture of the priors of all data, likewise, and mean KL is
    I + KL(q(z) || p(z)) minus what the conditions say of z under the prior.

    The mean of log q(z_i | x_i) / p(z_i) is known better than from these draws, since it is the
    mean KL. What the draws are off by is taken from I and from KL(q(z) || p(z)), divided such that
    the error of the first is least (a control variate); both still add up to the mean KL.

    Standard errors are those of drawing other data and other latents (linear in the influence of
    each datum, as a draw and as a part of the mixtures).

    Attributes:
        lower: Of I, in expectation from below.
        upper: Of I, in expectation from above.
        kl_lower: Of KL(q(z) || p(z)), in expectation from below.
        kl_upper: Of KL(q(z) || p(z)), in expectation from above.
        num_data: ``N``.
        num_draws: ``M``.

    Reference:
        Poole et al. 2019, "On variational bounds of mutual information" (the multi-sample bounds
        where the conditional density is known, from below and, leave-one-out, from above); Hoffman
        and Johnson 2016, "ELBO surgery" (the information about a datum's number, its bound log N,
        and mean KL = I + KL(q(z) || p(z))).
    """

    lower: Estimate
    upper: Estimate
    kl_lower: Estimate
    kl_upper: Estimate
    num_data: int
    num_draws: int


def information_of(
    pair: HeldPair,
    draws: Mapping[str, Tensor],
    kl: Tensor,
    *,
    num_draws: int,
    chunk_size: int | None,
) -> Information | None:
    """Estimate the information by a table of log q(z_i | x_j), a few rows at a time.

    Args:
        pair: The pair.
        draws: Site -> ``K x N x ...``, draws of the guide; the first particle is taken.
        kl: ``N``, KL(q(z | x_i) || p(z)) of each datum.
        num_draws: ``M``, at most; so many data are chosen at random if there are more.
        chunk_size: Rows in one run of the guide; what suits the data if None.

    Returns:
        The estimates; None if a latent is computed from auxiliary ones in another way for each
        datum, so that its density is not known.
    """
    num_data = pair.structure.num_data
    index = _some(num_data, num_draws, like=next(iter(draws.values())))
    rows = {name: values[0, index] for name, values in draws.items()}
    width = sum(values[0].numel() for values in rows.values())
    if chunk_size is None:
        chunk_size = max(1, _NUMBERS // (num_data * max(width, _LEAST_WIDTH)))
    posterior, others, prior = _Mixture(num_data), _Mixture(num_data - 1), _Mixture(num_data)
    own_q, own_p = [], []
    given = {n: v for n, v in rows.items() if n not in pair.structure.point_masses}
    for part in torch.arange(len(index)).split(chunk_size):
        values = {
            n: v[part].unsqueeze(1).expand(-1, num_data, *v.shape[1:]) for n, v in given.items()
        }
        terms = pair.at(values)
        if not all(_same(terms.samples[n], rows[n][part]) for n in rows.keys() - given.keys()):
            return None
        log_q, log_p = _sum(terms.log_guide), _sum(terms.log_prior)
        mine = index[part].unsqueeze(1)
        own_q.append(log_q.gather(1, mine).squeeze(1).double())
        own_p.append(log_p.gather(1, mine).squeeze(1).double())
        posterior.add(log_q)
        others.add(log_q.scatter(1, mine, -math.inf))
        prior.add(log_p)
    own, own_prior = torch.cat(own_q), torch.cat(own_p)

    def information(mixture: _Mixture) -> _Mean:
        return _Mean.of(own - mixture.log_mean, -mixture.shares, index)

    def divergence(mixture: _Mixture) -> _Mean:
        return _Mean.of(mixture.log_mean - prior.log_mean, mixture.shares - prior.shares, index)

    even = torch.ones_like(kl)
    error = _Mean.of(own - own_prior, even, index).plus(
        -1.0, _Mean.of(kl, even, torch.arange(num_data, device=kl.device))
    )
    factor = information(posterior).best_factor(error)
    return Information(
        lower=information(posterior).plus(factor, error).estimate(),
        upper=information(others).plus(factor, error).estimate(),
        kl_lower=divergence(others).plus(-1.0 - factor, error).estimate(),
        kl_upper=divergence(posterior).plus(-1.0 - factor, error).estimate(),
        num_data=num_data,
        num_draws=len(index),
    )


class _Mixture:
    """Log-densities of a mixture at draws that come in parts, in double precision.

    Args:
        size: How many components have the same weight; others have a log-density of -inf.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._log_means: list[Tensor] = []
        self._shares: list[Tensor] = []

    @property
    def log_mean(self) -> Tensor:
        """``M``, the log-density at each draw."""
        return torch.cat(self._log_means)

    @property
    def shares(self) -> Tensor:
        """``N``, the share of each datum in the density, averaged over draws; 1 on average."""
        total = torch.stack(self._shares).sum(0)
        return total * (len(total) / len(self.log_mean))

    def add(self, table: Tensor) -> None:
        """Add log-densities of components, ``part x N``."""
        table = table.double()
        self._log_means.append(table.logsumexp(1) - math.log(self.size))
        # no component has a share where none has a density
        self._shares.append(table.softmax(1).nan_to_num(0.0).sum(0))


@dataclass(frozen=True, eq=False)
class _Mean:
    """A mean over draws, and the influence of each datum on it, ``N``."""

    value: float
    influence: Tensor

    @classmethod
    def of(cls, rows: Tensor, shares: Tensor, index: Tensor) -> "_Mean":
        """Of values of draws, ``M``.

        Args:
            rows: The values.
            shares: ``N``, how much each datum takes part in them beside its own draw.
            index: ``M``, whose draw it is.
        """
        influence = (shares - shares.mean()) / len(shares)
        influence = influence.index_add(0, index, (rows - rows.mean()) / len(rows))
        return cls(float(rows.mean()), influence)

    def plus(self, factor: float, other: "_Mean") -> "_Mean":
        """The sum with another mean times a factor."""
        return _Mean(self.value + factor * other.value, self.influence + factor * other.influence)

    def best_factor(self, other: "_Mean") -> float:
        """The factor with which the sum has the least error, if the other's mean is 0."""
        size = float(other.influence.square().sum())
        return -float(self.influence @ other.influence) / size if size > 0 else 0.0

    def estimate(self) -> Estimate:
        """The mean with its standard error."""
        return Estimate(self.value, float(self.influence.square().sum().sqrt()))


def _some(size: int, most: int, *, like: Tensor) -> Tensor:
    """Indices of all data, or of so many of them at random."""
    if size <= most:
        return torch.arange(size, device=like.device)
    return torch.randperm(size, device=like.device)[:most]


def _sum(tables: Mapping[str, Tensor]) -> Tensor:
    first, *others = tables.values()
    return sum(others, first)


def _same(computed: Tensor, drawn: Tensor) -> bool:
    """Whether all data compute the same from a draw, ``part x N x ...`` against ``part x ...``."""
    drawn = drawn.unsqueeze(1)
    if not drawn.is_floating_point():
        return bool((computed == drawn).all())
    precision = torch.finfo(drawn.dtype).eps ** 0.5
    return torch.allclose(computed, drawn.expand_as(computed), rtol=precision, atol=precision)
