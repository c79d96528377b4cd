"""Importance weights of a pair in chunks of samples, which is all that is in memory at a time."""

from typing import Any

import pyro
import torch
from tqdm.auto import tqdm

from pyro_lvm.checks import check_count
from pyro_lvm.marginal.log_marginal import LogMarginal, Observations
from pyro_lvm.marginal.weights import StreamingWeights
from pyro_lvm.pair import PairStructure, Program, hold_subsamples
from pyro_lvm.terms import compute_terms

__all__ = ["averaged_weights", "samples_at_once"]

# Numbers in a table of all samples and data: large enough for the matrix products, and small enough
# for the processor's allocator to use the same memory again and again (32 MB in glibc).
_NUMBERS = {"cpu": 3 * 2**21, "cuda": 2**26}
_MOST_ROWS = 2**15


def averaged_weights(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    structure: PairStructure,
    *,
    num_samples: int,
    chunk_size: int | None,
    method: str,
    advice: str,
    progress: bool,
) -> LogMarginal:
    """The logarithm of the mean importance weight of each datum.

    The pair was run by `inspect_pair` with Pyro's validation, and is run without it here, where it
    would look at every number once more.

    Args:
        model: The model.
        guide: The guide, from which samples come.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        structure: What the pair is made of.
        num_samples: ``K``.
        chunk_size: Samples at a time; what suits the data if None.
        method: What the estimate is called.
        advice: What to do where it is not to be trusted.
        progress: Whether a terminal shows a progress bar.
    """
    if structure.subsampled:
        model, guide = hold_subsamples(model, guide, args, kwargs)
    if chunk_size is None:
        chunk_size = samples_at_once(structure, args, kwargs)
    check_count("chunk_size", chunk_size)
    weights = StreamingWeights(num_samples)
    bar = tqdm(
        total=num_samples,
        desc=method,
        delay=2.0,
        disable=None if progress else True,
        leave=False,
    )
    with bar, pyro.validation_enabled(False):
        for start in range(0, num_samples, chunk_size):
            size = min(chunk_size, num_samples - start)
            terms = compute_terms(
                model,
                guide,
                *args,
                num_particles=size,
                plate=str(structure.plate),
                max_plate_nesting=structure.max_plate_nesting,
                **kwargs,
            )
            weights.add(terms.log_weight)
            bar.update(size)
    return weights.summary(method, Observations.of(terms), advice=advice)


def samples_at_once(structure: PairStructure, args: tuple, kwargs: dict) -> int:
    """How many samples of all data to compute in one run of a pair."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    on_cuda = any(t.is_cuda for t in tensors)
    numbers = _NUMBERS["cuda" if on_cuda else "cpu"]
    rows = min(_MOST_ROWS, numbers // max(1, structure.values_per_datum))
    return max(1, rows // structure.num_data)
