"""Real data, two-dimensional toys, and a problem whose log p(x) and p(z | x) are known exactly."""

from pyro_lvm.datasets.faithful import old_faithful
from pyro_lvm.datasets.images import Split, binarize, binarized_mnist, digits, mnist
from pyro_lvm.datasets.linear_gaussian import LinearGaussian, linear_gaussian
from pyro_lvm.datasets.toys import (
    pinwheel,
    ring_of_gaussians,
    ring_of_gaussians_log_prob,
    two_moons,
)

__all__ = [
    "LinearGaussian",
    "Split",
    "binarize",
    "binarized_mnist",
    "digits",
    "linear_gaussian",
    "mnist",
    "old_faithful",
    "pinwheel",
    "ring_of_gaussians",
    "ring_of_gaussians_log_prob",
    "two_moons",
]
