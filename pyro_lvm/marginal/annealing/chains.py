"""Chains that are annealed: a pilot run that fixes their kernels, and runs of them there and back.

What a chain does must not depend on how it fares: a kernel that is adapted to the chains that it
moves does not leave their target as it is, and the mean weight is then not p(x). So temperatures
and step sizes are found by chains of their own.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lvm.marginal.annealing.hamiltonian import HMC, Densities, Point, transition
from pyro_lvm.marginal.annealing.temperatures import Temperatures

__all__ = ["Annealed", "Kernels", "anneal", "anneal_back", "pilot_run"]

_LEAST_TRANSITIONS = 200  # of a pilot run, for step sizes to follow the path
_SEARCH = 30  # transitions that look for the size of the first step, the earlier the bolder
_GAIN = 0.4  # of the logarithm of a step size by a difference in acceptance, afterwards


class Kernels(NamedTuple):
    """What moves chains, fixed.

    Attributes:
        temperatures: beta_0 = 0 to beta_T = 1, ``T + 1`` tensors of ``N``, double.
        step_sizes: Those of the kernels at beta_1 to beta_(T-1), ``T - 1`` tensors of ``N``.
    """

    temperatures: list[Tensor]
    step_sizes: list[Tensor]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.temperatures) - 1

    def increments(self) -> list[Tensor]:
        """beta_t - beta_(t-1) for t = 1, ..., T."""
        return [b - a for a, b in itertools.pairwise(self.temperatures)]

    def moves(self) -> list[tuple[Tensor, Tensor]]:
        """beta_t and the step size there, for t = 1, ..., T - 1."""
        return list(zip(self.temperatures[1:-1], self.step_sizes, strict=True))


class Annealed(NamedTuple):
    """Chains at the end of their way.

    Attributes:
        log_weight: ``K x N``, double.
        acceptance: Mean probability of acceptance of each chain, ``K x N``; nan if it could not
            move.
    """

    log_weight: Tensor
    acceptance: Tensor


def pilot_run(
    densities: Densities,
    point: Point,
    schedule: Temperatures,
    hmc: HMC,
    tick: Callable[[], object] = lambda: None,
) -> Kernels:
    """Anneal chains that are not measured, and fix temperatures and step sizes by what they do.

        log step += gain (mean acceptance - hmc.acceptance)

    at every transition, for each datum by its own chains. The gain is constant, so that the step
    sizes follow the path, and large at first.

    Args:
        densities: From a position to the point there.
        point: Draws from the start.
        schedule: The rule for the temperatures.
        hmc: How chains move.
        tick: Called at every temperature.
    """
    log_ratio = point.log_ratio.double()
    beta, log_weight = torch.zeros_like(log_ratio[0]), torch.zeros_like(log_ratio)
    log_step = point.log_start.new_full(beta.shape, math.log(hmc.step_size))
    temperatures = [beta]
    step_sizes: list[Tensor] = []
    while True:
        following = schedule.after(beta, log_ratio, log_weight, len(temperatures) - 1)
        log_weight = log_weight + _times(following - beta, log_ratio)
        beta = following
        temperatures.append(beta)
        tick()
        if (beta >= 1).all():
            return Kernels(temperatures, step_sizes)
        search = () if step_sizes else (1 / (1 + i / 10) for i in range(_SEARCH))
        gains = (*search, *[_GAIN] * schedule.transitions(_LEAST_TRANSITIONS))
        for gain in gains:
            point, accepted = transition(densities, point, beta, log_step.exp(), hmc)
            log_step = log_step + gain * _excess(accepted, hmc.acceptance).to(log_step)
        log_ratio = point.log_ratio.double()
        step_sizes.append(log_step.exp())


def anneal(
    densities: Densities,
    point: Point,
    kernels: Kernels,
    hmc: HMC,
    tick: Callable[[], object] = lambda: None,
) -> Annealed:
    """Weights of chains from the start to the posterior.

        log w = sum_(t=1..T) (beta_t - beta_(t-1)) log f_1(z_(t-1)) / f_0(z_(t-1)),    E[w] = p(x)

    Args:
        densities: From a position to the point there.
        point: Draws from the start, z_0.
        kernels: What moves them; z_t is z_(t-1) after the kernel at beta_t.
        hmc: How.
        tick: Called at every temperature.
    """
    return _walk(densities, point, kernels.increments(), kernels.moves(), hmc, tick)


def anneal_back(
    densities: Densities,
    point: Point,
    kernels: Kernels,
    hmc: HMC,
    tick: Callable[[], object] = lambda: None,
) -> Annealed:
    """Weights of chains from the posterior back to the start, E[1 / w] = 1 / p(x).

    The kernels of `anneal` in reverse order, each of which is its own reversal. The arguments are
    those of `anneal`, but for a point with draws from the posterior.
    """
    back = kernels.increments()[::-1], kernels.moves()[::-1]
    return _walk(densities, point, *back, hmc, tick)


def _walk(
    densities: Densities,
    point: Point,
    increments: list[Tensor],
    moves: list[tuple[Tensor, Tensor]],
    hmc: HMC,
    tick: Callable[[], object],
) -> Annealed:
    """Weigh the chains at each increment of the temperature, and move them in between."""
    log_weight = _times(increments[0], point.log_ratio)
    rates, counts = torch.zeros_like(log_weight), torch.zeros_like(log_weight)
    for increment, (beta, step_size) in zip(increments[1:], moves, strict=True):
        tick()
        point, accepted = transition(densities, point, beta, step_size, hmc)
        rates, counts = rates + accepted.nan_to_num(nan=0.0), counts + ~accepted.isnan()
        log_weight = log_weight + _times(increment, point.log_ratio)
    tick()
    return Annealed(log_weight, rates / counts)


def _times(increment: Tensor, log_ratio: Tensor) -> Tensor:
    """A part of a log-weight, in double precision; 0 without an increment, at any ratio."""
    return torch.where(increment > 0, increment * log_ratio.double(), 0.0)


def _excess(accepted: Tensor, wanted: float) -> Tensor:
    """Mean acceptance above what is wanted, ``N``; 0 where no chain can accept anything."""
    return (accepted.nanmean(0) - wanted).nan_to_num(nan=0.0)
