"""Importance weights of a pair in chunks of samples, which is all that is in memory at a time."""

from dataclasses import replace
from functools import partial

import pyro
from torch import Tensor

from pyro_lvm.checks import check_count
from pyro_lvm.marginal.chunks import in_chunks
from pyro_lvm.marginal.log_marginal import LogMarginal, Observations
from pyro_lvm.marginal.minibatches import in_minibatches
from pyro_lvm.marginal.noise import assumption_of
from pyro_lvm.marginal.progress import progress_bar
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
    batch_size: int | None,
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
        batch_size: Data at a time; all if None.
        method: What the estimate is called.
        advice: What to do where it is not to be trusted.
        progress: Whether a terminal shows a progress bar.
    """
    assumption = assumption_of(model)
    if structure.subsampled:
        model, guide = hold_subsamples(model, guide, args, kwargs)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)

    def estimate(args: tuple, kwargs: dict, num_data: int) -> LogMarginal:
        size = chunk_size or samples_at_once(replace(structure, num_data=num_data), args, kwargs)
        run = _Runs(model, guide, args, kwargs, structure)
        weights = StreamingWeights(num_samples)
        with progress_bar(method, num_samples, progress) as tick, pyro.validation_enabled(False):
            for chunk in in_chunks(run.log_weight, num_samples, size, tensors_in(args, kwargs)):
                weights.add(chunk)
                tick(len(chunk))
        return weights.summary(method, run.observations[0], advice=advice, assumption=assumption)

    return in_minibatches(estimate, args, kwargs, structure, batch_size)


class _Runs:
    """Runs of a pair on some arguments, for their weights; the first one keeps what they are of."""

    def __init__(
        self, model: Program, guide: Program, args: tuple, kwargs: dict, structure: PairStructure
    ) -> None:
        self.observations: list[Observations] = []
        self.terms = partial(
            compute_terms,
            model,
            guide,
            *args,
            plate=str(structure.plate),
            max_plate_nesting=structure.max_plate_nesting,
            **kwargs,
        )

    def log_weight(self, num_samples: int) -> Tensor:
        """The log-weights of new samples, ``num_samples x N``."""
        terms = self.terms(num_particles=num_samples)
        if not self.observations:
            self.observations.append(Observations.of(terms))
        return terms.log_weight


def samples_at_once(structure: PairStructure, args: tuple, kwargs: dict) -> int:
    """How many samples of all data to compute in one run of a pair."""
    on_cuda = any(t.is_cuda for t in tensors_in(args, kwargs))
    numbers = _NUMBERS["cuda" if on_cuda else "cpu"]
    rows = min(_MOST_ROWS, numbers // max(1, structure.values_per_datum))
    return max(1, rows // structure.num_data)


def tensors_in(args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
    """The tensors among the arguments of a pair."""
    return tuple(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
