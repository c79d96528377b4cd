"""Log p(x_i | g) for each draw of the global latents, marginal over the local ones."""

import torch
from pyro import poutine
from torch import Tensor

from pyro_lvm.inference_data.draws import PosteriorDraws
from pyro_lvm.marginal import LogMarginal, exact, importance_sampling
from pyro_lvm.terms import Terms

__all__ = ["guide_log_likelihood", "mcmc_log_likelihood"]


def guide_log_likelihood(
    draws: PosteriorDraws, terms: Terms, score: LogMarginal | None, num_weights: int
) -> Tensor:
    """One row for each draw from a guide, ``K x N``; estimated where it is not exact.

    Args:
        draws: The draws.
        terms: Their terms.
        score: Log p(x_i) if it is known; only without global latents.
        num_weights: Importance samples where it has to be estimated.
    """
    has_globals = bool(draws.structure.global_latents)
    if has_globals and not terms.log_guide:
        return terms.log_weight  # everything local is summed out: exact for each draw
    if has_globals:
        rows = [_given_globals(draws, k, num_weights) for k in range(draws.num_particles)]
        return torch.stack(rows)
    score = score or _score(draws, set(terms.log_guide), num_weights)
    return score.log_prob.expand(draws.num_particles, -1)


def mcmc_log_likelihood(
    draws: PosteriorDraws, terms: Terms, score: LogMarginal | None
) -> Tensor | None:
    """One row for each draw of Markov chains, ``K x N``; None where there is no exact one.

    Chains draw local latents without a density of their own, which importance weights would need.
    """
    if score is not None:
        return score.log_prob.expand(draws.num_particles, -1)
    return None if draws.structure.local_latents else terms.log_likelihood


def _score(draws: PosteriorDraws, sampled: set[str], num_weights: int) -> LogMarginal:
    pair, settings = (draws.model, draws.guide, *draws.args), {"plate": draws.plate, **draws.kwargs}
    if sampled <= set(draws.structure.guide_enumerated):
        return exact(*pair, **settings)
    return importance_sampling(*pair, num_samples=num_weights, **settings)


def _given_globals(draws: PosteriorDraws, draw: int, num_weights: int) -> Tensor:
    values = draws.global_values(draw)
    model = poutine.condition(draws.model, data=values)
    guide = poutine.block(poutine.condition(draws.guide, data=values), hide=list(values))
    return importance_sampling(
        model, guide, *draws.args, num_samples=num_weights, plate=draws.plate, **draws.kwargs
    ).log_prob
