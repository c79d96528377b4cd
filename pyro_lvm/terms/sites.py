"""Values of single sites, their dimensions in the order of the terms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_lvm.distributions.incomplete import completed, observed_entries

__all__ = [
    "PARTICLES",
    "complete_value",
    "depends_on_enumeration",
    "observed_table",
    "sample_table",
    "site_value",
]

PARTICLES = "num_particles_vectorized"  # Pyro's name for the plate over particles


def sample_table(site: dict, plate: str) -> Tensor:
    """A site's value as ``K x N x (nested plates, from the left) x event``.

    Dimensions that no plate of the site uses have size 1 and are dropped; ``K`` is 1 without a
    plate over particles, and ``N`` is left out for a site outside the data plate.
    """
    value, event_dim = site["value"], site["fn"].event_dim
    frames = {f.name: f.dim for f in site["cond_indep_stack"] if f.vectorized}
    nested = sorted(dim for name, dim in frames.items() if name not in (plate, PARTICLES))
    dims = [d for d in (frames.get(PARTICLES), frames.get(plate), *nested) if d is not None]
    rank = max(-min(dims, default=0), value.dim() - event_dim)
    event = value.shape[value.dim() - event_dim :]
    value = value.reshape((1,) * (rank + event_dim - value.dim()) + value.shape)
    unused = [d for d in range(-rank, 0) if d not in dims]
    order = [d - event_dim for d in (*dims, *unused)] + list(range(-event_dim, 0))
    table = value.permute(order).reshape([value.shape[d - event_dim] for d in dims] + [*event])
    return table if PARTICLES in frames else table.unsqueeze(0)


def site_value(table: Tensor, dims: Sequence[int], event_dim: int) -> Tensor:
    """A table as the value of a site, the inverse of `sample_table`.

    Args:
        table: The value, with one dimension for each of ``dims`` and then those of the event.
        dims: The dimension, from the right and without the event's, that each of these is to be.
        event_dim: How many dimensions the event has.
    """
    batch, event = table.shape[: len(dims)], table.shape[len(dims) :]
    order = sorted(range(len(dims)), key=lambda i: dims[i])
    shape = [1] * -min(dims, default=0)
    for size, dim in zip(batch, dims, strict=True):
        shape[dim] = size
    events = range(len(dims), len(dims) + event_dim)
    return table.permute([*order, *events]).reshape([*shape, *event])


def depends_on_enumeration(site: dict) -> bool:
    """Whether a site's value has dimensions beside those of its plates."""
    plates = max((-f.dim for f in site["cond_indep_stack"] if f.vectorized), default=0)
    batch = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return any(size > 1 for size in batch[: len(batch) - plates])


def observed_table(site: dict, plate: str) -> Tensor | None:
    """Which entries of an observed site count, ``N x (nested plates) x event``; None if all do.

    What does not count is under the mask of its distribution (`Incomplete`) or of the site itself
    (``poutine.mask``).
    """
    entries, rows = observed_entries(site["fn"]), _rows_mask(site)
    if entries is None and rows is None:
        return None
    mask = torch.ones_like(site["value"], dtype=torch.bool)
    for part in (entries, rows):
        mask = mask if part is None else mask & part.to(mask.device)
    return sample_table({**site, "value": mask}, plate)[0]


def complete_value(site: dict) -> Tensor:
    """The value of an observed site, with what does not count drawn from its distribution."""
    value, rows = completed(site["fn"], site["value"]), _rows_mask(site)
    if rows is None:
        return value
    return torch.where(rows.to(value.device), value, site["fn"].sample().to(value.dtype))


def _rows_mask(site: dict) -> Tensor | None:
    """The mask of whole events that a site is under, with dimensions for the event."""
    mask = site["mask"]
    if mask is None or mask is True:
        return None
    mask = torch.as_tensor(mask)
    return mask.reshape(*mask.shape, *[1] * site["fn"].event_dim)
