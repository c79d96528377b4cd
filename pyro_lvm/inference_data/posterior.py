"""The posterior that a guide stands for, as ArviZ's groups."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_lvm.checks import check_count
from pyro_lvm.inference_data.containers import Arrays, assemble, to_numpy
from pyro_lvm.marginal import LogMarginal, exact, importance_sampling
from pyro_lvm.marginal.log_marginal import Observations
from pyro_lvm.pair import (
    PairStructure,
    Program,
    device_of,
    hold_subsamples,
    inspect_pair,
    no_guide,
    unmasked,
)
from pyro_lvm.terms import PARTICLES, Terms, sample_table, terms_from_traces

__all__ = ["to_arviz"]


@torch.no_grad()
def to_arviz(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int = 200,
    score: LogMarginal | None = None,
    num_weights: int = 500,
    predictive: bool = True,
    plate: str = "data",
    **kwargs: Any,
) -> Any:
    """The posterior that a guide stands for, with what ArviZ needs to check and compare it.

    The groups, with one chain of ``num_samples`` draws and the data along the dimension ``plate``:

    * ``posterior``: local and global latents, drawn from the guide; sites that the model enumerates
      from their exact posterior given these.
    * ``prior``, ``prior_predictive``: latents and observed sites of the unconditioned model.
    * ``posterior_predictive``: the observed sites, drawn anew given the posterior's draws.
    * ``observed_data``, ``constant_data``: what the model observes, and the other tensors among its
      arguments that have one entry per datum.
    * ``log_likelihood``: log p(x_i | g) **marginal over the local latents**, in nats, per datum.
      Given the local latents it would be a density of x_i under a posterior that has seen x_i,
      which leave-one-out cross-validation can't use. Without global latents it is log p(x_i) given
      the fitted parameters, the same for all draws: `compare` takes it as it is, while ArviZ's own
      ``loo`` is for pairs with global latents.
    * ``sample_stats``: per draw and datum the log importance weight.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise; None if it samples nothing.
        *args: The pair's arguments.
        num_samples: Draws, at least 2.
        score: log p(x_i) of these data if it is known already; only without global latents.
        num_weights: Importance samples per datum (and per draw of the global latents) where
            log p(x_i) has to be estimated.
        predictive: Whether to draw the two predictive groups, the largest ones.
        plate: Name of the data plate.
        **kwargs: The pair's keyword arguments.

    Returns:
        An ``arviz.InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (ArviZ 1).

    Raises:
        ValueError: If the pair does not fit, or the score is of other data.
    """
    check_count("num_samples", num_samples)
    check_count("num_weights", num_weights)
    if num_samples < 2:
        raise ValueError(f"Expected num_samples >= 2; got {num_samples}.")
    guide = no_guide if guide is None else guide
    structure = inspect_pair(model, guide, args, kwargs, plate=plate)
    run = _Draws(model, guide, args, kwargs, num_samples, structure)
    terms = run.terms()
    _check_score(score, terms, structure)
    groups: dict[str, Arrays] = {
        "posterior": run.latents(terms),
        "log_likelihood": {"marginal": run.log_likelihood(terms, score, num_weights)},
        "sample_stats": {
            "log_weight": (("chain", "draw", plate), to_numpy(terms.log_weight)[None])
        },
        "observed_data": _rows(_with_gaps(terms), plate),
        "constant_data": _constants(model, args, kwargs, terms, plate),
    }
    groups["prior"], prior_predictive = run.prior()
    if predictive:
        groups["prior_predictive"] = prior_predictive
        groups["posterior_predictive"] = run.predictive()
    observations = Observations.of(terms)
    groups["observed_data"]["checksum"] = ((plate,), to_numpy(observations.checksum))
    attributes = {
        "base_measure": observations.base_measure,
        "values_per_datum": observations.values_per_datum,
    }
    return assemble(groups, {"observed_data": attributes})


def _check_score(score: LogMarginal | None, terms: Terms, structure: PairStructure) -> None:
    if score is None:
        return
    if structure.global_latents:
        raise ValueError(
            f"Expected no score for a pair with global latents {list(structure.global_latents)}, "
            f"which needs one for each of their draws; got one."
        )
    if not score.observations.same_data(Observations.of(terms)):
        raise ValueError("Expected the score of these data; got one of other data.")


class _Draws:
    """One set of posterior draws of a pair, from which all groups are made."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: dict,
        num_samples: int,
        structure: PairStructure,
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self.num_samples, self.structure = num_samples, structure
        self.plate = str(structure.plate)
        self.model, self.guide = model, guide
        if structure.subsampled:
            self.model, self.guide = hold_subsamples(model, guide, args, kwargs)
        self.prior_trace = self._trace(poutine.uncondition(self.model))
        # run without enumeration: what the guide enumerates is drawn
        self.guide_trace = self._trace(self.guide)
        self.model_trace = self._trace(self.model, self._latent_trace())

    def terms(self) -> Terms:
        """The terms of the draws: those of the guide's own run, the model's sums taken."""
        model = EnumMessenger(first_available_dim=self._first_free_dim)(
            self._vectorized(self.model)
        )
        model_trace = self._run(poutine.replay(model, trace=self.guide_trace))
        model_trace, guide_trace = map(prune_subsample_sites, (model_trace, self.guide_trace))
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        return terms_from_traces(model_trace, guide_trace, plate=self.plate)

    def latents(self, terms: Terms) -> Arrays:
        """Latents of guide and model, with the draws along ``draw``."""
        arrays = {name: self._local(name, value) for name, value in terms.samples.items()}
        for name, value in terms.global_samples.items():
            arrays[name] = (("chain", "draw", *_dims(name, value, 1)), to_numpy(value)[None])
        for name in self.structure.model_enumerated:
            arrays[name] = self._local(name, self._values(self.model_trace, name))
        return arrays

    def predictive(self) -> Arrays:
        """Observed sites drawn anew, given the latents."""
        latents = self.model_trace.copy()
        for name in [
            n for n, s in latents.nodes.items() if s["type"] == "sample" and s["is_observed"]
        ]:
            latents.remove_node(name)
        trace = self._trace(poutine.uncondition(self.model), latents)
        return {n: self._local(n, self._values(trace, n)) for n in self._predicted()}

    def prior(self) -> tuple[Arrays, Arrays]:
        """Local latents and observed sites of the unconditioned model."""
        trace = self.prior_trace
        latents: Arrays = {}
        for name in (*self.structure.local_latents, *self.structure.model_enumerated):
            latents[name] = self._local(name, self._values(trace, name))
        for name in self.structure.global_latents:
            value = self._values(trace, name)
            latents[name] = (("chain", "draw", *_dims(name, value, 1)), to_numpy(value)[None])
        return latents, {n: self._local(n, self._values(trace, n)) for n in self._predicted()}

    def log_likelihood(
        self, terms: Terms, score: LogMarginal | None, num_weights: int
    ) -> tuple[tuple[str, ...], np.ndarray]:
        """Log p(x_i | g), marginal over local latents, one row per draw of the globals."""
        structure = self.structure
        sampled = set(terms.log_guide)
        if structure.global_latents and not sampled:
            rows = terms.log_weight  # everything local is summed out: exact for each draw
        elif structure.global_latents:
            rows = torch.stack(
                [self._given_globals(k, num_weights) for k in range(self.num_samples)]
            )
        else:
            score = score or self._score(sampled, num_weights)
            rows = score.log_prob.expand(self.num_samples, -1)
        return ("chain", "draw", self.plate), to_numpy(rows)[None]

    def _score(self, sampled: set[str], num_weights: int) -> LogMarginal:
        pair, settings = (self.model, self.guide, *self.args), {"plate": self.plate, **self.kwargs}
        if sampled <= set(self.structure.guide_enumerated):
            return exact(*pair, **settings)
        return importance_sampling(*pair, num_samples=num_weights, **settings)

    def _given_globals(self, draw: int, num_weights: int) -> Tensor:
        names = self.structure.global_latents
        sites = [self.guide_trace.nodes[name] for name in names]
        values = {n: self._one_draw(s, draw) for n, s in zip(names, sites, strict=True)}
        model = poutine.condition(self.model, data=values)
        guide = poutine.block(poutine.condition(self.guide, data=values), hide=list(names))
        return importance_sampling(
            model, guide, *self.args, num_samples=num_weights, plate=self.plate, **self.kwargs
        ).log_prob

    def _predicted(self) -> list[str]:
        deterministic = {
            n for n, s in self.model_trace.nodes.items() if s.get("infer", {}).get("_deterministic")
        }
        return [
            n
            for n in self.structure.observed
            if n not in deterministic and self.model_trace.nodes[n]["value"].numel() > 0
        ]

    def _one_draw(self, site: dict, draw: int) -> Tensor:
        """The value that a global site would have had in a run without particles."""
        value, event_dim = site["value"], site["fn"].event_dim
        rank = value.dim() - event_dim
        if rank <= self.structure.max_plate_nesting:  # all draws share it
            return value
        frames = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES]
        plates = -min((f.dim for f in frames), default=0)
        row = value[draw if len(value) > 1 else 0]
        return row.reshape(row.shape[rank - 1 - plates :])

    def _latent_trace(self) -> Any:
        """The guide's trace, with what the model enumerates drawn from its exact posterior."""
        names = self.structure.model_enumerated
        if not names:
            return self.guide_trace
        latents = prune_subsample_sites(self.guide_trace)
        values = {n: s["value"] for n, s in latents.nodes.items() if s["type"] == "sample"}
        # conditioned, not replayed: of replayed sites infer_discrete would not see what they
        # depend on
        story = poutine.condition(self._vectorized(unmasked(self.model, names)), data=values)
        drawn = self._run(infer_discrete(story, first_available_dim=self._first_free_dim))
        for name in names:
            latents.add_node(name, **drawn.nodes[name])
        return latents

    def _trace(self, program: Program, latents: Any = None) -> Any:
        """A run of all draws at once, replayed on the latents of a trace."""
        program = self._vectorized(program)
        if latents is not None:
            program = poutine.replay(program, trace=latents)
        return self._run(program)

    def _run(self, program: Program) -> Any:
        with device_of(self.args, self.kwargs):
            return poutine.trace(program).get_trace(*self.args, **self.kwargs)

    @property
    def _first_free_dim(self) -> int:
        return -2 - self.structure.max_plate_nesting  # left of the particles

    def _vectorized(self, program: Program) -> Program:
        dim = -1 - self.structure.max_plate_nesting

        def vectorized(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate(PARTICLES, self.num_samples, dim=dim):
                return program(*args, **kwargs)

        return vectorized

    def _values(self, trace: Any, name: str) -> Tensor:
        return sample_table(trace.nodes[name], self.plate)

    def _local(self, name: str, value: Tensor) -> tuple[tuple[str, ...], np.ndarray]:
        value = value.expand(self.num_samples, *value.shape[1:])
        return ("chain", "draw", self.plate, *_dims(name, value, 2)), to_numpy(value)[None]


def _dims(name: str, value: Tensor, leading: int) -> tuple[str, ...]:
    return tuple(f"{name}_dim_{i}" for i in range(value.dim() - leading))


def _rows(values: Mapping[str, Tensor], plate: str) -> Arrays:
    return {n: ((plate, *_dims(n, v, 1)), to_numpy(v)) for n, v in values.items()}


def _constants(model: Program, args: tuple, kwargs: dict, terms: Terms, plate: str) -> Arrays:
    """Arguments with one entry per datum that are not observed."""
    try:
        named = dict(inspect.signature(model).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # a callable that does not say what it takes
        named = {f"argument_{i}": a for i, a in enumerate(args)} | kwargs
    constants = {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor)
        and value.dim() > 0
        and len(value) == terms.num_data
        and not any(_equal(_seen(value, name, terms), v) for name, v in terms.observed.items())
    }
    return _rows(constants, plate)


def _with_gaps(terms: Terms) -> dict[str, Tensor]:
    """The observations, NaN where real numbers are missing."""
    values = dict(terms.observed)
    for name, mask in terms.masks.items():
        if values[name].is_floating_point():
            values[name] = values[name].masked_fill(~mask, torch.nan)
    return values


def _seen(value: Tensor, site: str, terms: Terms) -> Tensor:
    """An argument as it is observed at a site, if it is."""
    mask = terms.masks.get(site)
    if mask is None or mask.shape != value.shape:
        return value
    return torch.where(mask, value, torch.zeros_like(value))


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype == torch.bool != b.dtype:  # a mask, which every number can be made into
        return False
    return a.shape == b.shape and a.device == b.device and bool(torch.equal(a, b.to(a.dtype)))
