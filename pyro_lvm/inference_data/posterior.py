"""The posterior that a guide or Markov chains stand for, as ArviZ's groups."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC

from pyro_lvm.checks import check_count
from pyro_lvm.inference_data.chains import Chains, are_chains, latents_of, read_chains, summing_out
from pyro_lvm.inference_data.containers import Arrays, assemble
from pyro_lvm.inference_data.draws import Draws, PosteriorDraws
from pyro_lvm.inference_data.log_likelihood import guide_log_likelihood, mcmc_log_likelihood
from pyro_lvm.inference_data.observations import constants, observations
from pyro_lvm.marginal import LogMarginal
from pyro_lvm.marginal.log_marginal import Observations
from pyro_lvm.pair import PairStructure, Program, hold_subsamples, inspect_pair, no_guide
from pyro_lvm.terms import Terms

__all__ = ["to_arviz"]

_NO_LOG_LIKELIHOOD = (
    "log p(x_i | g) is marginal over the local latents {names}, and Markov chains draw these "
    "without the density that importance weights need. Pass score= if the model has no global "
    "latents, or take the group from to_arviz with a guide."
)


@torch.no_grad()
def to_arviz(
    model: Program,
    guide: Program | MCMC | Sequence[MCMC] | None,
    *args: Any,
    num_samples: int = 200,
    score: LogMarginal | None = None,
    num_weights: int = 500,
    predictive: bool = True,
    plate: str = "data",
    **kwargs: Any,
) -> Any:
    """The posterior of a guide or of Markov chains, with what ArviZ needs to check and compare it.

    The groups, with one chain of ``num_samples`` draws or the chains of the MCMC, and the data
    along the dimension ``plate``:

    * ``posterior``: local and global latents, drawn from the guide or by the chains; sites that the
      model enumerates from their exact posterior given these.
    * ``prior``, ``prior_predictive``: latents and observed sites of the unconditioned model.
    * ``posterior_predictive``: the observed sites, drawn anew given the posterior's draws.
    * ``observed_data``, ``constant_data``: what the model observes, and the other tensors among its
      arguments that have one entry per datum.
    * ``log_likelihood``: log p(x_i | g) **marginal over the local latents**, in nats, per datum.
      Given the local latents it would be a density of x_i under a posterior that has seen x_i,
      which leave-one-out cross-validation can't use. Without global latents it is log p(x_i) given
      the fitted parameters, the same for all draws: `compare` takes it as it is, while ArviZ's own
      ``loo`` is for pairs with global latents. Of chains that draw local latents it is left out,
      unless ``score`` has it, since only a guide has the density that importance weights need; an
      attribute ``no_log_likelihood`` of ``posterior`` says so.
    * ``sample_stats``: of a guide, per draw and datum the log importance weight ``log_weight``. Of
      chains ``lp``, log p(x, z, g) with enumerated sites summed out, in nats, whether a draw is
      ``diverging``, and each chain's ``acceptance_rate``.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise; None if it samples nothing. Or a ``pyro.infer.MCMC`` that has
            run this model on these arguments, or a list of several, whose chains are put together.
            Chains of different models or data are refused where their sites or shapes differ.
        *args: The pair's arguments.
        num_samples: Draws from the guide and from the prior, at least 2.
        score: log p(x_i) of these data if it is known already; only without global latents.
        num_weights: Importance samples per datum (and per draw of the global latents) where
            log p(x_i) has to be estimated.
        predictive: Whether to draw the two predictive groups, the largest ones.
        plate: Name of the data plate.
        **kwargs: The pair's keyword arguments.

    Returns:
        An ``arviz.InferenceData`` (ArviZ 0.x) or an ``xarray.DataTree`` (ArviZ 1).

    Raises:
        TypeError: If the draws of the chains are not kept, as those of ``StreamingMCMC``.
        ValueError: If the pair does not fit, the chains have not been run or are those of another
            model or of other shapes, or the score is of other data.
    """
    check_count("num_samples", num_samples)
    check_count("num_weights", num_weights)
    if num_samples < 2:
        raise ValueError(f"Expected num_samples >= 2; got {num_samples}.")
    chains = read_chains(guide) if are_chains(guide) else None
    if chains is not None:  # a guide in name: its draws are not its own
        model = summing_out(model)
        guide = latents_of(model)
    program: Any = no_guide if guide is None else guide
    structure = inspect_pair(model, program, args, kwargs, plate=plate)
    if chains is not None:
        chains.check(structure)
    if structure.subsampled:
        model, program = hold_subsamples(model, program, args, kwargs)
    prior = Draws(structure, args, kwargs, num_draws=num_samples)
    prior_trace = prior.trace(poutine.uncondition(model))
    settings = {"num_draws": num_samples} if chains is None else chains.settings
    draws = PosteriorDraws(model, program, structure, args, kwargs, **settings)
    terms = draws.terms()
    _check_score(score, terms, structure)
    groups: dict[str, Arrays] = {
        "posterior": draws.posterior(terms),
        "prior": prior.latents(prior_trace),
        "observed_data": observations(terms, plate),
        "constant_data": constants(model, args, kwargs, terms, plate),
    }
    if chains is None:
        groups |= _of_guide(draws, terms, score, num_weights)
    else:
        groups |= _of_chains(draws, terms, score, chains)
    if predictive:
        groups["prior_predictive"] = prior.predicted(prior_trace)
        groups["posterior_predictive"] = draws.predictive()
    return assemble(groups, _attributes(terms, structure, groups))


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


def _of_guide(
    draws: PosteriorDraws, terms: Terms, score: LogMarginal | None, num_weights: int
) -> dict[str, Arrays]:
    rows = guide_log_likelihood(draws, terms, score, num_weights)
    return {
        "log_likelihood": {"marginal": draws.variable("marginal", rows)},
        "sample_stats": {"log_weight": draws.variable("log_weight", terms.log_weight)},
    }


def _of_chains(
    draws: PosteriorDraws, terms: Terms, score: LogMarginal | None, chains: Chains
) -> dict[str, Arrays]:
    rows = mcmc_log_likelihood(draws, terms, score)
    known = {} if rows is None else {"marginal": draws.variable("marginal", rows)}
    log_joint = (terms.log_likelihood + sum(terms.log_prior.values())).sum(1)
    lp = draws.variable("lp", log_joint + terms.global_log_prior, is_local=False)
    return {"log_likelihood": known, "sample_stats": {"lp": lp, **chains.statistics}}


def _attributes(
    terms: Terms, structure: PairStructure, groups: dict[str, Arrays]
) -> dict[str, dict[str, Any]]:
    found = Observations.of(terms)
    attributes: dict[str, dict[str, Any]] = {
        "observed_data": {
            "base_measure": found.base_measure,
            "values_per_datum": found.values_per_datum,
        }
    }
    if not groups["log_likelihood"]:
        reason = _NO_LOG_LIKELIHOOD.format(names=list(structure.local_latents))
        attributes["posterior"] = {"no_log_likelihood": reason}
    return attributes
