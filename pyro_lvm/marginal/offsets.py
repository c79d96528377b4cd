"""Guides whose distributions are shifted, for every datum by an offset of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import constraints, transform_to

from pyro_lvm.pair import Program, device_of, untouched_random_state

__all__ = ["Offsets", "SiteOffsets"]

_DISCRETE = (dist.Categorical, dist.OneHotCategorical, dist.Bernoulli)  # enumerated and shifted


@dataclass(frozen=True, eq=False)
class SiteOffsets:
    """The offsets of one site.

    Attributes:
        plates: Plate -> its dimension, for the plates around the site.
        widths: Parameter -> the guide's own standard deviations, for what is measured by them.
        values: Parameter -> what is added to it in unconstrained space, with the dimensions of the
            plates (1 where there is none), then those of the event and of the parameter.
    """

    plates: dict[str, int]
    widths: dict[str, Tensor]
    values: dict[str, Tensor]

    def unit(self, name: str) -> Tensor:
        """A step of natural size: a standard deviation as it is now, 1 for a logarithm."""
        if name not in self.widths:
            return torch.ones_like(self.values[name])
        return self.widths[name] * _growth(name, self.values)


class Offsets(Messenger):
    """Shifts the distributions of a guide at its local sites.

        q'(z | x_i) = q(z; T(T^-1(eta(x_i)) + delta_i)),    eta: what the guide has computed

    with T the map from the reals to where a parameter lives. It belongs around the guide.

    Attributes:
        sites: Site -> offsets; other sites are left as they are.
    """

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate
        self.sites: dict[str, SiteOffsets] = {}
        self._indices: dict[str, Tensor] = {}

    @classmethod
    def none_yet(cls, guide: Program, args: tuple, kwargs: dict, *, plate: str) -> "Offsets":
        """Offsets of zero for a guide and its arguments.

        Raises:
            ValueError: If a local site can't be shifted, or there is none.
        """
        offsets, start = cls(plate), _Start(plate)
        with (
            torch.no_grad(),
            poutine.block(),
            untouched_random_state(args, kwargs),
            device_of(args, kwargs),
            start,
        ):
            guide(*args, **kwargs)
        start.check()
        offsets.sites, offsets._indices = start.sites, start.indices
        return offsets

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._check_indices(msg)
        elif msg["name"] in self.sites and not msg["is_observed"]:
            site = self.sites[msg["name"]]
            self._check_sizes(msg, site)
            msg["fn"] = _shifted(msg["fn"], site.values)

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._check_indices(msg)

    def _check_indices(self, msg: Any) -> None:
        known, indices = self._indices.get(msg["name"]), msg["value"]
        if known is None or indices is None:
            return
        if len(known) != len(indices):
            raise self._other_data(msg["name"], len(known), len(indices))
        if not torch.equal(known, torch.as_tensor(indices, device=known.device)):
            raise ValueError(
                f"Expected the minibatch that the guide was refined for in plate '{msg['name']}'; "
                f"got other rows. Let model and guide hold one minibatch before "
                f"(pyro_lvm.pair.hold_subsamples), or remove subsample_size."
            )

    def _check_sizes(self, msg: Any, site: SiteOffsets) -> None:
        shape = msg["fn"].batch_shape
        offset, depth = next(iter(site.values.values())), -min(site.plates.values())
        for plate, dim in site.plates.items():
            expected = offset.shape[depth + dim]
            if shape[dim] != expected:
                raise self._other_data(plate, expected, shape[dim])

    def _other_data(self, plate: str, expected: int, got: int) -> ValueError:
        return ValueError(
            f"Expected the {expected} data of plate '{plate}' that the guide was refined for; got "
            f"{got}. A refined guide is for those data alone: refine it for these, and pass "
            f"batch_size=None to estimators."
        )


class _Start(Messenger):
    """Makes offsets of zero for every local site of the guide that it is around."""

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate
        self.sites: dict[str, SiteOffsets] = {}
        self.indices: dict[str, Tensor] = {}
        self._points: list[str] = []
        self._has_auxiliary = False

    def check(self) -> None:
        """Refuse a guide without anything to shift."""
        if self._points and not self._has_auxiliary:
            raise ValueError(
                f"Expected local latents whose distributions can be refined; got point masses at "
                f"{self._points}. Use a guide that samples, an AutoNormal for one."
            )
        if not self.sites:
            raise ValueError(
                f"Expected a guide that draws local latents in plate '{self.plate}', to refine "
                f"their distributions; got none. Name the data plate by plate=."
            )

    def _pyro_sample(self, msg: Any) -> None:
        plates = {f.name: f.dim for f in msg["cond_indep_stack"] if f.vectorized}
        if msg["is_observed"] or site_is_subsample(msg) or self.plate not in plates:
            return
        self._has_auxiliary |= bool(msg["infer"].get("is_auxiliary"))
        base = _base(msg["fn"])
        if isinstance(base, dist.Delta):
            self._points.append(msg["name"])  # computed from auxiliary sites, or refused
        elif not msg["infer"].get("enumerate") or isinstance(base, _DISCRETE):
            self.sites[msg["name"]] = _zeros(msg, plates)

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.indices[msg["name"]] = torch.as_tensor(msg["value"])


def _zeros(msg: Any, plates: dict[str, int]) -> SiteOffsets:
    """Offsets of zero for a site whose distribution can be shifted."""
    fn = msg["fn"]
    _check_kind(msg, _base(fn))
    try:
        given = _parameters(_base(fn))
        values = {name: torch.zeros_like(t) for name, t in _per_datum(fn, given, plates).items()}
        rebuilt = _shifted(fn, values)
    except (NotImplementedError, AttributeError, TypeError, ValueError) as error:
        raise _cant_shift(msg, f"it can't be made anew from its parameters ({error})") from error
    value = fn.sample()
    if not torch.allclose(rebuilt.log_prob(value), fn.log_prob(value), rtol=1e-3, atol=1e-3):
        raise _cant_shift(msg, "it is another one when it is made anew from its parameters")
    return SiteOffsets(plates, _per_datum(fn, _widths(given), plates), values)


def _check_kind(msg: Any, base: Any) -> None:
    is_discrete = isinstance(base, _DISCRETE)
    if not is_discrete and not base.arg_constraints:
        raise _cant_shift(msg, "it has no parameters of its own")
    if not is_discrete and constraints.is_dependent(type(base).support):
        raise _cant_shift(msg, "its support moves with its parameters")
    if not msg["infer"].get("enumerate") and not msg["fn"].has_rsample:
        raise _cant_shift(
            msg,
            "its draws have no pathwise gradient (enumerate it in the guide by "
            "infer={'enumerate': 'parallel'} if it is discrete)",
        )


def _cant_shift(msg: Any, reason: str) -> ValueError:
    return ValueError(
        f"Expected local latents whose distributions can be refined by their parameters, such as "
        f"Normal, MultivariateNormal, Gamma or Beta; got {type(_base(msg['fn'])).__name__} at site "
        f"'{msg['name']}': {reason}. Take another family there, or another proposal."
    )


def _base(fn: Any) -> Any:
    while isinstance(fn, torch.distributions.Independent | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _parameters(base: Any) -> dict[str, Tensor]:
    """The parameters that a distribution is made of anew: one of several ways to say the same."""
    names = tuple(base.arg_constraints)
    if isinstance(base, torch.distributions.MultivariateNormal):
        names = ("loc", "scale_tril")
    elif isinstance(base, _DISCRETE):
        names = ("logits",)
    return {name: getattr(base, name) for name in names}


def _widths(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The standard deviations of the guide, or its scales, for what is measured by them."""
    if "scale_tril" in given:
        width = given["scale_tril"].norm(dim=-1)
        diagonal = torch.eye(width.shape[-1], dtype=torch.bool, device=width.device)
        tril = torch.where(diagonal, 1.0, width.unsqueeze(-1))  # of the diagonal: logarithms
        return {"loc": width, "scale_tril": tril}
    if "cov_diag" in given:
        width = given["cov_diag"].sqrt()
        return {"loc": width, "cov_factor": width.unsqueeze(-1).expand_as(given["cov_factor"])}
    return {"loc": given["scale"]} if {"loc", "scale"} <= given.keys() else {}


def _growth(name: str, offsets: Mapping[str, Tensor]) -> Tensor:
    """By what factor the widths of a parameter have grown since the start."""
    if "scale_tril" in offsets:
        rows = offsets["scale_tril"].diagonal(dim1=-1, dim2=-2).exp()
        if name == "loc":
            return rows
        diagonal = torch.eye(rows.shape[-1], dtype=torch.bool, device=rows.device)
        return torch.where(diagonal, 1.0, rows.unsqueeze(-1))
    if "cov_diag" in offsets:
        rows = (0.5 * offsets["cov_diag"]).exp()
        return rows if name == "loc" else rows.unsqueeze(-1)
    return offsets["scale"].exp()


def _per_datum(fn: Any, given: Mapping[str, Tensor], plates: Mapping[str, int]) -> dict:
    """Parameters with the dimensions of a site's plates, and no others of its batch."""
    depth = -min(plates.values())
    base = _base(fn)
    inner = fn.event_shape[: fn.event_dim - base.event_dim]  # dimensions that were made independent
    batch = fn.batch_shape[len(fn.batch_shape) - depth :]
    kept = [size if d - depth in plates.values() else 1 for d, size in enumerate(batch)]
    return {
        name: _like(t, torch.Size([*kept, *inner]), len(base.batch_shape))
        for name, t in given.items()
    }


def _like(parameter: Tensor, batch: torch.Size, num_batch: int) -> Tensor:
    """A parameter with this batch shape: expanded, or the first where it has more."""
    own = parameter.shape[num_batch:]
    parameter = parameter.reshape(*[1] * (len(batch) - num_batch), *parameter.shape)
    extra = parameter.dim() - len(own) - len(batch)
    parameter = parameter[(0,) * extra]
    cut = [slice(0, 1) if size == 1 else slice(None) for size in batch]
    return parameter[tuple(cut)].expand(*batch, *own)


def _shifted(fn: Any, offsets: Mapping[str, Tensor]) -> Any:
    """The distribution with its parameters shifted in unconstrained space."""
    if isinstance(fn, torch.distributions.Independent):
        return dist.Independent(_shifted(fn.base_dist, offsets), fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        base = _shifted(fn.base_dist, offsets)
        return base.expand(torch.broadcast_shapes(base.batch_shape, fn.batch_shape))
    given = _parameters(fn)
    moved = {}
    for name, offset in offsets.items():
        to_constrained = transform_to(fn.arg_constraints[name])
        moved[name] = to_constrained(to_constrained.inv(given[name]) + offset)
    return type(fn)(**moved, validate_args=False)
