"""Guides refined for the data at hand: semi-amortised inference."""

from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_lvm.checks import check_count, check_positive
from pyro_lvm.infer import TraceInfo_ELBO
from pyro_lvm.marginal.offsets import Offsets
from pyro_lvm.marginal.progress import progress_over
from pyro_lvm.pair import Program, at_rest, device_of, inspect_pair, modules_of

__all__ = ["refined"]

_CANT_BROADCAST = (
    "Several particles are run at once, with a dimension of their own left of those of all plates. "
    "num_particles=1 runs programs that don't broadcast."
)
_FIRST, _SECOND = 0.9, 0.99  # Adam's decay; the second forgets the start within 200 steps


def refined(
    model: Program,
    guide: Program,
    *args: Any,
    num_steps: int = 200,
    learning_rate: float = 0.1,
    num_particles: int = 4,
    plate: str = "data",
    progress: bool = True,
    **kwargs: Any,
) -> Program:
    """A guide for exactly these data, each with variational parameters of its own.

        q'(z_i | x_i) = q(z_i; T(T^-1(eta(x_i)) + delta_i)),    delta_i = argmax ELBO_i

    An amortised guide computes the parameters eta of all data by one function, and is off by what
    that function can't do: the amortisation gap. From there the parameters of each datum are
    optimised by themselves, while those of the pair stay as they are. T maps the reals to where a
    parameter lives (``biject_to``), and delta starts at zero, where q' is the guide. In a hierarchy
    the offset of z2 is added to what the guide has computed from z1 and x.

    The ELBO of all data is maximised by Adam on the offsets alone. Its steps are elementwise, so
    that each datum is optimised as if it were alone; a location moves in units of the standard
    deviation that q' has at the time. The learning rate falls to 0 over the second half of the
    steps, and the result is the mean of the offsets over that half, which evens out the noise of
    the gradients. It is optimised to the precision of so many steps: take more if the ELBO still
    rises with them.

    All (independent) local latents are refined, the auxiliary ones too, and categorical and
    Bernoulli sites that the guide enumerates. Other enumerated sites, point masses that are
    computed from auxiliary sites, and latents outside the plate stay as the guide has them. Behind
    an enumerated site the offset is common to all its values.

    Modules that the pair belongs to are in evaluation mode for the while.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise.
        *args: The pair's arguments.
        num_steps: Steps of Adam; with 0 the result is the guide.
        learning_rate: Of Adam, at first.
        num_particles: ``K``, draws of the guide in a step; with 1 there is no dimension for them,
            which suits programs that can't broadcast.
        plate: Name of the data plate.
        progress: Whether a terminal shows a progress bar for runs longer than two seconds.
        **kwargs: The pair's keyword arguments.

    Returns:
        A program with the guide's arguments, for model and estimators alike, as long as the data
        are these. A pair that subsamples by itself must hold one minibatch before
        (`pyro_lvm.pair.hold_subsamples`); another one is refused when the program runs.

    Raises:
        ValueError: If the pair has no such plate, a setting is not positive, or a local latent
            can't be refined: a flow, a point mass, a discrete site that is sampled.

    Reference:
        Kim et al. 2018, "Semi-amortized variational autoencoders"; Cremer, Li and Duvenaud 2018,
        "Inference suboptimality in variational autoencoders", section 4.2 (local optimisation).
    """
    if num_steps != 0:
        check_count("num_steps", num_steps)
    check_positive("learning_rate", learning_rate)
    check_count("num_particles", num_particles)
    with at_rest(modules_of(model, guide)):
        structure = inspect_pair(model, guide, args, kwargs, plate=plate)
        offsets = Offsets.none_yet(guide, args, kwargs, plate=plate)
        elbo = TraceInfo_ELBO(
            plate=plate,
            num_particles=num_particles,
            vectorize_particles=num_particles > 1,
            max_plate_nesting=structure.max_plate_nesting,
        )
        climb = _Climb(offsets, num_steps, learning_rate)
        with torch.enable_grad(), device_of(args, kwargs), pyro.validation_enabled(False):
            program = offsets(guide)
            for step in progress_over(range(num_steps), "refining", progress):
                try:
                    loss = elbo.differentiable_loss(model, program, *args, **kwargs)
                except RuntimeError as error:
                    if num_particles > 1:
                        error.add_note(_CANT_BROADCAST)
                    raise
                climb.step(step, loss)
    climb.finish()
    return program


class _Climb:
    """Adam on offsets, each in its own unit, and the mean of what it passes in its second half.

    The moments are those of gradients by the offsets themselves; a step has the size of the unit
    that the offset has at that time, so that it fits a guide which was much too narrow or too wide.
    """

    def __init__(self, offsets: Offsets, num_steps: int, learning_rate: float) -> None:
        self.num_steps, self.learning_rate = num_steps, learning_rate
        self.places = [(site, name) for site in offsets.sites.values() for name in site.values]
        self.leaves = [torch.zeros_like(site.values[name]) for site, name in self.places]
        self.first, self.second, self.sums = (
            [torch.zeros_like(leaf) for leaf in self.leaves] for _ in range(3)
        )
        self.num_summed = 0
        self._put([leaf.requires_grad_() for leaf in self.leaves])

    def step(self, step: int, loss: Tensor) -> None:
        """Take a step down the loss, which is a function of the offsets."""
        gradients = torch.autograd.grad(
            loss, self.leaves, allow_unused=True, materialize_grads=True
        )
        left = 1 - step / self.num_steps
        rate = self.learning_rate * min(1.0, 2 * left)
        with torch.no_grad():
            units = [site.unit(name) for site, name in self.places]  # before any of them moves
            for i, gradient in enumerate(gradients):
                self.leaves[i] -= rate * units[i] * self._direction(i, step + 1, gradient)
            if 2 * (step + 1) > self.num_steps:
                self.num_summed += 1
                for total, leaf in zip(self.sums, self.leaves, strict=True):
                    total += leaf

    def finish(self) -> None:
        """Leave the means behind, without gradients."""
        self._put([total / max(1, self.num_summed) for total in self.sums])

    def _direction(self, i: int, count: int, gradient: Tensor) -> Tensor:
        """Adam's (Kingma and Ba 2015), about 1 in size."""
        first, second = self.first[i], self.second[i]
        first.lerp_(gradient, 1 - _FIRST)
        second.lerp_(gradient.square(), 1 - _SECOND)
        tiny = torch.finfo(second.dtype).tiny
        size = (second / (1 - _SECOND**count)).sqrt().clamp(min=tiny**0.5)
        return first / (1 - _FIRST**count) / size

    def _put(self, offsets: list[Tensor]) -> None:
        for (site, name), offset in zip(self.places, offsets, strict=True):
            site.values[name] = offset
