"""What a pair observes and what it is given, as ArviZ's variables."""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_lvm.inference_data.containers import Arrays, to_numpy
from pyro_lvm.inference_data.draws import dims_of
from pyro_lvm.marginal.log_marginal import Observations
from pyro_lvm.pair import Program
from pyro_lvm.terms import Terms

__all__ = ["constants", "observations"]


def observations(terms: Terms, plate: str) -> Arrays:
    """The observations, NaN where real numbers are missing, and what tells them from others."""
    values = dict(terms.observed)
    for name, mask in terms.masks.items():
        if values[name].is_floating_point():
            values[name] = values[name].masked_fill(~mask, torch.nan)
    return _rows({**values, "checksum": Observations.of(terms).checksum}, plate)


def constants(model: Program, args: tuple, kwargs: dict, terms: Terms, plate: str) -> Arrays:
    """Arguments with one entry per datum that are not observed."""
    try:
        named = dict(inspect.signature(model).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # a callable that does not say what it takes
        named = {f"argument_{i}": a for i, a in enumerate(args)} | kwargs
    found = {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor)
        and value.dim() > 0
        and len(value) == terms.num_data
        and not any(_equal(_seen(value, name, terms), v) for name, v in terms.observed.items())
    }
    return _rows(found, plate)


def _rows(values: Mapping[str, Tensor], plate: str) -> Arrays:
    return {n: ((plate, *dims_of(n, v, 1)), to_numpy(v)) for n, v in values.items()}


def _seen(value: Tensor, site: str, terms: Terms) -> Tensor:
    """An argument as it is observed at a site, if it is."""
    mask = terms.masks.get(site)
    if mask is None or mask.shape != value.shape:
        return value
    return torch.where(mask, value, torch.zeros_like(value))


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype == torch.bool != b.dtype:  # a mask, which every number can be made into
        return False
    return a.shape == b.shape and a.device == b.device and bool(torch.equal(a, b.to(a.dtype)))
