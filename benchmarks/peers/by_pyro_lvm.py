"""This library: the pairs of `benchmarks.problems`, compiled; a warning says where they are not."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import problems
from benchmarks.problems import own_parameters
from benchmarks.timing import ManySteps
from pyro_lvm import CompiledStep, compile

__all__ = ["compiled_loss", "steps"]


def steps(problem: str, num_steps: int = 1, device: str = "cpu") -> Callable[[], Any]:
    """Loss, gradient and update as one graph, one or several steps in a call."""
    pair = problems.PROBLEMS[problem](device=device)
    step = CompiledStep(pair.elbo, pair.model, pair.guide, num_steps=num_steps)
    call = own_parameters(lambda: step(*pair.args))
    return ManySteps(call, num_steps)


def compiled_loss(problem: str, device: str = "cpu") -> Callable[[], Any]:
    """The compiled loss, torch's backward pass and its fused Adam."""
    pair = problems.PROBLEMS[problem](device=device)
    loss = compile(pair.elbo, pair.model, pair.guide)
    own_parameters(lambda: loss.initialize(*pair.args))()
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3, fused=True)

    def step() -> Any:
        optimizer.zero_grad()
        value = loss(*pair.args)
        value.backward()
        optimizer.step()
        return value

    return own_parameters(step)
