"""Models: ordinary (model, guide) pairs for Pyro."""

from pyro_lvm.models.mixture import GaussianMixture
from pyro_lvm.models.vae import VAE

__all__ = ["VAE", "GaussianMixture"]
