"""Reads the traces of a pair: sorts the sites, and contracts their log-probabilities."""

from collections.abc import Iterable
from functools import cached_property

import torch
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.poutine.trace_messenger import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_lvm.pair import data_plate
from pyro_lvm.terms.contraction import Factor, expectation, named, names, sum_out, sum_to
from pyro_lvm.terms.record import Terms
from pyro_lvm.terms.sites import PARTICLES, depends_on_enumeration, observed_table, sample_table

__all__ = ["TraceReader"]


class TraceReader:
    """Sorts the sites of a pair of traces and contracts their log-probabilities."""

    def __init__(self, model_trace: Trace, guide_trace: Trace, plate: str) -> None:
        if not hasattr(guide_trace, "plate_to_symbol"):  # TraceEnum_ELBO has packed its own already
            guide_trace.pack_tensors()
        if not hasattr(model_trace, "plate_to_symbol"):
            model_trace.pack_tensors(guide_trace.plate_to_symbol)
        self.plate = plate
        self.model_sites = _samples(model_trace)
        self.guide_sites = _samples(guide_trace)
        self.symbols = {**guide_trace.plate_to_symbol, **model_trace.plate_to_symbol}
        frames = {f.name: f for site in self._all_sites() for f in site["cond_indep_stack"]}
        data = data_plate((model_trace, guide_trace), plate)
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
            observed={n: self._data_of(s) for n, s in self._observed().items()},
            masks=self._masks(),
            discrete={n: _is_discrete(s) for n, s in self._observed().items()},
            plate_scale=self.plate_scale,
            has_globals=any(not self.is_local(s) for s in self._all_sites()),
        )

    def log_prior(self) -> dict[str, Tensor]:
        """Site -> ``K x N``, for the local latents that the model's trace has come to."""
        return self._model_terms()[0]

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

    def _data_of(self, site: dict) -> Tensor:
        table, mask = self._rows_of(site)[0], observed_table(site, self.plate)
        if mask is not None:
            table = torch.where(mask, table, torch.zeros_like(table))
        return table.expand(self.num_data, *table.shape[1:])  # all data may share one value

    def _masks(self) -> dict[str, Tensor]:
        found = {n: observed_table(s, self.plate) for n, s in self._observed().items()}
        return {
            n: mask.expand(self.num_data, *mask.shape[1:])
            for n, mask in found.items()
            if mask is not None
        }

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
