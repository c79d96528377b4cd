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

from pyro_lvm.terms.at_values import terms_at
from pyro_lvm.terms.completion import Completion, complete
from pyro_lvm.terms.compute import compute_terms, log_prior_from_traces, terms_from_traces
from pyro_lvm.terms.particles import sharing_globals
from pyro_lvm.terms.record import Terms
from pyro_lvm.terms.simulation import Simulation, simulate
from pyro_lvm.terms.sites import PARTICLES, depends_on_enumeration, observed_table, sample_table

__all__ = [
    "PARTICLES",
    "Completion",
    "Simulation",
    "Terms",
    "complete",
    "compute_terms",
    "depends_on_enumeration",
    "log_prior_from_traces",
    "observed_table",
    "sample_table",
    "sharing_globals",
    "simulate",
    "terms_at",
    "terms_from_traces",
]
