"""The kernel density estimate as a Pyro pair: what is known without any model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_lvm import distributions
from pyro_lvm.checks import check_count, check_data, check_positive
from pyro_lvm.distributions.bandwidth import best_bandwidth
from pyro_lvm.models.density_model import DensityModel

__all__ = ["KernelDensity"]


class KernelDensity(DensityModel):
    """A Gaussian of one width around each of the data that it was fitted to (Parzen 1962).

        p(x) = (1/S) sum_s N(x; points_s, bandwidth^2 I)
        model:  x_i ~ p(x)

    with the site "x" in the plate "data", and an empty guide. Nothing is trained: ``points``,
    ``S x D``, and ``bandwidth`` are buffers that ``fit`` sets (before it, the points are 0).
    Distances are computed in double precision, of so many points and data at a time that memory
    grows with neither's number beyond their own size.

    In many dimensions it takes exceedingly many data before this is a good density: a baseline that
    a model has to be better than. `marginal.kernel_density` has the same of a story's own draws.

    Args:
        num_features: ``D``.
        num_points: ``S``; ``fit`` changes it, so that it matters for ``lvm.load(into=...)`` alone.
        bandwidth: The standard deviation of the kernel, until ``fit`` chooses one.
        plate: Name of the data plate.

    Raises:
        ValueError: If a size or the bandwidth is not positive.
    """

    points: Tensor
    bandwidth: Tensor

    def __init__(
        self,
        num_features: int,
        num_points: int = 1,
        *,
        bandwidth: float = 1.0,
        plate: str = "data",
    ) -> None:
        super().__init__(plate=plate)
        check_count("num_features", num_features)
        check_count("num_points", num_points)
        check_positive("bandwidth", bandwidth)
        self.num_features, self.num_points = num_features, num_points
        self.register_buffer("points", torch.zeros(num_points, num_features))
        self.register_buffer("bandwidth", torch.tensor(float(bandwidth)))

    def forward(self) -> distributions.KernelDensity:
        """p(x), without batch shape."""
        return distributions.KernelDensity(self.points, self.bandwidth)

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        *,
        validation: Tensor | None = None,
        bandwidths: Sequence[float] | None = None,
    ) -> "KernelDensity":
        """Keep the data, and choose the bandwidth under which others are most probable.

            bandwidth = argmax_h sum_v log (1/S) sum_s N(x_v; x_s, h^2 I)

        Args:
            x: ``S x D``; a copy of them is kept, on the model's device and in its precision.
            validation: ``V x D``; if None, each of x is left out in turn and scored by the others,
                in a time that grows with ``S^2``.
            bandwidths: Values to choose from; a single one is taken as it is. If None, forty
                between .02 and 2 times the root mean square deviation of the data that are scored.

        Returns:
            The model itself.

        Raises:
            ValueError: If data do not fit, or there is no positive bandwidth.
        """
        points = self._checked("x", x).clone()
        others = None if validation is None else self._checked("validation", validation)
        bandwidth = best_bandwidth(points, others, bandwidths)
        self.points, self.num_points = points, len(points)
        self.bandwidth.fill_(bandwidth)
        return self

    def _checked(self, name: str, x: Tensor) -> Tensor:
        """Data where the points are, and like these."""
        check_data(name, x, ndim=2, floating=True)
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"Expected {name} with {self.num_features} features, N x {self.num_features}; got "
                f"shape {tuple(x.shape)}."
            )
        return x.detach().to(self.points)
