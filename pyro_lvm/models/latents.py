"""The prior of a latent vector, where a model is given none or one that must fit."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

__all__ = ["check_prior", "head_shape", "standard_normal"]


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


def standard_normal(shape: torch.Size, like: Tensor) -> Any:
    """N(0, I) over events of a shape, on the device and in the precision of a tensor."""
    return dist.Normal(like.new_zeros(()), 1.0).expand(shape).to_event(len(shape))
