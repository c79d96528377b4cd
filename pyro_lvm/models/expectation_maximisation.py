"""Expectation-maximisation for mixtures of Gaussians, exact and stepwise.

Both are sequences of parameters, each with the log-likelihood that was met on the way to it; one
loop says when to stop.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from pyro_lvm.checks import check_count, check_positive
from pyro_lvm.models.gaussian_moments import Moments, Table, moments_given

__all__ = ["EMFit", "expectation_maximisation"]

Maximisation = Callable[[Moments, Table], Table]


@dataclass(frozen=True)
class EMFit:
    """The course of expectation-maximisation; the parameters are in the mixture itself.

    Attributes:
        history: Mean log p(x_i) per datum, nats. Exact: at the start and after each iteration.
            Stepwise: one value per pass, each datum's from before its own step.
        iterations: How many were taken.
        converged: Whether the last one gained less than the tolerance.
    """

    history: tuple[float, ...]
    iterations: int
    converged: bool

    def __str__(self) -> str:
        state = "converged" if self.converged else "not converged"
        return (
            f"log p(x) = {self.history[-1]:.6g} nats per datum after {self.iterations} iterations "
            f"of EM ({state}), {self.history[0]:.6g} at first"
        )

    __repr__ = __str__


def expectation_maximisation(
    x: Tensor,
    table: Table,
    maximise: Maximisation,
    *,
    max_iterations: int,
    tolerance: float,
    batch_size: int | None = None,
    decay: float = 0.7,
    chunk_size: int | None = None,
) -> tuple[Table, EMFit]:
    """Parameters that maximise the likelihood near those that are given.

    Args:
        x: ``N x D``.
        table: Where to start.
        maximise: From moments, and the parameters before, to the best parameters.
        max_iterations: As for ``GaussianMixture.fit_em``, and the rest too.
        tolerance: Nats per datum.
        batch_size: None for exact steps.
        decay: Of the step size.
        chunk_size: How many data at a time.

    Returns:
        The parameters and their history.

    Raises:
        ValueError: If a setting does not fit.
    """
    check_count("max_iterations", max_iterations)
    check_positive("tolerance", tolerance, minimum=0.0)
    for name, count in (("batch_size", batch_size), ("chunk_size", chunk_size)):
        if count is not None:
            check_count(name, count)
    if not 0.5 < decay <= 1.0:
        raise ValueError(f"Expected decay to be above 0.5 and at most 1; got {decay}.")
    if batch_size is None:
        steps, at_start = _exact(x, table, maximise, chunk_size), 1
    else:
        steps, at_start = _stepwise(x, table, maximise, chunk_size, batch_size, decay), 0
    history: list[float] = []
    converged = False
    for latest, log_prob in islice(steps, max_iterations + at_start):
        table = latest
        converged = bool(history) and log_prob - history[-1] < tolerance
        history.append(log_prob)
        if converged:
            break
    return table, EMFit(tuple(history), len(history) - at_start, converged)


def _exact(
    x: Tensor, table: Table, maximise: Maximisation, chunk_size: int | None
) -> Iterator[tuple[Table, float]]:
    """Parameters and their own log-likelihood, the start's first."""
    while True:
        moments, total = moments_given(x, table, chunk_size=chunk_size)
        yield table, total / len(x)
        table = maximise(moments, table)


def _stepwise(
    x: Tensor,
    table: Table,
    maximise: Maximisation,
    chunk_size: int | None,
    batch_size: int,
    decay: float,
) -> Iterator[tuple[Table, float]]:
    """Parameters after each pass, and the log-likelihood that its batches had before their step."""
    moments, num_steps = Moments.of(table), 0
    while True:
        whole = 0.0
        # batches of nearly one size, for all weigh the same
        for rows in torch.randperm(len(x)).tensor_split(math.ceil(len(x) / batch_size)):
            batch, total = moments_given(x[rows.to(x.device)], table, chunk_size=chunk_size)
            per_datum = Moments(batch.counts / len(rows), batch.loc, batch.scatter / len(rows))
            moments = moments.merged(per_datum, (num_steps + 2) ** -decay)
            table = maximise(moments, table)
            num_steps, whole = num_steps + 1, whole + total
        yield table, whole / len(x)
