"""Guides as proposals: what makes a good posterior may be too narrow to sample weights from."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lvm.checks import check_positive
from pyro_lvm.pair import Program

__all__ = ["Latents", "widened"]

Latents = Literal["local", "global", "all"]


def widened(
    guide: Program,
    scales: Sequence[float] = (1.0, 2.0, 4.0),
    *,
    df: float | None = None,
    latents: Latents = "local",
    plate: str = "data",
) -> Program:
    """A guide with heavier tails, as a proposal for importance sampling.

        q'(z | x) = mean_s N(z; loc(x), s^2 S(x))     for every normal latent with covariance S
        q'(z | x) = mean_s t_df(z; loc(x), s^2 S(x))  with ``df``: Student's t

    A guide fitted by an ELBO tends to be narrower than the posterior, and weights p / q are then
    unbounded: rare samples carry most of the mass. A mixture over several widths that contains the
    guide itself costs at most a factor len(scales) in effective samples where the guide was good
    (defensive importance sampling, Hesterberg 1995), and reaches the tails where it was not. The
    dimensions of one site are widened together. The tails of Student's t fall by a power, so that
    the weights of a posterior with normal tails are bounded whatever its width; a normal site of
    several independent dimensions becomes as many independent t, a multivariate normal a
    multivariate t.

    Args:
        guide: The guide. The latents in question must be normal, (independent) or multivariate.
        scales: Factors on the standard deviation, all positive; one number widens by that alone.
        df: Degrees of freedom of Student's t; normal tails if None.
        latents: Which latents: those in the data plate, those outside, or both. Of an autoguide
            these are the auxiliary ones that it draws; what it computes from them follows.
        plate: Name of the data plate.

    Returns:
        A program with the guide's arguments; its samples are not reparameterised.

    Raises:
        ValueError: If a setting does not fit, or, when it runs, such a latent is not normal.
    """
    for scale in scales:
        check_positive("every one of scales", scale)
    if len(scales) == 0:
        raise ValueError("Expected at least one scale; got none.")
    if df is not None:
        check_positive("df", df)
    if latents not in get_args(Latents):
        raise ValueError(f"Expected latents in {get_args(Latents)}; got {latents!r}.")
    return _Widened(tuple(scales), df, latents, plate)(guide)


class _Widened(Messenger):
    def __init__(
        self, scales: tuple[float, ...], df: float | None, latents: Latents, plate: str
    ) -> None:
        super().__init__()
        self.scales, self.df, self.latents, self.plate = scales, df, latents, plate

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or site_is_subsample(msg) or not self._is_meant(msg):
            return
        fn = msg["fn"]
        base = fn.base_dist if isinstance(fn, dist.Independent) else fn
        if isinstance(base, dist.Delta) and msg["infer"].get("is_auxiliary") is None:
            return  # computed from others; a guide that has nothing but these is refused elsewhere
        if isinstance(base, dist.Normal):
            components = self._normals(base, fn.event_dim)
        elif isinstance(base, dist.MultivariateNormal | dist.LowRankMultivariateNormal):
            components = self._multivariate(base)
        else:
            raise ValueError(
                f"Expected normal latents to widen; got {type(base).__name__} at site "
                f"'{msg['name']}'. Widen it in the guide itself."
            )
        shares = dist.Categorical(torch.ones_like(base.mean).new_ones(components.batch_shape))
        msg["fn"] = dist.MixtureSameFamily(shares, components)

    def _is_meant(self, msg: Any) -> bool:
        is_local = any(frame.name == self.plate for frame in msg["cond_indep_stack"])
        return self.latents == "all" or self.latents == ("local" if is_local else "global")

    def _normals(self, base: Any, event_dim: int) -> Any:
        # S x 1 ... beside the event
        factor = self._factors(base.scale).reshape(-1, *[1] * event_dim)
        loc, scale = (t.unsqueeze(-1 - event_dim) for t in (base.loc, base.scale))
        wide = factor * scale
        one = dist.Normal(loc, wide) if self.df is None else dist.StudentT(self.df, loc, wide)
        return one.to_event(event_dim)

    def _multivariate(self, base: Any) -> Any:
        factor = self._factors(base.scale_tril).reshape(-1, 1, 1)
        loc, wide = base.loc.unsqueeze(-2), factor * base.scale_tril.unsqueeze(-3)
        if self.df is None:
            return dist.MultivariateNormal(loc, scale_tril=wide)
        return dist.MultivariateStudentT(torch.full_like(loc[..., 0], self.df), loc, wide)

    def _factors(self, like: Tensor) -> Tensor:
        return torch.tensor(self.scales, dtype=like.dtype, device=like.device)
