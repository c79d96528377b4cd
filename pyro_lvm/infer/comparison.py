"""Samples of some sites side by side, and their divergence."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.infer.gathering import batch_is_shared, gather_rows
from pyro_lvm.terms import depends_on_enumeration, sample_table

__all__ = ["Comparison", "compare", "joint", "needs_density", "of_the_whole_batch"]

Comparison = tuple[Tensor, Tensor | None]
"""The divergence, and the loss of a player that the divergence has of its own (a discriminator)."""


def joint(sites: Mapping[str, Any], plate: str) -> Tensor:
    """The values of some sites side by side, ``K x N x D``.

    Raises:
        ValueError: If a site has more than one value per datum.
    """
    for name, site in sites.items():
        if depends_on_enumeration(site):
            raise ValueError(
                f"Expected one value per datum of the latents that the divergence compares; "
                f"got site '{name}', which depends on an enumerated one. Name others by sites=, or "
                f"enumerate that one in the model and let the guide sample '{name}' without it."
            )
    tables = [sample_table(site, plate) for site in sites.values()]
    return torch.cat([t.reshape(*t.shape[:2], -1) for t in tables], -1)


def of_the_whole_batch(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Two tables ``K x b x D`` with the rows of all processes that share a batch."""
    if not batch_is_shared():
        return q, p
    both = gather_rows(torch.cat([q, p], -1).transpose(0, 1))  # B x K x 2D
    q, p = both.transpose(0, 1).chunk(2, -1)
    return q, p


def compare(divergence: Any, q: Tensor, p: Tensor) -> Comparison:
    """The divergence between two tables ``K x b x D``, averaged over particles.

    Args:
        divergence: Module or function of two tensors ``B x D``. If it has a method ``players``,
            that returns the divergence and the loss of the divergence's own player.
        q: Draws from q, of this process.
        p: Draws from p, of this process.
    """
    pairs = zip(*of_the_whole_batch(q, p), strict=True)
    if not hasattr(divergence, "players"):
        return torch.stack([divergence(q_k, p_k) for q_k, p_k in pairs]).mean(), None
    values, losses = zip(*(divergence.players(q_k, p_k) for q_k, p_k in pairs), strict=True)
    return torch.stack(values).mean(), torch.stack(losses).mean()


def needs_density(divergence: Any) -> bool:
    """Whether a divergence compares samples with a density, and not with samples."""
    return getattr(divergence, "against", "samples") == "density"
