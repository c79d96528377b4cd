"""Models: ordinary (model, guide) pairs for Pyro."""

from pyro_lvm.models.conditional_vae import ConditionalVAE
from pyro_lvm.models.expectation_maximisation import EMFit
from pyro_lvm.models.mixture import GaussianMixture
from pyro_lvm.models.vae import VAE

__all__ = [
    "VAE",
    "ConditionalVAE",
    "EMFit",
    "GaussianMixture",
]
