"""Annealed importance sampling: chains from the prior or the guide to the posterior, and back.

``ends`` makes a pair into the two ends of a path, ``coordinates`` its latents into vectors in the
reals, and ``path`` the densities in between into a function of these. ``hamiltonian`` moves chains,
``temperatures`` says along what, and ``chains`` weighs them; ``annealer`` joins all of it for some
arguments.
"""

from pyro_lvm.marginal.annealing.acceptance import AnnealedLogMarginal
from pyro_lvm.marginal.annealing.annealed import annealed_importance_sampling
from pyro_lvm.marginal.annealing.bidirectional import BidirectionalBound, bidirectional
from pyro_lvm.marginal.annealing.hamiltonian import HMC
from pyro_lvm.marginal.annealing.temperatures import (
    AdaptiveTemperatures,
    LinearTemperatures,
    SigmoidTemperatures,
    Temperatures,
)

__all__ = [
    "HMC",
    "AdaptiveTemperatures",
    "AnnealedLogMarginal",
    "BidirectionalBound",
    "LinearTemperatures",
    "SigmoidTemperatures",
    "Temperatures",
    "annealed_importance_sampling",
    "bidirectional",
]
