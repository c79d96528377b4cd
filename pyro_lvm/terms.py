"""(model, guide) -> terms: the seam, and the one place that reads traces.

Run the guide, replay the model on it, and sort the sites relative to the data plate; what comes
out are log-probabilities per datum. With ``K`` particles, ``N`` data, local latents ``z``, global
latents ``g`` and observations ``x``::

    log p(x_i, z_i | g) = log_likelihood_i + sum_s log_prior[s]_i
    log w_i             = log p(x_i, z_i | g) - sum_s log_guide[s]_i

Sites that the *model* enumerates are summed out exactly, per datum, before anything else sees the
terms: the prior of a latent that depends on one is its marginal prior, and the likelihood is that
given the sampled latents. Over sites that the *guide* enumerates the terms are exact expectations,
while ``log_weight`` sums them out too: for y enumerated and z drawn from q(z | y, x) it is
log sum_y p(x, y, z_y) / q(z_y | y, x), whose exponential has the mean p(x).

The plate's scale (data in all / data in the minibatch) stays beside the terms. A user's own
``poutine.scale`` on a site is part of the term, and so is the scale of a plate inside the data's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.ops import packed
from pyro.poutine import unwrap
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_lvm.contraction import Factor, expectation, named, names, sum_out, sum_to
from pyro_lvm.pair import Program, inspect_pair, no_guide

__all__ = [
    "PARTICLES",
    "Terms",
    "compute_terms",
    "depends_on_enumeration",
    "sample_table",
    "terms_from_traces",
]

PARTICLES = "num_particles_vectorized"  # Pyro's name for the plate over particles


@dataclass(frozen=True)
class Terms:
    """The log-probabilities of a pair, per particle and datum, in nats.

    Attributes:
        log_likelihood: ``K x N``, log p(x_i | z_i, g), over all observed sites of a datum.
        log_prior: Site -> ``K x N``, one entry per local latent of the guide.
        log_guide: Site -> ``K x N``, one entry per local site of the guide, auxiliary ones too.
        log_weight: ``K x N``, log p(x_i, z_i | g) / q(z_i | x_i, g), enumerated sites summed out.
        kl: Site -> ``K x N``, log q - log p of each local site of the guide, or the closed form of
            its expectation if that was asked for and is known.
        global_log_prior: ``K``, all sites of the model outside the plate.
        global_log_guide: ``K``, all sites of the guide outside the plate.
        global_kl: ``K``, ``global_log_guide - global_log_prior``, or closed forms likewise.
        samples: Site -> ``K x N x (nested plates) x event``; local latents without enumeration.
        global_samples: Site -> ``K x (plates) x event``.
        observed: Site -> ``N x (nested plates) x event``, the observations in the plate.
        discrete: Site -> whether the observations have a density against the counting measure.
        plate_scale: Data in all / data in this run, never multiplied into the terms.
        has_globals: Whether there are sites outside the plate.
    """

    log_likelihood: Tensor
    log_prior: dict[str, Tensor]
    log_guide: dict[str, Tensor]
    log_weight: Tensor
    kl: dict[str, Tensor]
    global_log_prior: Tensor
    global_log_guide: Tensor
    global_kl: Tensor
    samples: dict[str, Tensor]
    global_samples: dict[str, Tensor]
    observed: dict[str, Tensor]
    discrete: dict[str, bool]
    plate_scale: float
    has_globals: bool

    @property
    def num_particles(self) -> int:
        """``K``."""
        return self.log_likelihood.shape[0]

    @property
    def num_data(self) -> int:
        """``N``, the data of this run."""
        return self.log_likelihood.shape[1]

    @property
    def size(self) -> float:
        """The number of all data: ``plate_scale * N``."""
        return self.plate_scale * self.num_data


def compute_terms(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_particles: int = 1,
    plate: str = "data",
    max_plate_nesting: int | None = None,
    **kwargs: Any,
) -> Terms:
    """Run a pair and return its terms.

    With more than one particle the pair runs once, inside an outermost vectorised plate, so that
    its tensors get one more dimension on the left of those of the plates.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise; None for one that samples nothing.
        *args: The pair's arguments.
        num_particles: ``K``.
        plate: Name of the data plate.
        max_plate_nesting: Dimensions that the plates use; found by one more run if None.
        **kwargs: The pair's keyword arguments.

    Returns:
        The terms.

    Raises:
        ValueError: If the pair is refused by `inspect_pair`, or if an enumerated site has no value
            per datum.
    """
    guide = no_guide if guide is None else guide
    if max_plate_nesting is None:
        max_plate_nesting = inspect_pair(model, guide, args, kwargs, plate=plate).max_plate_nesting
    # a guide that is a messenger makes its own traces, which Pyro's enumeration can't wrap
    host_class = Trace_ELBO if isinstance(unwrap(guide), Messenger) else TraceEnum_ELBO
    host = host_class(
        num_particles=num_particles,
        max_plate_nesting=max_plate_nesting,
        vectorize_particles=num_particles > 1,
        strict_enumeration_warning=False,
    )
    model_trace, guide_trace = next(iter(host._get_traces(model, guide, args, kwargs)))
    return terms_from_traces(model_trace, guide_trace, plate=plate)


def terms_from_traces(
    model_trace: Trace, guide_trace: Trace, *, plate: str = "data", analytic: bool = False
) -> Terms:
    """Read the terms of traces that a Pyro objective has drawn.

    Args:
        model_trace: The trace of the model, replayed on the guide's, with log-probabilities.
        guide_trace: The trace of the guide.
        plate: Name of the data plate, which must be in the traces.
        analytic: Whether ``kl`` has closed forms where Pyro knows them. They are expectations given
            what comes before a site, right under the mean-field condition.

    Returns:
        The terms.

    Raises:
        ValueError: If an enumerated site has no value per datum.
    """
    return _Reader(model_trace, guide_trace, plate).terms(analytic)


def sample_table(site: dict, plate: str) -> Tensor:
    """A site's value as ``K x N x (nested plates, from the left) x event``.

    Dimensions that no plate of the site uses have size 1 and are dropped; ``K`` is 1 without a
    plate over particles, and ``N`` is left out for a site outside the data plate.
    """
    value, event_dim = site["value"], site["fn"].event_dim
    frames = {f.name: f.dim for f in site["cond_indep_stack"] if f.vectorized}
    nested = sorted(dim for name, dim in frames.items() if name not in (plate, PARTICLES))
    dims = [d for d in (frames.get(PARTICLES), frames.get(plate), *nested) if d is not None]
    rank = max(-min(dims, default=0), value.dim() - event_dim)
    event = value.shape[value.dim() - event_dim :]
    value = value.reshape((1,) * (rank + event_dim - value.dim()) + value.shape)
    unused = [d for d in range(-rank, 0) if d not in dims]
    order = [d - event_dim for d in (*dims, *unused)] + list(range(-event_dim, 0))
    table = value.permute(order).reshape([value.shape[d - event_dim] for d in dims] + [*event])
    return table if PARTICLES in frames else table.unsqueeze(0)


def depends_on_enumeration(site: dict) -> bool:
    """Whether a site's value has dimensions beside those of its plates."""
    plates = max((-f.dim for f in site["cond_indep_stack"] if f.vectorized), default=0)
    batch = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return any(size > 1 for size in batch[: len(batch) - plates])


class _Reader:
    """Sorts the sites of a pair of traces and contracts their log-probabilities."""

    def __init__(self, model_trace: Trace, guide_trace: Trace, plate: str) -> None:
        if not hasattr(guide_trace, "plate_to_symbol"):  # TraceEnum_ELBO has packed its own already
            guide_trace.pack_tensors()
            model_trace.pack_tensors(guide_trace.plate_to_symbol)
        self.plate = plate
        self.model_sites = _samples(model_trace)
        self.guide_sites = _samples(guide_trace)
        self.symbols = {**guide_trace.plate_to_symbol, **model_trace.plate_to_symbol}
        frames = {f.name: f for site in self._all_sites() for f in site["cond_indep_stack"]}
        data = frames[plate]
        self.num_data = int(data.size)
        self.num_particles = int(frames[PARTICLES].size) if PARTICLES in frames else 1
        self.plate_scale = (data.full_size or data.size) / data.size
        self.summed_by_model = self._enumerated(self.model_sites, without=self.guide_sites)
        self.summed_by_guide = self._enumerated(self.guide_sites)

    def terms(self, analytic: bool) -> Terms:
        """Everything at once; the heavy parts are shared."""
        local = {n: s for n, s in self.guide_sites.items() if self.is_local(s)}
        log_guide = {n: self.table([self.log_prob(s)]) for n, s in local.items()}
        log_prior, log_likelihood = self._model_terms()
        if self.summed_by_guide:
            log_weight = self._weight_over_guide_sums()
        else:
            log_weight = log_likelihood + sum(log_prior.values()) - sum(log_guide.values())
        global_log_prior = self._global(self.model_sites)
        global_log_guide = self._global(self.guide_sites)
        kl = {n: log_q - log_prior.get(n, 0.0) for n, log_q in log_guide.items()}
        global_kl = global_log_guide - global_log_prior
        if analytic:
            kl, global_kl = self._with_closed_forms(kl, global_kl)
        return Terms(
            log_likelihood=log_likelihood,
            log_prior=log_prior,
            log_guide=log_guide,
            log_weight=log_weight,
            kl=kl,
            global_log_prior=global_log_prior,
            global_log_guide=global_log_guide,
            global_kl=global_kl,
            samples=self._samples(local),
            global_samples=self._global_samples(),
            observed={n: self._rows_of(s)[0] for n, s in self._observed().items()},
            discrete={n: _is_discrete(s) for n, s in self._observed().items()},
            plate_scale=self.plate_scale,
            has_globals=any(not self.is_local(s) for s in self._all_sites()),
        )

    def is_local(self, site: dict) -> bool:
        """Whether a site lies in the data plate."""
        return any(frame.name == self.plate for frame in site["cond_indep_stack"])

    def pack(self, site: dict, log_prob: Tensor) -> Tensor:
        """A log-probability of the site, scaled and masked as the user has it, packed."""
        value = scale_and_mask(log_prob, self._user_scale(site), site["mask"])
        return packed.pack(value, site["infer"]["_dim_to_symbol"])

    def log_prob(self, site: dict) -> Tensor:
        """The packed log-probability of a site."""
        return self.pack(site, site["unscaled_log_prob"])

    def table(self, log_probs: Iterable[Tensor]) -> Tensor:
        """The sum of packed log-probabilities, guide sums in expectation, as ``K x N``."""
        total = self._zeros()
        for term in log_probs:
            total = total + self._to_rows(self._expectation(term))
        return total

    def _with_closed_forms(
        self, kl: dict[str, Tensor], global_kl: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        for name, site in self.guide_sites.items():
            if name not in self.model_sites:
                continue
            try:
                closed_form = kl_divergence(site["fn"], self.model_sites[name]["fn"])
            except NotImplementedError:
                continue
            packed_kl = self.pack(site, closed_form)
            if self.is_local(site):
                kl[name] = self.table([packed_kl])
            else:
                drawn = [self.log_prob(site), packed.neg(self.log_prob(self.model_sites[name]))]
                global_kl = global_kl + self._per_particle([packed_kl])
                global_kl = global_kl - self._per_particle(drawn)
        return kl, global_kl

    # the model's side: sums over sites that the model enumerates

    def _model_terms(self) -> tuple[dict[str, Tensor], Tensor]:
        """``log_prior`` and ``log_likelihood``, by the chain rule where sums entangle them."""
        sites = {n: s for n, s in self.model_sites.items() if self.is_local(s)}
        entangled = {n: self._factor(s) for n, s in sites.items() if self._is_entangled(s)}
        plain = {n: self.log_prob(s) for n, s in sites.items() if n not in entangled}
        log_prior, joint = {}, self._zeros()
        given = [f for n, f in entangled.items() if n in self._sums()]
        for name in (n for n in sites if n in self.guide_sites):
            if name in plain:
                log_prior[name] = self.table([plain.pop(name)])
            else:  # log p(z_j | z_<j) = log p(z_<=j) - log p(z_<j), each with its sums taken
                given.append(entangled[name])
                before, joint = joint, self.table(sum_out(given, self.summed_by_model))
                log_prior[name] = joint - before
        everything = sum_out(list(entangled.values()), self.summed_by_model)
        return log_prior, self.table([*plain.values(), *everything]) - joint

    def _is_entangled(self, site: dict) -> bool:
        return not self.summed_by_model.isdisjoint(names(site["packed"]["unscaled_log_prob"]))

    def _sums(self) -> set[str]:
        return {
            n
            for n, s in self.model_sites.items()
            if s["infer"].get("_enumerate_symbol") in self.summed_by_model
        }

    # the guide's side: expectations, and sums in the importance weights

    def _expectation(self, term: Tensor) -> Tensor:
        """E_q[term] over the sites that the guide enumerates and the term depends on."""
        probabilities: dict[str, Tensor] = {}
        while wanted := self._guide_sums_in(term, *probabilities.values()) - set(probabilities):
            symbol = min(wanted)  # a site's probability brings in those that it depends on
            probabilities[symbol] = self._guide_probability(symbol)
        return expectation(term, probabilities)

    def _guide_sums_in(self, *terms: Tensor) -> set[str]:
        return self.summed_by_guide.intersection("".join(names(t) for t in terms))

    def _guide_probability(self, symbol: str) -> Tensor:
        for site in self.guide_sites.values():
            if site["infer"].get("_enumerate_symbol") == symbol:
                log_prob = site["packed"]["unscaled_log_prob"]
                return named(log_prob.exp(), names(log_prob))
        raise KeyError(symbol)

    def _weight_over_guide_sums(self) -> Tensor:
        """Log sum over enumerated sites of p(x, z) / q(sampled z): linear, hence unbiased."""
        sums = self.summed_by_model | self.summed_by_guide
        numerator = [s for s in self.model_sites.values() if self.is_local(s)]
        denominator = [
            s
            for s in self.guide_sites.values()
            if self.is_local(s) and "_enumerate_symbol" not in s["infer"]
        ]
        total, factors = self._zeros(), []
        for site, sign in [(s, 1) for s in numerator] + [(s, -1) for s in denominator]:
            if sums.isdisjoint(names(site["packed"]["unscaled_log_prob"])):
                total = total + sign * self._to_rows(self.log_prob(site))
            else:
                factor = self._factor(site)
                signed = factor.log_prob if sign > 0 else packed.neg(factor.log_prob)
                factors.append(factor._replace(log_prob=signed))
        for term in sum_out(factors, sums):
            total = total + self._to_rows(term)
        return total

    # reading single sites

    def _factor(self, site: dict) -> Factor:
        log_prob = site["packed"]["unscaled_log_prob"]
        # the mask of an enumerated site does not take its prior away: the sum would not be one
        is_sum = site["infer"].get("_enumerate_symbol") in self.summed_by_model
        mask = None if is_sum else site["packed"]["mask"]
        ordinal = frozenset(self.symbols[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        return Factor(packed.scale_and_mask(log_prob, mask=mask), self._user_scale(site), ordinal)

    def _user_scale(self, site: dict) -> float | Tensor:
        # an objective that weighs a site leaves the user's own scale beside it
        scale = site.get("unweighted_scale", site["scale"])
        return scale / self.plate_scale if self.is_local(site) else scale

    def _enumerated(self, sites: dict[str, dict], without: Iterable[str] = ()) -> set[str]:
        found = set()
        for name, site in sites.items():
            if site["infer"].get("_enumerate_symbol") is None or name in without:
                if site["infer"].get("_enum_total") is not None:
                    raise ValueError(
                        f"Expected sites enumerated in parallel; got a sequential one, '{name}'. "
                        f"Mark it infer={{'enumerate': 'parallel'}}."
                    )
                continue
            if not self.is_local(site):
                raise ValueError(
                    f"Expected enumerated sites inside plate '{self.plate}'; got '{name}' outside: "
                    f"all data share it, so there is no value per datum. Sample it in the guide."
                )
            if site["infer"].get("num_samples") is not None:
                raise ValueError(
                    f"Expected site '{name}' to be enumerated exactly; got num_samples="
                    f"{site['infer']['num_samples']}. Remove it, or use num_particles."
                )
            found.add(site["infer"]["_enumerate_symbol"])
        return found

    def _global(self, sites: dict[str, dict]) -> Tensor:
        return self._per_particle(
            [self.log_prob(site) for site in sites.values() if not self.is_local(site)]
        )

    def _per_particle(self, log_probs: Iterable[Tensor]) -> Tensor:
        """The sum of packed log-probabilities over all but the particles, ``K``."""
        total = self._zeros()[:, 0]
        for term in log_probs:
            total = total + sum_to(term, {self.symbols.get(PARTICLES)})
        return total

    def _to_rows(self, term: Tensor) -> Tensor:
        """Sum out the nested plates; ``K x N``."""
        rows = [self.symbols.get(PARTICLES), self.symbols[self.plate]]
        kept = [s for s in rows if s is not None and s in names(term)]
        value = sum_to(term, set(kept))
        order = [names(value).index(s) for s in kept]
        shape = [
            size if symbol in kept else 1
            for symbol, size in zip(rows, (self.num_particles, self.num_data), strict=True)
        ]
        table = value.permute(order).reshape(shape)
        return table.expand(self.num_particles, self.num_data)

    def _samples(self, local: dict[str, dict]) -> dict[str, Tensor]:
        return {
            name: self._rows_of(site)
            for name, site in local.items()
            if not depends_on_enumeration(site)
        }

    def _rows_of(self, site: dict) -> Tensor:
        table = sample_table(site, self.plate)
        return table.expand(self.num_particles, *table.shape[1:])

    def _global_samples(self) -> dict[str, Tensor]:
        return {
            name: self._rows_of(site)
            for name, site in self.guide_sites.items()
            if not self.is_local(site)
        }

    def _observed(self) -> dict[str, dict]:
        return {
            name: site
            for name, site in self.model_sites.items()
            if site["is_observed"]
            and self.is_local(site)
            and not site["infer"].get("_deterministic")
            and site["value"].numel() > 0
        }

    @cached_property
    def _like(self) -> Tensor:
        return next(s["unscaled_log_prob"] for s in self._all_sites())

    def _zeros(self) -> Tensor:
        like = self._like
        return torch.zeros(self.num_particles, self.num_data, dtype=like.dtype, device=like.device)

    def _all_sites(self) -> list[dict]:
        return [*self.model_sites.values(), *self.guide_sites.values()]


def _samples(trace: Trace) -> dict[str, dict]:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def _is_discrete(site: dict) -> bool:
    try:
        return bool(site["fn"].support.is_discrete)
    except NotImplementedError:  # a distribution that does not know its support
        return not site["value"].is_floating_point()
