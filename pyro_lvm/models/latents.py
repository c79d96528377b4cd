"""The prior of a latent vector, where a model is given none or one that must fit."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["check_prior", "draws", "head_shape", "prior_of"]


def check_prior(prior: Any) -> None:
    """Refuse a Distribution with a batch shape: every datum has the same one.

    Raises:
        ValueError: If it has one.
    """
    batch_shape = getattr(prior, "batch_shape", ())
    if batch_shape:
        raise ValueError(
            f"Expected a prior with no batch shape; got {tuple(batch_shape)}. "
            f"Try .to_event({len(batch_shape)})."
        )


def head_shape(network: nn.Module) -> torch.Size | None:
    """The event shape of what a network returns, if its head says so."""
    shape = getattr(getattr(network, "head", None), "event_shape", None)
    return None if shape is None else torch.Size(shape)


def prior_of(given: Any, shape: Sequence[int] | None, like: Tensor, *conditions: Tensor) -> Any:
    """The prior that a model is given, or a standard normal.

    Args:
        given: A Distribution; or a module or function of the conditions that returns one; or None.
        shape: The event shape of the latent, if it is known.
        like: Where the standard normal lives, and in which precision.
        *conditions: What the prior may depend on.

    Raises:
        ValueError: If none is given and the shape is not known.
    """
    if isinstance(given, torch.distributions.Distribution):
        return given
    if given is not None:
        return given(*conditions)
    if shape is None:
        raise ValueError(
            "Expected the shape of z to be known; got an encoder without head.event_shape that "
            "has not been run. Call model or guide on data first, or pass prior=."
        )
    return dist.Normal(like.new_zeros(()), 1.0).expand(torch.Size(shape)).to_event(len(shape))


@torch.no_grad()
def draws(distribution: Any, *shape: int) -> Tensor:
    """Draws without a gradient, ``shape x batch x event``.

    They are taken as ``pyro.sample`` takes them, by a call: a flow of Zuko's has no ``sample``.
    """
    return distribution(shape)
