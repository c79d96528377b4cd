"""Schedules: weights that change as training goes on, such as that of a KL that is warmed up."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from pyro_lvm.checks import check_count, check_finite

__all__ = ["CyclicSchedule", "LinearSchedule", "Schedule", "SigmoidSchedule", "at_end"]

Unit = Literal["step", "epoch"]
_STEEPNESS = 3.0  # half the logit at the end: logistic(6) is within 0.0025 of its limit


class Schedule(nn.Module):
    """A weight that goes from ``start`` to ``end`` within a number of steps, or of epochs.

    At position t, the number of steps (or of epochs) that are finished, and with the length T::

        weight(t) = start + (end - start) share(t)    for t < T,  and end from t = T on

    The first step has ``start`` exactly, and step number T, counted from 0, is the first one with
    ``end`` exactly. With ``epochs`` the weight changes between epochs only.

    Objectives take a schedule for a weight, and `fit` advances it: before each step of training it
    has the value at that step, also where steps are compiled, or go on from a checkpoint. On
    validation data it stands at its end. In a loop of your own, call `step` after each step of the
    optimiser (after each epoch, if it counts these)::

        schedule = LinearSchedule(0.0, 1.0, steps=1000)
        svi = SVI(model, guide, optimizer, TraceInfo_ELBO(kl_weight=schedule))
        for batch in batches:
            svi.step(batch)
            schedule.step()

    ``weight`` is always one and the same tensor, whose value changes in place, so that compiled
    graphs follow it. It is in double precision, lest a model in double precision see a rounded
    weight. In a product with a tensor of at least one dimension, that tensor's dtype counts; a
    scalar is to be multiplied by ``weight.to(scalar.dtype)``, or it becomes double precision.

    A subclass says by `share` how the weight gets from one end to the other.

    Args:
        start: The weight at the beginning.
        end: The weight from the end on.
        steps: T in steps of the optimiser.
        epochs: T in epochs; one of both is needed.

    Attributes:
        start: As above.
        end: As above.
        length: T.
        unit: What is counted, "step" or "epoch".
        position: t, as of the last `update` or `step`.
        weight: The weight as it is now, a tensor without dimensions that is not trained.

    Raises:
        ValueError: If start or end are not finite, or if not exactly one of ``steps`` and
            ``epochs`` is given, as a positive integer.
    """

    weight: nn.Parameter

    def __init__(
        self, start: float, end: float, *, steps: int | None = None, epochs: int | None = None
    ) -> None:
        super().__init__()
        check_finite("start", start)
        check_finite("end", end)
        self.start, self.end = float(start), float(end)
        self.length, self.unit = _length(type(self).__name__, steps, epochs)
        self.position = 0
        # a parameter stays the same tensor when the module is moved, and a buffer does not
        now = torch.tensor(self.start, dtype=torch.float64)
        self.weight = nn.Parameter(now, requires_grad=False)

    @property
    def finished(self) -> bool:
        """Whether the weight has come to stay at its end."""
        return self.position >= self.length

    def share(self, position: float) -> float:
        """How much of the way from start to end is covered, from 0 to 1.

        Args:
            position: t, at least 0 and less than T.
        """
        raise NotImplementedError

    def at(self, position: float) -> float:
        """The weight at a position; does not change what is in force."""
        if position >= self.length:
            return self.end
        share = self.share(max(position, 0))
        way = self.end - self.start
        # from the nearer end, so that a share of 0 or 1 is that end to the last bit
        return self.start + way * share if share < 0.5 else self.end - way * (1 - share)

    def update(self, *, step: int, epoch: int) -> None:
        """Put the weight in force that belongs to a step, which is in an epoch, both from 0."""
        self._move_to(step if self.unit == "step" else epoch)

    def step(self) -> None:
        """Go on by one step, or by one epoch, whichever is counted."""
        self._move_to(self.position + 1)

    def get_extra_state(self) -> dict[str, Any]:
        """The position, for ``state_dict``."""
        return {"position": self.position}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self._move_to(state["position"])

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"{self.start:g}, {self.end:g}, {self.unit}s={self.length}"

    @torch.no_grad()
    def _move_to(self, position: int) -> None:
        self.position = position
        self.weight.fill_(self.at(position))


class LinearSchedule(Schedule):
    """A weight that changes at an even pace, and then stays: linear warm-up.

        weight(t) = start + (end - start) t / T    for t < T,  and end from t = T on

    Args, attributes and errors are those of `Schedule`.

    Reference:
        Bowman et al. 2016, "Generating sentences from a continuous space", arXiv 1511.06349,
        section 3.1 (annealing of the KL's weight); Sønderby et al. 2016, "Ladder variational
        autoencoders", arXiv 1602.02282 (linear warm-up from 0 to 1 over the first epochs).
    """

    def share(self, position: float) -> float:
        """``t / T``."""
        return position / self.length


class SigmoidSchedule(Schedule):
    """A weight that changes slowly at both ends and fast in between: a logistic curve.

    With u = t / T and the logistic function s, rescaled so that both ends are exact::

        weight(t) = start + (end - start) [s(12 u - 6) - s(-6)] / [s(6) - s(-6)]
                  = start + (end - start) [1 + tanh(3 (2 u - 1)) / tanh(3)] / 2

    The middle of the way is at T / 2. The logits from -6 to 6 are those at which the logistic
    function is within 0.0025 of its limits; the steps by which they are covered are the user's.

    Args, attributes and errors are those of `Schedule`.

    Reference:
        Bowman et al. 2016, "Generating sentences from a continuous space", arXiv 1511.06349,
        section 3.1 and figure 2 (the KL's weight as a sigmoid of the step).
    """

    def share(self, position: float) -> float:
        """The logistic curve, from 0 to 1."""
        logit = _STEEPNESS * (2 * position / self.length - 1)
        return (1 + math.tanh(logit) / math.tanh(_STEEPNESS)) / 2


class CyclicSchedule(Schedule):
    """A weight that is warmed up several times, each time from the start.

    T is the length of all M cycles together, and R the fraction of a cycle that is a ramp::

        weight(t) = start + (end - start) min(1, c / R),  c = (t mod T / M) / (T / M)    for t < T

    and end from t = T on: after the last cycle it does not start again.

    Args:
        start: The weight at the beginning of each cycle.
        end: The weight at the end of each cycle, and from T on.
        steps: T in steps of the optimiser.
        epochs: T in epochs; one of both is needed.
        cycles: M.
        ramp: R; the weight is ``end`` in the rest of each cycle.

    Raises:
        ValueError: As for `Schedule`; if ``cycles`` is not a positive integer, if a cycle is
            shorter than two steps or epochs, or if ``ramp`` is not in (0, 1].

    Reference:
        Fu et al. 2019, "Cyclical annealing schedule: a simple approach to mitigating KL vanishing",
        arXiv 1903.10145 (figure 2 has M = 4 and R = 0.5).
    """

    def __init__(
        self,
        start: float,
        end: float,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        cycles: int = 4,
        ramp: float = 0.5,
    ) -> None:
        super().__init__(start, end, steps=steps, epochs=epochs)
        check_count("cycles", cycles)
        if not 0 < ramp <= 1:
            raise ValueError(
                f"Expected ramp to be the fraction of a cycle in (0, 1] in which the weight "
                f"changes; got {ramp}."
            )
        if self.length < 2 * cycles:
            raise ValueError(
                f"Expected at least two {self.unit}s in each of {cycles} cycles; got "
                f"{self.unit}s={self.length} for all of them. Pass more, or fewer cycles."
            )
        self.cycles, self.ramp = cycles, float(ramp)

    def share(self, position: float) -> float:
        """A ramp in each cycle, and 1 after it."""
        # whole numbers are divided last, so that a cycle starts where it starts
        in_cycle = position * self.cycles % self.length / self.length
        return min(1.0, in_cycle / self.ramp)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"{super().extra_repr()}, cycles={self.cycles}, ramp={self.ramp:g}"


@contextmanager
def at_end(schedules: Iterable[Schedule]) -> Iterator[None]:
    """Let weights stand at their end, and afterwards where they were.

    Losses on held-out data are comparable between epochs only under the same weights, and those at
    the end are the ones that count.
    """
    positions = [(schedule, schedule.position) for schedule in schedules]
    try:
        for schedule, position in positions:
            schedule._move_to(max(position, schedule.length))
        yield
    finally:
        for schedule, position in positions:
            schedule._move_to(position)


def _length(name: str, steps: int | None, epochs: int | None) -> tuple[int, Unit]:
    if steps is not None and epochs is not None:
        raise ValueError(
            f"Expected the length of a schedule as steps= or as epochs=; got both, {steps} and "
            f"{epochs}. Pass one of them."
        )
    if steps is not None:
        check_count("steps", steps)
        return steps, "step"
    if epochs is not None:
        check_count("epochs", epochs)
        return epochs, "epoch"
    raise ValueError(
        f"Expected the length of a schedule; got none. Pass the steps of the optimiser, as in "
        f"{name}(0.0, 1.0, steps=1000), or epochs=."
    )
