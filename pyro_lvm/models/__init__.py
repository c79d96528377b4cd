"""Models: ordinary (model, guide) pairs for Pyro."""

from pyro_lvm.models.conditional_vae import ConditionalVAE
from pyro_lvm.models.density import Density
from pyro_lvm.models.expectation_maximisation import EMFit
from pyro_lvm.models.gan import GAN, ConditionalGAN
from pyro_lvm.models.gaussian import Gaussian
from pyro_lvm.models.hierarchical_vae import HierarchicalVAE
from pyro_lvm.models.kernel_density import KernelDensity
from pyro_lvm.models.mixture import GaussianMixture
from pyro_lvm.models.mixture_vae import MixtureVAE
from pyro_lvm.models.pixelcnn_vae import PixelCNNVAE
from pyro_lvm.models.semi_supervised_vae import SemiSupervisedVAE
from pyro_lvm.models.vae import VAE

__all__ = [
    "GAN",
    "VAE",
    "ConditionalGAN",
    "ConditionalVAE",
    "Density",
    "EMFit",
    "Gaussian",
    "GaussianMixture",
    "HierarchicalVAE",
    "KernelDensity",
    "MixtureVAE",
    "PixelCNNVAE",
    "SemiSupervisedVAE",
]
