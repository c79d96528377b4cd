"""Pictures of images, latents, training and comparisons: ``plot_*(data, *, ax=None) -> Axes``.

Every function draws into the Axes that it is given, or into a new figure, and returns the Axes.
Nothing is shown and no setting of matplotlib is changed. Tensors may be on any device.
"""

from pyro_lvm.plots.bidirectional import plot_bidirectional
from pyro_lvm.plots.collapse import plot_collapse
from pyro_lvm.plots.comparison import plot_comparison
from pyro_lvm.plots.densities import plot_densities
from pyro_lvm.plots.history import plot_history
from pyro_lvm.plots.images import plot_images, plot_means, plot_reconstructions
from pyro_lvm.plots.posterior import plot_aggregate_posterior

__all__ = [
    "plot_aggregate_posterior",
    "plot_bidirectional",
    "plot_collapse",
    "plot_comparison",
    "plot_densities",
    "plot_history",
    "plot_images",
    "plot_means",
    "plot_reconstructions",
]
