"""Samples of some sites side by side, and their divergence."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lvm.infer.gathering import batch_is_shared, gather_rows
from pyro_lvm.terms import depends_on_enumeration, sample_table

__all__ = [
    "Comparison",
    "ComparisonInParts",
    "compare",
    "compare_in_parts",
    "joint",
    "needs_density",
    "of_the_whole_batch",
    "takes_conditions",
]

Comparison = tuple[Tensor, Tensor | None]
"""The divergence, and the loss of a player that the divergence has of its own (a discriminator)."""


class ComparisonInParts(NamedTuple):
    """A `Comparison`, and what the divergence says of it by name."""

    divergence: Tensor
    player: Tensor | None
    parts: dict[str, Tensor]


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
    value, player, _ = compare_in_parts(divergence, q, p)
    return value, player


def compare_in_parts(
    divergence: Any, q: Tensor, p: Tensor, conditions: Sequence[Tensor] = ()
) -> ComparisonInParts:
    """The same with the parts of the divergence, under conditions that both tables are given.

    Args:
        divergence: As for `compare`. If it has a method ``players_and_parts``, that returns parts
            by name besides.
        q: ``K x b x D``.
        p: ``K x b x D``.
        conditions: ``K x b x ...`` each, for a divergence that `takes_conditions`.
    """
    rows = zip(*of_the_whole_batch(q, p), *map(_of_the_whole_batch, conditions), strict=True)
    values, losses, parts = zip(*_each_particle(divergence, rows), strict=True)
    return ComparisonInParts(
        divergence=torch.stack(values).mean(),
        player=None if losses[0] is None else torch.stack(losses).mean(),
        parts={name: torch.stack([found[name] for found in parts]).mean() for name in parts[0]},
    )


def _of_the_whole_batch(table: Tensor) -> Tensor:
    return gather_rows(table.transpose(0, 1)).transpose(0, 1) if batch_is_shared() else table


def _each_particle(divergence: Any, rows: Any) -> Iterator[tuple]:
    """Divergence, the player's loss, and parts, for each particle."""
    for samples in rows:
        if hasattr(divergence, "players_and_parts"):
            yield divergence.players_and_parts(*samples)
        elif hasattr(divergence, "players"):
            yield *divergence.players(*samples), {}
        else:
            yield divergence(*samples), None, {}


def takes_conditions(divergence: Any) -> bool:
    """Whether a divergence is called with conditions beside the samples, not as columns of them."""
    return bool(getattr(divergence, "takes_conditions", False))


def needs_density(divergence: Any) -> bool:
    """Whether a divergence compares samples with a density, and not with samples."""
    return getattr(divergence, "against", "samples") == "density"
