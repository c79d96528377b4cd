"""Importance weights of a pair in chunks of samples, which is all that is in memory at a time."""

import pyro
from torch import Tensor
from tqdm.auto import tqdm

from pyro_lvm.checks import check_count
from pyro_lvm.marginal.chunks import in_chunks
from pyro_lvm.marginal.log_marginal import LogMarginal, Observations
from pyro_lvm.marginal.noise import assumption_of
from pyro_lvm.marginal.weights import StreamingWeights
from pyro_lvm.pair import PairStructure, Program, hold_subsamples
from pyro_lvm.terms import compute_terms

__all__ = ["averaged_weights", "samples_at_once"]

# Numbers in a table of all samples and data: large enough for the matrix products, and small enough
# to stay in a processor's cache until they are summed.
_NUMBERS = {"cpu": 3 * 2**20, "cuda": 2**26}
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
    assumption = assumption_of(model)
    if structure.subsampled:
        model, guide = hold_subsamples(model, guide, args, kwargs)
    if chunk_size is None:
        chunk_size = samples_at_once(structure, args, kwargs)
    check_count("chunk_size", chunk_size)
    observations: list[Observations] = []

    def log_weight(size: int) -> Tensor:
        terms = compute_terms(
            model,
            guide,
            *args,
            num_particles=size,
            plate=str(structure.plate),
            max_plate_nesting=structure.max_plate_nesting,
            **kwargs,
        )
        if not observations:
            observations.append(Observations.of(terms))
        return terms.log_weight

    weights = StreamingWeights(num_samples)
    bar = tqdm(
        total=num_samples,
        desc=method,
        delay=2.0,
        disable=None if progress else True,
        leave=False,
    )
    devices = tuple(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
    with bar, pyro.validation_enabled(False):
        for chunk in in_chunks(log_weight, num_samples, chunk_size, devices):
            weights.add(chunk)
            bar.update(len(chunk))
    return weights.summary(method, observations[0], advice=advice, assumption=assumption)


def samples_at_once(structure: PairStructure, args: tuple, kwargs: dict) -> int:
    """How many samples of all data to compute in one run of a pair."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    on_cuda = any(t.is_cuda for t in tensors)
    numbers = _NUMBERS["cuda" if on_cuda else "cpu"]
    rows = min(_MOST_ROWS, numbers // max(1, structure.values_per_datum))
    return max(1, rows // structure.num_data)
