"""Values inside a distribution's support, for entries whose own value does not count."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

__all__ = ["inside_support"]


def inside_support(distribution: Any, like: Tensor) -> Tensor:
    """Something that a distribution can take, well inside its support where it has a boundary.

    There log-probability and gradient are finite, whatever stands at a missing entry, NaN too.

    Args:
        distribution: Any distribution.
        like: A value of it, ``... x event``, of which only shape, type and device count.

    Returns:
        A value that can be broadcast with ``like``; ``like`` itself if the support is not known.
    """
    try:
        support: Any = distribution.support
    except NotImplementedError:
        return like
    if support.is_discrete:
        return _least(support, like)
    to_support = _transform_to(support)
    if to_support is None:
        return like
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    shape = to_support.inverse_shape(like.shape)
    # no gradient through the bounds of a support: an entry that does not count has none
    return to_support(torch.zeros(shape, dtype=dtype, device=like.device)).detach().to(like.dtype)


def _transform_to(support: Any) -> Any:
    """Torch's transform from all of the reals; None if it has none."""
    try:
        return transform_to(support)
    except NotImplementedError:
        base = getattr(support, "base_constraint", None)  # of a mixture's components
        return None if base is None else _transform_to(base)


def _least(support: Any, like: Tensor) -> Tensor:
    """All in the first of several classes, or the least number."""
    if support.event_dim > 0:
        number = getattr(support, "upper_bound", 1)  # of trials, that a multinomial shares out
        first = torch.zeros_like(like)
        first[..., 0] = number
        return first
    bound = getattr(support, "lower_bound", 0)
    if support is constraints.boolean or not isinstance(bound, Tensor):
        return torch.full_like(like, bound)
    return bound.to(like)
