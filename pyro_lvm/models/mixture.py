"""The Gaussian mixture as a Pyro pair, its label enumerated."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroParam, pyro_method
from torch import Tensor
from torch.distributions import constraints

from pyro_lvm.checks import check_count, check_data, check_positive
from pyro_lvm.distributions import Incomplete, IndexedNormal
from pyro_lvm.models.base import Model
from pyro_lvm.models.expectation_maximisation import EMFit, expectation_maximisation
from pyro_lvm.models.gaussian_moments import (
    Covariance,
    Table,
    maximum_likelihood,
)
from pyro_lvm.models.mixture_start import clusters, deviations_of
from pyro_lvm.pair import Masks
from pyro_lvm.pair.masks import entry_mask

__all__ = ["Covariance", "GaussianMixture"]

_ABOVE_FLOOR = 1.001  # for the floor itself is not in the support of ``scale``


class GaussianMixture(Model):
    """A mixture of Gaussians, its label summed out.

        p(x) = sum_c weights_c N(x; loc_c, S_c)
        model:  z_i ~ Categorical(weights),  x_i ~ N(loc[z_i], S[z_i])

    with sites "z", summed out exactly, and "x" in the plate "data". The covariance is S = L L^T,
    L = diag(scale) (I + tril) with ``scale`` at least the floor and ``tril`` strictly lower
    triangular: scale is each feature's standard deviation given the features before it, and no
    duplicated point or constant column can make S singular.

    The parameters are ``weights`` ``C``, ``loc`` ``C x D``, ``scale`` (``C x D``; tied ``1 x D``;
    spherical ``C x 1``) and, for full and tied covariances, ``tril`` (``C x D x D``; tied
    ``1 x D x D``). They are fitted by maximum likelihood, with SVI or
    ``fit_em``, and ``guide`` is empty. A parameter with a prior is a global latent instead, a site
    of the parameter's name, and ``guide`` an autoguide over all of these; what needs a value of it
    then takes the guide's median.

    Wherever data come in, a mask may come with them, ``N x D`` or broadcastable to it, True where
    a feature is observed: the others are integrated out exactly,

        p(x_io) = sum_c weights_c N(x_io; loc_co, S_coo),    o: the observed features of datum i

    whatever stands there, NaN too. (``initialize`` and ``fit_em`` need complete data.)

    Args:
        num_components: ``C``.
        num_features: ``D``.
        covariance: The shape of the covariances.
        priors: Parameter name -> Distribution with no batch shape and the event shape above.
        autoguide: From a model to the guide of the parameters with priors.
        floor: The least ``scale``, unless that has a prior; if None, 1e-3 until ``initialize`` sets
            it to a thousandth of each feature's standard deviation (for spherical covariances, of
            their root mean square). It is a buffer, ``1 x D`` or ``1 x 1``.
        plate: Name of the data plate.

    Raises:
        ValueError: If a size, the covariance or a prior does not fit.
    """

    def __init__(
        self,
        num_components: int,
        num_features: int,
        covariance: Covariance = "full",
        *,
        priors: Mapping[str, Any] | None = None,
        autoguide: Callable[[Callable], Callable] = AutoNormal,
        floor: float | None = None,
        plate: str = "data",
    ) -> None:
        super().__init__()
        check_positive("num_components", num_components, minimum=1)
        check_positive("num_features", num_features, minimum=1)
        if covariance not in get_args(Covariance):
            raise ValueError(f"Expected covariance in {get_args(Covariance)}; got {covariance!r}.")
        if floor is not None:
            check_positive("floor", floor)
        self.num_components, self.num_features = num_components, num_features
        self.covariance, self.plate = covariance, plate
        self._floor_is_given = floor is not None
        width = 1 if covariance == "spherical" else num_features
        self.register_buffer("floor", torch.full((1, width), floor or 1e-3))
        # one object for all who hold it, the param store too: its bound is the buffer itself
        self._above_floor = constraints.greater_than(self.floor)
        self.priors = dict(priors or {})
        self._declare(self._starting_values())
        self._autoguide: Any = None
        if self.priors:
            self._autoguide = autoguide(poutine.block(self.model, hide=["z", "x"]))

    @pyro_method
    def model(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The generative story, conditioned on the observed features of x ``N x D``."""
        self._check(x)
        weights, *table = (self._parameter(name) for name in self._shapes())
        with Masks(x=mask), pyro.plate(self.plate, len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            return pyro.sample("x", IndexedNormal(z, *table), obs=x)

    @pyro_method
    def guide(self, x: Tensor, mask: Tensor | None = None) -> Any:
        """The posterior of the parameters that have priors; nothing without any."""
        return None if self._autoguide is None else self._autoguide(x)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> "GaussianMixture":
        """Set parameters without priors from k-means clusters, started by k-means++.

        The clusters' shares, means and covariances become the mixture's (Arthur and Vassilvitskii
        2007 for the start). Random numbers come from torch's global generator.

        Args:
            x: ``N x D``.

        Returns:
            The mixture itself.
        """
        self._check(x)
        check_data("x", x, ndim=2, floating=True)
        data = x.detach().to("cpu", torch.float64)
        spherical = self.covariance == "spherical"
        deviations = deviations_of(data, torch.finfo(x.dtype).eps, spherical=spherical)
        if not self._floor_is_given:
            self.floor.copy_(1e-3 * deviations)
        start = clusters(
            data, self._shapes(), deviations, 2 * self.floor.to(data), spherical=spherical
        )._asdict()
        like = next(iter(self.parameters()), x)
        self._declare({n: start[n].to(like.device, like.dtype) for n in self._shapes()})
        return self

    def fit_em(
        self,
        x: Tensor,
        *,
        max_iterations: int = 200,
        tolerance: float = 1e-6,
        batch_size: int | None = None,
        decay: float = 0.7,
        chunk_size: int | None = None,
    ) -> EMFit:
        """Maximise the likelihood by expectation-maximisation, from the parameters that are there.

        With r_ic = p(z_i = c | x_i), N_c = sum_i r_ic, one iteration is

            weights_c = N_c / N,  loc_c = sum_i r_ic x_i / N_c,
            S_c = sum_i r_ic (x_i - loc_c) (x_i - loc_c)^T / N_c

        (Dempster, Laird and Rubin 1977), with S pooled over the components, or its diagonal or the
        mean of that alone, as ``covariance`` demands. Where ``scale`` would fall below the floor it
        stays a thousandth above it, the maximum under that bound, so that no iteration lowers the
        likelihood. Components that no datum belongs to stay where they are.

        With ``batch_size`` it is stepwise: the averages of r, r x and r x x^T move towards those of
        minibatch k by (k + 2)^-decay, and an iteration is a pass over the data, in an order from
        torch's global generator (Cappe and Moulines 2009). Of many data it needs few passes.

        A good start is that of ``initialize``, to which a random subset can be given. The data stay
        where they are. A chunk of them at a time is taken to the parameters' device and whitened in
        the data's precision (at least float32); sums are float64, and memory does not grow with
        ``N C``. Parameters are changed in place, also for the param store and optimisers.

        Args:
            x: ``N x D``.
            max_iterations: The most iterations.
            tolerance: Stop after an iteration that gains less, nats per datum.
            batch_size: Of the stepwise variant; None for the exact one.
            decay: Of the step size, in (0.5, 1].
            chunk_size: How many data at a time; if None, what suits the device. The result is the
                same but for rounding.

        Returns:
            The course of the fit.

        Raises:
            ValueError: If a parameter has a prior, data are not finite or a setting does not fit.
        """
        if self.priors:
            raise ValueError(
                f"Expected a mixture without priors, since EM maximises the likelihood; got priors "
                f"of {sorted(self.priors)}. Fit model and guide by SVI instead."
            )
        self._check(x)
        check_data("x", x, ndim=2, floating=True)
        table = self._table()
        least = _ABOVE_FLOOR * self.floor.to(table.loc)
        spherical = self.covariance == "spherical"
        table, fit = expectation_maximisation(
            x.detach(),
            table,
            partial(maximum_likelihood, least=least, spherical=spherical),
            max_iterations=max_iterations,
            tolerance=tolerance,
            batch_size=batch_size,
            decay=decay,
            chunk_size=chunk_size,
        )
        for name in self._shapes():
            setattr(self, name, getattr(table, name).to(getattr(self, name)))
        return fit

    def _apply(self, fn: Callable, recurse: bool = True) -> "GaussianMixture":
        """Move or cast as every module does; the bound on ``scale`` goes with its buffer."""
        super()._apply(fn, recurse)
        self._above_floor.lower_bound = self.floor
        return self

    def log_prob(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log p(x_i), ``N``, nats; given a mask, that of the observed features."""
        return torch.logsumexp(self._joint(x, mask), -1)

    def responsibilities(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """p(z_i = c | x_i), ``N x C``; given a mask, by the observed features."""
        return torch.softmax(self._joint(x, mask), -1)

    def assign(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The most probable label of each datum, ``N``."""
        return self._joint(x, mask).argmax(-1)

    @torch.no_grad()
    def impute(self, x: Tensor, mask: Tensor, *, num_samples: int = 1) -> Tensor:
        """Draws of the missing features given the observed ones, exact ones.

            z ~ p(z | x_o),    x_m ~ N(loc_zm + S_zmo S_zoo^-1 (x_o - loc_zo), S_zmm given o)

        Args:
            x: ``N x D``.
            mask: Which features are observed.
            num_samples: ``K``.

        Returns:
            ``K x N x D``; the observed features as they are.
        """
        check_count("num_samples", num_samples)
        z = dist.Categorical(self.responsibilities(x, mask)).sample((num_samples,))
        return Incomplete(self._component(z), self._seen(x, mask)).sample_given(x)

    @torch.no_grad()
    def conditional_mean(self, x: Tensor, mask: Tensor) -> Tensor:
        """E[x_m | x_o] at missing features, x itself at observed ones, ``N x D``.

        Args:
            x: ``N x D``.
            mask: Which features are observed.
        """
        shares, seen = self.responsibilities(x, mask), self._seen(x, mask)
        labels = torch.arange(self.num_components, device=x.device).unsqueeze(-1)
        means = Incomplete(self._component(labels), seen).mean_given(x)  # C x N x D
        return torch.where(seen, x, (shares.T.unsqueeze(-1) * means).sum(0))

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Draws of x, ``num_samples x D``."""
        z = dist.Categorical(self.values()["weights"]).sample((num_samples,))
        return self._component(z).sample()

    def covariances(self) -> Tensor:
        """S, ``C x D x D``."""
        values = self.values()
        unit = torch.eye(self.num_features).to(values["loc"])
        if "tril" in values:
            unit = unit + values["tril"].tril(-1)
        shape = (self.num_components, self.num_features, self.num_features)
        factor = (values["scale"].unsqueeze(-1) * unit).expand(shape)
        return factor @ factor.mT

    def values(self) -> dict[str, Tensor]:
        """The parameters by name; those with priors at the guide's median."""
        self._set_up_guide()
        medians = self._autoguide.median() if self.priors else {}
        return {
            name: medians[name] if name in self.priors else getattr(self, name)
            for name in self._shapes()
        }

    def _set_up_guide(self) -> None:
        """Run an autoguide once: before its first run it has no parameters."""
        if getattr(self._autoguide, "prototype_trace", self) is None:
            with torch.no_grad(), poutine.block():
                self.guide(self.floor.new_zeros(1, self.num_features))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._set_up_guide()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._set_up_guide()  # which needs the model, and Pyro's guides are copied without theirs
        return super().__getstate__()

    def _joint(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log p(x_i, z_i = c), ``N x C``."""
        self._check(x)
        table = self._component(torch.zeros((), dtype=torch.long, device=x.device))
        if mask is None:
            log_prob = table.log_prob_table(x)
        else:
            log_prob = table.observed_log_prob_table(x, self._seen(x, mask))
        return log_prob + self.values()["weights"].log()

    def _component(self, z: Tensor) -> IndexedNormal:
        """p(x | z), with the batch shape of z."""
        values = self.values()
        return IndexedNormal(z, values["loc"], values["scale"], values.get("tril"))

    def _seen(self, x: Tensor, mask: Tensor) -> Tensor:
        """The mask with the dimensions of x."""
        return entry_mask("x", mask, x.shape[:1], x.shape[1:])

    def _parameter(self, name: str) -> Tensor:
        prior = self.priors.get(name)
        return getattr(self, name) if prior is None else pyro.sample(name, prior)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        c, d = self.num_components, self.num_features
        shapes: dict[str, tuple[int, ...]] = {"weights": (c,), "loc": (c, d)}
        shapes["scale"] = {"tied": (1, d), "spherical": (c, 1)}.get(self.covariance, (c, d))
        if self.covariance in ("full", "tied"):
            shapes["tril"] = (*shapes["scale"], d)
        return shapes

    def _starting_values(self) -> dict[str, Tensor]:
        shapes = self._shapes()
        values = {name: torch.zeros(shape) for name, shape in shapes.items()}
        values["weights"] += 1 / self.num_components
        values["scale"] += 1.0
        values["loc"] += torch.randn(shapes["loc"])  # equal means would stay equal
        return values

    def _declare(self, values: dict[str, Tensor]) -> None:
        """Make each value a parameter unless it has a prior."""
        supports = {"weights": constraints.simplex, "scale": self._above_floor}
        unknown = set(self.priors) - set(values)
        if unknown:
            raise ValueError(f"Expected priors among {sorted(values)}; got {sorted(unknown)}.")
        for name, value in values.items():
            if name not in self.priors:
                setattr(self, name, PyroParam(value, supports.get(name, constraints.real)))
                continue
            prior = self.priors[name]
            if prior.event_shape != value.shape or prior.batch_shape:
                raise ValueError(
                    f"Expected a prior of '{name}' with event shape {tuple(value.shape)} and no "
                    f"batch shape; got {tuple(prior.event_shape)} and {tuple(prior.batch_shape)}. "
                    f"Try .expand({tuple(value.shape)}).to_event({value.dim()})."
                )

    def _table(self) -> Table:
        """The parameters where they are, in float64."""
        with torch.no_grad():
            table = Table(**{n: getattr(self, n).detach().double() for n in self._shapes()})
        return table if table.tril is None else table._replace(tril=table.tril.tril(-1))

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dim() != 2 or len(x) == 0 or not x.is_floating_point():
            check_data("x", x, ndim=2, floating=True)  # says what is wrong with it
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"Expected x with {self.num_features} features, N x {self.num_features}; got shape "
                f"{tuple(x.shape)}."
            )
