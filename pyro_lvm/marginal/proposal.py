"""Guides as proposals: what makes a good posterior may be too narrow to sample weights from."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger

from pyro_lvm.checks import check_positive
from pyro_lvm.pair import Program

__all__ = ["widened"]


def widened(
    guide: Program, scales: Sequence[float] = (1.0, 2.0, 4.0), *, plate: str = "data"
) -> Program:
    """A guide with heavier tails, as a proposal for importance sampling.

        q'(z | x) = mean_s N(z; loc(x), s^2 scale(x)^2)    for every normal local latent

    A guide fitted by an ELBO tends to be narrower than the posterior, and weights p / q are then
    unbounded: rare samples carry most of the mass. A mixture over several widths that contains the
    guide itself costs at most a factor len(scales) in effective samples where the guide was good
    (defensive importance sampling, Hesterberg 1995), and reaches the tails where it was not. The
    dimensions of one site are widened together.

    Args:
        guide: The guide. All its local latents must be (independent) normal.
        scales: Factors on the standard deviation, all positive.
        plate: Name of the data plate.

    Returns:
        A program with the guide's arguments; its samples are not reparameterised.

    Raises:
        ValueError: If a factor is not positive, or, when it runs, a local latent is not normal.
    """
    for scale in scales:
        check_positive("every one of scales", scale)
    if len(scales) == 0:
        raise ValueError("Expected at least one scale; got none.")
    return _Widened(tuple(scales), plate)(guide)


class _Widened(Messenger):
    def __init__(self, scales: tuple[float, ...], plate: str) -> None:
        super().__init__()
        self.scales, self.plate = scales, plate

    def _pyro_sample(self, msg: Any) -> None:
        is_local = any(frame.name == self.plate for frame in msg["cond_indep_stack"])
        if not is_local or msg["is_observed"] or msg["done"]:
            return
        fn, event_dim = msg["fn"], msg["fn"].event_dim
        base = fn.base_dist if isinstance(fn, dist.Independent) else fn
        if not isinstance(base, dist.Normal):
            raise ValueError(
                f"Expected normal local latents to widen; got {type(base).__name__} at site "
                f"'{msg['name']}'. Widen it in the guide itself."
            )
        factor = torch.tensor(self.scales, dtype=base.scale.dtype, device=base.scale.device)
        factor = factor.reshape(-1, *[1] * event_dim)  # S x 1 ... beside the event
        components = dist.Normal(
            base.loc.unsqueeze(-1 - event_dim), factor * base.scale.unsqueeze(-1 - event_dim)
        ).to_event(event_dim)
        shares = dist.Categorical(base.scale.new_ones(components.batch_shape))
        msg["fn"] = dist.MixtureSameFamily(shares, components)
