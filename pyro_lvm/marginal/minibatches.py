"""Estimates of many data, a minibatch at a time."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pyro_lvm.checks import check_count
from pyro_lvm.marginal.log_marginal import LogMarginal
from pyro_lvm.pair import PairStructure

__all__ = ["in_minibatches"]


def in_minibatches(
    estimate: Callable[[tuple, dict, int], LogMarginal],
    args: tuple,
    kwargs: dict,
    structure: PairStructure,
    batch_size: int | None,
) -> LogMarginal:
    """Estimate log p(x) of the data of some arguments, so many at a time.

    A minibatch is a slice of all tensors among the arguments whose first dimension is that of the
    data; other arguments are the same for all minibatches.

    Args:
        estimate: From arguments of the pair, and the number of data in them, to an estimate.
        args: Positional arguments of the pair.
        kwargs: Keyword arguments of the pair.
        structure: The structure of the pair for these arguments.
        batch_size: How many data at a time; None for all at once.

    Returns:
        The estimate for all data, in their order.

    Raises:
        ValueError: If the pair's data are not among its arguments, or if it subsamples.
    """
    size = structure.num_data
    if batch_size is None:
        return estimate(args, kwargs, size)
    check_count("batch_size", batch_size)
    _check_sliceable(args, kwargs, structure)

    def part(value: Any, start: int) -> Any:
        return value[start : start + batch_size] if _has_rows(value, size) else value

    parts = []
    for start in range(0, size, batch_size):
        some = tuple(part(a, start) for a in args)
        named = {name: part(a, start) for name, a in kwargs.items()}
        expected = min(batch_size, size - start)
        parts.append(estimate(some, named, expected))
        if len(parts[-1].log_prob) != expected:
            raise ValueError(
                f"Expected a pair whose plate has as many data as its arguments have rows; got "
                f"{len(parts[-1].log_prob)} data for {expected} rows. Make the plate of "
                f"len(x), or pass batch_size=None."
            )
    return type(parts[0]).joined(parts)


def _check_sliceable(args: tuple, kwargs: dict, structure: PairStructure) -> None:
    if structure.subsampled:
        raise ValueError(
            f"Expected a pair that sees all data of its arguments; got one that subsamples plate "
            f"'{structure.plate}'. Remove subsample_size, or pass batch_size=None."
        )
    if not any(_has_rows(a, structure.num_data) for a in (*args, *kwargs.values())):
        raise ValueError(
            f"Expected an argument with {structure.num_data} rows to take minibatches of; got "
            f"none. Hand the data to model and guide, or pass batch_size=None."
        )


def _has_rows(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size
