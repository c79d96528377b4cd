"""One Gaussian for all data, the baseline of baselines."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_lvm.checks import check_count, check_data, check_positive
from pyro_lvm.distributions import Incomplete, IndexedNormal
from pyro_lvm.models.density_model import DensityModel
from pyro_lvm.models.gaussian_moments import Table, maximum_likelihood, moments_given
from pyro_lvm.models.mixture_start import deviations_of

__all__ = ["Gaussian"]

Shape = Literal["full", "diagonal", "spherical"]

_ABOVE_FLOOR = 1.001  # for the floor itself is not in the support of ``scale``


class Gaussian(DensityModel):
    """A normal distribution of the data, a story without latents.

        model:  x_i ~ N(loc, S),    S = L L^T,    L = diag(scale) (I + tril)

    with the site "x" in the plate "data", and an empty guide: a `GaussianMixture` of one component,
    without its label. ``scale`` is each feature's standard deviation given the features before it,
    at least the floor, and ``tril`` strictly lower triangular, so that no constant feature can make
    S singular. The parameters are ``loc`` ``D``, ``scale`` ``D`` (spherical ``1``) and, for full
    covariances, ``tril`` ``D x D``. ``fit`` has the maximum of the likelihood in closed form, SVI
    gets there too.

    Wherever data come in, a mask may come with them, ``N x D`` or broadcastable to it, True where a
    feature is observed; the others are integrated out exactly, whatever stands there. (``fit``
    needs complete data; ``lvm.fit`` does not.)

    Args:
        num_features: ``D``.
        covariance: The shape of S.
        floor: The least ``scale``; if None, 1e-3 until ``fit`` sets it to a thousandth of each
            feature's standard deviation (of a constant feature, and for spherical covariances, of
            the root mean square over those that vary). It is a buffer, ``D`` or ``1``.
        plate: Name of the data plate.

    Raises:
        ValueError: If a size, the covariance or the floor does not fit.
    """

    def __init__(
        self,
        num_features: int,
        covariance: Shape = "full",
        *,
        floor: float | None = None,
        plate: str = "data",
    ) -> None:
        super().__init__(plate=plate)
        check_count("num_features", num_features)
        if covariance not in get_args(Shape):
            raise ValueError(f"Expected covariance in {get_args(Shape)}; got {covariance!r}.")
        if floor is not None:
            check_positive("floor", floor)
        self.num_features, self.covariance = num_features, covariance
        self._floor_is_given = floor is not None
        width = 1 if covariance == "spherical" else num_features
        self.register_buffer("floor", torch.full((width,), floor or 1e-3))
        # one object for all who hold it, the param store too: its bound is the buffer itself
        self._above_floor = constraints.greater_than(self.floor)
        self.loc = PyroParam(torch.zeros(num_features))
        self.scale = PyroParam(self.floor + 1.0, self._above_floor)
        if covariance == "full":
            self.tril = PyroParam(torch.zeros(num_features, num_features))

    def forward(self) -> IndexedNormal:
        """N(loc, S), without batch shape."""
        loc, scale = self.loc.unsqueeze(0), self.scale.unsqueeze(0)
        tril = self.tril.unsqueeze(0) if self.covariance == "full" else None
        return IndexedNormal(loc.new_zeros((), dtype=torch.long), loc, scale, tril)

    @torch.no_grad()
    def fit(self, x: Tensor) -> "Gaussian":
        """Set the parameters to the maximum of the likelihood, given ``scale`` above the floor.

            loc = mean_i x_i,    S = mean_i (x_i - loc) (x_i - loc)^T

        or the diagonal of that, or the mean of the diagonal. Where ``scale`` would fall below the
        floor it stays a thousandth above it, and no regression of a feature on those before it
        changes: the maximum under that bound.

        Args:
            x: ``N x D``.

        Returns:
            The model itself.
        """
        check_data("x", x, ndim=2, floating=True)
        self._check(x, self())
        start = self._around(x.detach())
        moments, _ = moments_given(x.detach(), start, labels=_zeros(x))
        spherical, least = self.covariance == "spherical", _ABOVE_FLOOR * self.floor
        table = maximum_likelihood(moments, start, least.to(start.loc), spherical=spherical)
        for name, value in table._asdict().items():
            if name != "weights" and value is not None:
                setattr(self, name, value.squeeze(0).to(self.loc))
        return self

    @torch.no_grad()
    def impute(self, x: Tensor, mask: Tensor, *, num_samples: int = 1) -> Tensor:
        """Draws of the missing features given the observed ones, exact ones.

            x_m ~ N(loc_m + S_mo S_oo^-1 (x_o - loc_o), S_mm - S_mo S_oo^-1 S_om)

        Args:
            x: ``N x D``.
            mask: Which features are observed.
            num_samples: ``K``.

        Returns:
            ``K x N x D``; the observed features as they are.
        """
        check_count("num_samples", num_samples)
        return self._given(x, mask, num_samples).sample_given(x)

    @torch.no_grad()
    def conditional_mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """E[x_m | x_o] at missing features, x itself at observed ones, ``N x D``.

        Args:
            x: ``N x D``.
            mask: Which features are observed.
        """
        return self._given(x, mask).mean_given(x)

    def covariance_matrix(self) -> Tensor:
        """S, ``D x D``."""
        unit = torch.eye(self.num_features).to(self.loc)
        if self.covariance == "full":
            unit = unit + self.tril.tril(-1)
        factor = self.scale.unsqueeze(-1) * unit
        return factor @ factor.mT

    def _apply(self, fn: Callable, recurse: bool = True) -> "Gaussian":
        """Move or cast as every module does; the bound on ``scale`` goes with its buffer."""
        super()._apply(fn, recurse)
        self._above_floor.lower_bound = self.floor
        return self

    def _around(self, x: Tensor) -> Table:
        """Where to look at the data from: their mean and deviations, which set the floor too."""
        spherical = self.covariance == "spherical"
        data = x.to(self.loc.device, torch.float64)
        deviations = deviations_of(data, torch.finfo(x.dtype).eps, spherical=spherical)
        if not self._floor_is_given:
            self.floor.copy_(1e-3 * deviations.squeeze(0))
        full, width = self.covariance == "full", self.num_features
        tril = data.new_zeros(1, width, width) if full else None
        return Table(data.new_ones(1), data.mean(0, keepdim=True), deviations, tril)

    def _given(self, x: Tensor, mask: Tensor, *batch: int) -> Any:
        p = self()
        self._check(x, p)
        return Incomplete(p.expand([*batch, len(x)]), self._seen(x, mask))


def _zeros(x: Tensor) -> Tensor:
    """The label of every datum."""
    return torch.zeros(len(x), dtype=torch.long, device=x.device)
