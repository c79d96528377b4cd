"""How far a guide is from the posterior, and which part of that is the encoder's."""

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_lvm.checks import check_count
from pyro_lvm.diagnostics.estimates import Estimate
from pyro_lvm.diagnostics.tables import aligned
from pyro_lvm.marginal.importance import importance_sampling
from pyro_lvm.marginal.log_marginal import LogMarginal, Observations
from pyro_lvm.marginal.refined import refined
from pyro_lvm.marginal.sampling import samples_at_once
from pyro_lvm.pair import (
    PairStructure,
    Program,
    at_rest,
    hold_globals,
    hold_subsamples,
    inspect_pair,
    modules_of,
)
from pyro_lvm.terms import Terms, compute_terms

__all__ = ["InferenceGaps", "PerDatum", "amortisation_gap", "inference_gaps"]


@dataclass(frozen=True, eq=False)
class PerDatum:
    """A number for each of ``N`` data, in nats, with its error from sampling.

    Attributes:
        value: ``N``.
        std_error: ``N``, standard errors from sampling alone; nan for a single sample.
    """

    value: Tensor
    std_error: Tensor

    @property
    def mean(self) -> Estimate:
        """The mean over data and its standard error, from data and sampling."""
        return Estimate.of_mean(self.value)

    @property
    def sampling_std_error(self) -> float:
        """The part of the error of the mean that more samples would remove."""
        return float(self.std_error.square().sum().sqrt() / len(self.std_error))

    def __sub__(self, other: "PerDatum") -> "PerDatum":
        """The differences, from samples of their own."""
        return PerDatum(self.value - other.value, torch.hypot(self.std_error, other.std_error))


@dataclass(frozen=True, eq=False)
class InferenceGaps:
    """The gaps between log p(x) and the ELBO of a guide, in nats, per datum.

        log p(x_i) - ELBO_i(q)  =  [log p(x_i) - ELBO_i(q')]  +  [ELBO_i(q') - ELBO_i(q)]
        inference gap           =   approximation gap          +   amortisation gap

    q is the guide and q' the guide refined for each datum, the best of its family as far as the
    optimisation went. The ELBO of q' is too low where it has not converged, so that the first of
    the two is rather too large, and the second too small.

    Attributes:
        elbo: ELBO of the guide.
        refined_elbo: ELBO of the refined guide.
        log_prob: log p(x), estimated with the refined guide, or as it was given.
        score: The estimate of log p(x).
        refine_steps: Steps of the refinement.
        num_samples: Samples for each of the ELBOs.
    """

    elbo: PerDatum
    refined_elbo: PerDatum
    log_prob: PerDatum
    score: LogMarginal
    refine_steps: int
    num_samples: int

    @property
    def amortisation(self) -> PerDatum:
        """What the encoder loses, since it computes the parameters of all data."""
        return self.refined_elbo - self.elbo

    @property
    def approximation(self) -> PerDatum:
        """What the family of the guide loses, whatever its parameters."""
        return self.log_prob - self.refined_elbo

    @property
    def inference(self) -> PerDatum:
        """KL(q(z | x_i) || p(z | x_i)), the sum of both."""
        return self.log_prob - self.elbo

    def __str__(self) -> str:
        head = (
            f"Inference gaps over {len(self.elbo.value)} data, in nats per datum "
            f"({self.refine_steps} steps of refinement, {self.num_samples} samples)"
        )
        table = [["", "mean", "std error", "of it sampling"]]
        table += [_cells(name, each) for name, each in self._rows().items()]
        return "\n".join([head, *aligned(table), *(f"  warning: {w}" for w in self.warnings())])

    __repr__ = __str__

    def warnings(self) -> list[str]:
        """Reasons not to trust the gaps, each with what to do about it."""
        found = self.score.warnings()
        if _is_below(self.amortisation, 0.0):
            found.append(
                "The refined guide has a lower ELBO than the guide: take more refine_steps, or a "
                "smaller learning_rate."
            )
        if _is_below(self.approximation, 0.0):
            found.append(
                "log p(x) is below the ELBO of the refined guide, a bound of it: take more samples "
                "for it."
            )
        return found

    def _rows(self) -> dict[str, PerDatum]:
        return {
            "ELBO of the guide": self.elbo,
            "ELBO of the refined guide": self.refined_elbo,
            f"log p(x) ({self.score.method})": self.log_prob,
            "amortisation gap": self.amortisation,
            "approximation gap": self.approximation,
            "inference gap": self.inference,
        }


@torch.no_grad()
def inference_gaps(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 1000,
    refine_steps: int = 500,
    learning_rate: float = 0.1,
    score: LogMarginal | None = None,
    chunk_size: int | None = None,
    plate: str = "data",
    progress: bool = True,
    **kwargs: Any,
) -> InferenceGaps:
    """Split the gap between log p(x) and the ELBO into what encoder and family lose.

    The equation is that of `InferenceGaps`. The ELBOs are means of log p(x, z) / q(z | x) over the
    guide's draws, unbiased; log p(x) is by importance sampling from the refined guide (too low on
    average, by about half its squared standard error), or an estimate of your own.

    With global latents all of this is given one draw of them. Modules that the pair belongs to are
    in evaluation mode for the while.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise.
        *args: The pair's arguments.
        num_samples: ``K``, for each ELBO and for log p(x).
        refine_steps: Steps of the refinement, see `pyro_lvm.marginal.refined`.
        learning_rate: Its learning rate.
        score: log p(x) of these data, such as from annealed importance sampling; estimated if None.
        chunk_size: Samples in one vectorised run of the pair; chosen by the size of the data if
            None. With 1 the pair runs sample by sample, which suits programs that can't broadcast.
        plate: Name of the data plate.
        progress: Whether a terminal shows progress bars for what takes longer than two seconds.
        **kwargs: The pair's keyword arguments.

    Returns:
        The gaps per datum; they print as a table.

    Raises:
        ValueError: If the guide can't be refined, or the score is one of other data, or of other
            draws of global latents.

    Reference:
        Cremer, Li and Duvenaud 2018, "Inference suboptimality in variational autoencoders".
    """
    check_count("num_samples", num_samples)
    check_count("refine_steps", refine_steps)
    with at_rest(modules_of(model, guide)):
        structure = inspect_pair(model, guide, args, kwargs, plate=plate)
        _check_score(score, structure)
        pair = _held(model, guide, args, kwargs, structure)
        better = refined(
            *pair,
            *args,
            num_steps=refine_steps,
            learning_rate=learning_rate,
            plate=plate,
            progress=progress,
            num_particles=_particles(chunk_size),
            **kwargs,
        )
        settings: dict[str, Any] = {"num_samples": num_samples, "chunk_size": chunk_size}
        elbo, terms = _elbo(*pair, args, kwargs, structure, **settings)
        refined_elbo, _ = _elbo(pair[0], better, args, kwargs, structure, **settings)
        if score is None:
            score = importance_sampling(
                pair[0], better, *args, plate=plate, progress=progress, **settings, **kwargs
            )
        elif not score.observations.same_data(Observations.of(terms)):
            raise ValueError(
                "Expected a score of the data that the pair is called with; got one of other data, "
                "or in another order."
            )
    return InferenceGaps(
        elbo=elbo,
        refined_elbo=refined_elbo,
        log_prob=PerDatum(score.log_prob.to(elbo.value), score.std_error.to(elbo.value)),
        score=score,
        refine_steps=refine_steps,
        num_samples=num_samples,
    )


def amortisation_gap(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    structure: PairStructure,
    *,
    num_samples: int,
    refine_steps: int,
    chunk_size: int | None,
    progress: bool,
) -> PerDatum:
    """The gap that refinement closes, without log p(x); the arguments are of `inference_gaps`."""
    pair = _held(model, guide, args, kwargs, structure)
    plate = str(structure.plate)
    better = refined(
        *pair,
        *args,
        num_steps=refine_steps,
        plate=plate,
        progress=progress,
        num_particles=_particles(chunk_size),
        **kwargs,
    )
    settings: dict[str, Any] = {"num_samples": num_samples, "chunk_size": chunk_size}
    before, after = (
        _elbo(pair[0], g, args, kwargs, structure, **settings)[0] for g in (pair[1], better)
    )
    return after - before


def _particles(chunk_size: int | None) -> int:
    """Draws in a step of refinement, one for programs that are to run sample by sample."""
    return 1 if chunk_size == 1 else 4


def _held(
    model: Program, guide: Program, args: tuple, kwargs: dict, structure: PairStructure
) -> tuple[Program, Program]:
    if structure.subsampled:
        model, guide = hold_subsamples(model, guide, args, kwargs)
    return hold_globals(model, guide, args, kwargs, plate=str(structure.plate))


def _elbo(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    structure: PairStructure,
    *,
    num_samples: int,
    chunk_size: int | None,
) -> tuple[PerDatum, Terms]:
    """The mean of log p(x_i, z) - log q(z | x_i) over the guide's draws, and the last terms."""
    if chunk_size is None:
        chunk_size = samples_at_once(structure, args, kwargs)
    check_count("chunk_size", chunk_size)
    moments = _Moments()
    with pyro.validation_enabled(False):
        for start in range(0, num_samples, chunk_size):
            terms = compute_terms(
                model,
                guide,
                *args,
                num_particles=min(chunk_size, num_samples - start),
                plate=str(structure.plate),
                max_plate_nesting=structure.max_plate_nesting,
                **kwargs,
            )
            moments.add(terms.log_likelihood - sum(terms.kl.values()))
    return moments.mean(), terms


class _Moments:
    """The mean over draws that come in chunks, ``chunk x N``, in double precision."""

    def __init__(self) -> None:
        self.count = 0
        self.centre, self.total, self.squares = (torch.zeros(()) for _ in range(3))

    def add(self, draws: Tensor) -> None:
        """Take in a chunk."""
        draws = draws.double()
        if self.count == 0:
            self.centre = draws.mean(0)  # so that little is lost in the squares
        self.count += len(draws)
        self.total = self.total + (draws - self.centre).sum(0)
        self.squares = self.squares + (draws - self.centre).square().sum(0)

    def mean(self) -> PerDatum:
        """The mean of all chunks."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        freedom = self.count - 1 if self.count > 1 else math.nan
        return PerDatum(self.centre + mean, (variance / freedom).sqrt())


def _check_score(score: LogMarginal | None, structure: PairStructure) -> None:
    drawn = [n for n in structure.global_latents if n not in structure.point_masses]
    if score is not None and drawn:
        raise ValueError(
            f"Expected no score= where global latents are drawn, since the ELBOs are given one "
            f"draw of them; got one for {drawn}. Leave it out."
        )


def _is_below(each: PerDatum, bound: float) -> bool:
    mean, error = each.mean.value, each.sampling_std_error
    return mean < bound - 3 * error - 1e-6 * (1 + abs(mean))


def _cells(name: str, each: PerDatum) -> list[str]:
    mean = each.mean
    numbers = (mean.value, mean.std_error, each.sampling_std_error)
    return [f"  {name}", *(f"{number:.3f}" for number in numbers)]
