"""The distributions of local latents, dimension by dimension: guide against prior."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.trace_messenger import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_lvm.pair import Program
from pyro_lvm.terms.compute import run_once
from pyro_lvm.terms.contraction import names
from pyro_lvm.terms.reader import TraceReader
from pyro_lvm.terms.record import Terms
from pyro_lvm.terms.sites import sample_table

__all__ = ["LatentTables", "latent_tables"]


@dataclass(frozen=True)
class LatentTables:
    """What a local latent's distributions say, per particle, datum and dimension.

    The ``D`` dimensions are those of the nested plates and of the event, flattened. All are given
    what comes before the site in the same particle: of q(z2 | z1, x) they are at the draw of z1.

    Attributes:
        shape: The sizes of the nested plates, then those of the event.
        discrete: Whether the latent is discrete.
        values: ``K x N x D``, the draws.
        mean: ``K x N x D``, E_q[z_d | x_i], the draws themselves where it is not known; None for a
            discrete latent.
        variance: ``K x N x D``, of dimensions that are independent; None if they are not.
        kl: ``K x N``, KL(q(z | x_i) || p(z)) in nats, in closed form where it is known, else
            log q - log p of the draw.
        kl_of_dimensions: ``K x N x D``, KL(q(z_d | x_i) || p(z_d)) of the marginals, likewise; None
            where these are not known.
        mask: ``N x D``, whether there is such a latent; None if there is no mask.
        point_mass: Whether the value is computed, and not drawn.
    """

    shape: tuple[int, ...]
    discrete: bool
    values: Tensor
    mean: Tensor | None
    variance: Tensor | None
    kl: Tensor
    kl_of_dimensions: Tensor | None
    mask: Tensor | None
    point_mass: bool

    @classmethod
    def joined(cls, parts: Sequence["LatentTables"]) -> "LatentTables":
        """The particles of several runs."""

        def together(name: str) -> Any:
            tables = [getattr(part, name) for part in parts]
            return None if tables[0] is None else torch.cat(tables)

        return replace(parts[0], **{name: together(name) for name in _PER_PARTICLE})


_MULTIVARIATE = (
    torch.distributions.MultivariateNormal,
    torch.distributions.LowRankMultivariateNormal,
)
_PER_PARTICLE = ("values", "mean", "variance", "kl", "kl_of_dimensions")


def latent_tables(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    max_plate_nesting: int,
    plate: str = "data",
    **kwargs: Any,
) -> tuple[Terms, dict[str, LatentTables]]:
    """Run a pair, and read the distributions of its local latents.

    Closed forms are taken where model and guide have their latents in one order: what a prior
    depends on has then been drawn before it in the guide. The guide is to enumerate nothing.

    Args:
        model: The model, or its story as far as the latents.
        guide: The guide.
        *args: The pair's arguments.
        num_particles: ``K``.
        max_plate_nesting: Dimensions that the plates of the pair use.
        plate: Name of the data plate.
        **kwargs: The pair's keyword arguments.

    Returns:
        The terms, and site -> tables for the local latents of the model, in the guide's order.
    """
    kept: list[tuple[Trace, Trace]] = []
    terms = run_once(
        model,
        guide,
        args,
        kwargs,
        num_particles=num_particles,
        plate=plate,
        max_plate_nesting=max_plate_nesting,
        variant=(_keeping_traces, {"kept": kept}),
    )
    reader = TraceReader(*kept[0], plate)
    latents = [n for n, s in reader.guide_sites.items() if reader.is_local(s)]
    latents = [n for n in latents if n in reader.model_sites]
    closed = latents == [n for n in reader.model_sites if n in latents]
    return terms, {name: _tables(reader, terms, name, closed=closed) for name in latents}


@cache
def _keeping_traces(base: Any) -> Any:
    return type(f"Kept{base.__name__}", (_KeepingTraces, base), {})


class _KeepingTraces:
    """Mixin for subclasses of ``pyro.infer.ELBO``: every trace passes through ``_get_trace``."""

    def __init__(self, *, kept: list[tuple[Trace, Trace]], **settings: Any) -> None:
        super().__init__(**settings)
        self.kept = kept

    def _get_trace(self, *args: Any) -> tuple[Trace, Trace]:
        traces = super()._get_trace(*args)  # type: ignore[misc]
        self.kept.append(traces)
        return traces


def _tables(reader: TraceReader, terms: Terms, name: str, *, closed: bool) -> LatentTables:
    q, p = reader.guide_sites[name], reader.model_sites[name]
    # a prior that depends on what the model sums out is no distribution that is at hand
    summed = not reader.summed_by_model.isdisjoint(names(p["packed"]["unscaled_log_prob"]))
    prior = None if summed else p["fn"]
    discrete, read = _is_discrete(q["fn"]), _Columns(reader, q)
    kl = terms.kl[name]
    if closed and prior is not None:
        known = _kl_or_none(q["fn"], prior)
        kl = kl if known is None else reader.table([reader.pack(q, known)])
    by_dimension = None if prior is None else _kl_of_marginals(q, prior, closed=closed)
    variance = _variance(q["fn"])
    return LatentTables(
        shape=tuple(sample_table(q, reader.plate).shape[2:]),
        discrete=discrete,
        values=read(q["value"]),
        mean=None if discrete else read(_mean(q)),
        variance=None if discrete or variance is None else read(variance),
        kl=kl,
        kl_of_dimensions=None if by_dimension is None else read.masked(by_dimension),
        mask=read.mask(),
        point_mass=isinstance(_innermost(q["fn"]), dist.Delta),
    )


class _Columns:
    """Tensors with the batch and event dimensions of a site, as ``K x N x D``."""

    def __init__(self, reader: TraceReader, site: dict) -> None:
        self.reader, self.site = reader, site

    def __call__(self, tensor: Tensor) -> Tensor:
        fn = self.site["fn"]
        shape = torch.broadcast_shapes(tensor.shape, fn.batch_shape + fn.event_shape)
        table = sample_table({**self.site, "value": tensor.expand(shape)}, self.reader.plate)
        table = table.reshape(*table.shape[:2], -1)
        return table.expand(self.reader.num_particles, *table.shape[1:])

    def masked(self, tensor: Tensor) -> Tensor:
        """Zero where there is no latent."""
        mask = self._mask()
        return self(tensor) if mask is None else self(tensor) * self(mask)

    def mask(self) -> Tensor | None:
        """``N x D``, the same for all particles."""
        mask = self._mask()
        return None if mask is None else self(mask)[0]

    def _mask(self) -> Tensor | None:
        mask = self.site["mask"]
        if mask is None or mask is True:
            return None
        mask = torch.as_tensor(mask, device=self.site["value"].device)
        return mask.reshape(*mask.shape, *[1] * self.site["fn"].event_dim)


def _kl_of_marginals(q: dict, prior: Any, *, closed: bool) -> Tensor | None:
    """KL of each dimension, in the shape of the value."""
    of_q, of_p = _marginals(q["fn"]), _marginals(prior)
    if of_q is None or of_p is None:
        return None
    known = _kl_or_none(of_q, of_p) if closed else None
    return of_q.log_prob(q["value"]) - of_p.log_prob(q["value"]) if known is None else known


def _kl_or_none(q: Any, p: Any) -> Tensor | None:
    """The closed form, of two normals of whatever covariance too; None if it is not known."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        of_q, of_p = _as_multivariate(q), _as_multivariate(p)
        return None if of_q is None or of_p is None else kl_divergence(of_q, of_p)


def _as_multivariate(fn: Any) -> Any:
    """A normal distribution of vectors as a multivariate one; None if it is none."""
    base = _innermost(fn)
    if fn.event_dim != 1:
        return None
    if isinstance(base, torch.distributions.Normal):
        return dist.MultivariateNormal(base.loc, scale_tril=base.scale.diag_embed())
    return base if isinstance(base, _MULTIVARIATE) else None


def _marginals(fn: Any) -> Any:
    """The marginal distributions of all dimensions, as one without event; None if not known."""
    base = _innermost(fn)
    if isinstance(base, _MULTIVARIATE):
        return dist.Normal(base.mean, base.variance.sqrt())
    if isinstance(base, torch.distributions.Dirichlet):
        total = base.concentration.sum(-1, keepdim=True)
        return dist.Beta(base.concentration, total - base.concentration)
    return _independent(fn)


def _independent(fn: Any) -> Any:
    """The distributions of dimensions that are independent, as one without event; else None."""
    base = _innermost(fn)
    return base if base.event_dim == 0 and not isinstance(base, dist.Delta) else None


def _innermost(fn: Any) -> Any:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _mean(site: dict) -> Tensor:
    """The mean where the distribution knows it, and it exists; else the draw."""
    try:
        mean = site["fn"].mean
    except (NotImplementedError, AttributeError):
        return site["value"]
    return torch.where(mean.isfinite(), mean, site["value"])


def _variance(fn: Any) -> Tensor | None:
    """The variances of dimensions that are independent, where the distribution knows them."""
    independent = _independent(fn)
    try:
        return None if independent is None else independent.variance
    except (NotImplementedError, AttributeError):
        return None


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:  # a distribution that does not know its support
        return False
