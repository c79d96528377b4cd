"""Hamiltonian Monte Carlo for many chains and data at once, each with its own target."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lvm.checks import check_count, check_positive

__all__ = ["HMC", "Densities", "Point", "transition"]


@dataclass(frozen=True)
class HMC:
    """How chains move: Hamiltonian Monte Carlo with steps that a pilot run has adapted.

    Attributes:
        num_steps: Leapfrog steps of a transition.
        acceptance: The rate of acceptance that the pilot run steers the step sizes to.
        step_size: Where the pilot run starts from; it finds its way from any order of magnitude.
        jitter: Each chain's step is drawn within this fraction of its size at every transition, so
            that no trajectory is a whole turn that ends where it began (Neal 2011, section 3.2).
        num_pilots: Chains of the pilot run.
    """

    num_steps: int = 10
    acceptance: float = 0.65
    step_size: float = 0.1
    jitter: float = 0.2
    num_pilots: int = 4

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)
        check_count("num_pilots", self.num_pilots)
        check_positive("step_size", self.step_size)
        if not 0 < self.acceptance < 1:
            raise ValueError(f"Expected acceptance between 0 and 1; got {self.acceptance}.")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"Expected jitter from 0 to below 1; got {self.jitter}.")


class Point(NamedTuple):
    """Where chains are, ``K x N x D``, and what is known of the path there.

    Attributes:
        position: u, ``K x N x D``.
        log_start: log f_0(u), ``K x N``.
        log_ratio: log f_1(u) / f_0(u), ``K x N``.
        force_start: The gradient of ``log_start`` by the position.
        force_ratio: That of ``log_ratio``. Both are kept, so that a change of the temperature costs
            no evaluation.
    """

    position: Tensor
    log_start: Tensor
    log_ratio: Tensor
    force_start: Tensor
    force_ratio: Tensor

    def log_density(self, beta: Tensor) -> Tensor:
        """The logarithm of f_0^(1 - beta) f_1^beta, ``K x N``, double; temperatures ``N``."""
        return self.log_start.double() + beta * self.log_ratio.double()

    def force(self, beta: Tensor) -> Tensor:
        """Its gradient, ``K x N x D``; temperatures ``N x 1``."""
        return torch.addcmul(self.force_start, beta, self.force_ratio)


Densities = Callable[[Tensor], Point]


def transition(
    densities: Densities, point: Point, beta: Tensor, step_size: Tensor, hmc: HMC
) -> tuple[Point, Tensor]:
    """One transition of every chain, which leaves f_0^(1 - beta) f_1^beta as it is.

    Leapfrog steps with a standard normal momentum, accepted with the probability
    min(1, exp(H(u, r) - H(u', r'))), H(u, r) = |r|^2 / 2 - log f_beta(u). What leads to values
    that are not finite is rejected. As seen from a stationary chain it is its own reversal.

    Args:
        densities: From a position to the point there.
        point: Where the chains are.
        beta: Temperatures, ``N``, double.
        step_size: ``N``.
        hmc: Leapfrog steps and jitter.

    Returns:
        Where they are then, and the probabilities of acceptance, ``K x N``; nan for chains where
        the density is 0, which can accept nothing.

    Reference:
        Neal (2011), MCMC using Hamiltonian dynamics, section 3.
    """
    momentum = torch.randn_like(point.position)
    step = step_size * (1 + hmc.jitter * (2 * torch.rand_like(point.log_start) - 1))
    end, final = _leapfrog(densities, point, momentum, beta, step, hmc.num_steps)
    log_density = point.log_density(beta)
    change = end.log_density(beta) - log_density
    change = change - (_kinetic(final) - _kinetic(momentum))
    log_accept = change.nan_to_num(nan=-math.inf).clamp(max=0.0)
    accepted = torch.rand_like(log_accept).log() < log_accept
    moved = Point(*(_where(accepted, new, old) for new, old in zip(end, point, strict=True)))
    return moved, torch.where(log_density.isfinite(), log_accept.exp(), math.nan)


def _leapfrog(
    densities: Densities, point: Point, momentum: Tensor, beta: Tensor, step: Tensor, num: int
) -> tuple[Point, Tensor]:
    beta, step = (t.to(momentum).unsqueeze(-1) for t in (beta, step))
    momentum = torch.addcmul(momentum, step, point.force(beta), value=0.5)
    for i in range(num):
        point = densities(torch.addcmul(point.position, step, momentum))
        # two halves of a step at once, but for the last one
        momentum = torch.addcmul(
            momentum, step, point.force(beta), value=1.0 if i < num - 1 else 0.5
        )
    return point, momentum


def _kinetic(momentum: Tensor) -> Tensor:
    return momentum.double().square().sum(-1) / 2


def _where(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(condition if new.dim() == 2 else condition.unsqueeze(-1), new, old)
