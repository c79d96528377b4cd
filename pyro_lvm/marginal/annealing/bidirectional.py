"""log p(x) between a lower and an upper bound, on data that a model has made up."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.infer.prior import sample_prior_sites
from pyro_lvm.marginal.annealing.annealer import Annealer, Settings, ready
from pyro_lvm.marginal.annealing.ends import Ends, Start, ends_of
from pyro_lvm.marginal.annealing.hamiltonian import HMC
from pyro_lvm.marginal.annealing.simulated import simulated_pair
from pyro_lvm.marginal.annealing.temperatures import Temperatures, schedule_of
from pyro_lvm.marginal.log_marginal import LogMarginal
from pyro_lvm.marginal.minibatches import in_minibatches
from pyro_lvm.marginal.noise import assumption_of
from pyro_lvm.pair import Program, device_of
from pyro_lvm.terms import sample_table

__all__ = ["BidirectionalBound", "bidirectional"]

_LARGE = 1.0  # nats; what is lost to annealing then matters in comparisons of models


@dataclass(frozen=True, repr=False)
class BidirectionalBound:
    """Log p(x_i) of simulated data between two bounds, in nats.

    Attributes:
        forward: The lower bound: from the start to the posterior.
        reverse: The upper bound: from the posterior to the start. The chains of a datum have their
            first state in common, so that its ``std_error`` is too short; that of a mean over data
            is right.
        observed: Site -> ``N x (nested plates) x event``, the data.
    """

    forward: LogMarginal
    reverse: LogMarginal
    observed: dict[str, Tensor]

    @classmethod
    def joined(cls, parts: Sequence["BidirectionalBound"]) -> "BidirectionalBound":
        """One bound of those of several minibatches, in their order."""
        first = parts[0]
        return cls(
            type(first.forward).joined([part.forward for part in parts]),
            type(first.reverse).joined([part.reverse for part in parts]),
            {name: torch.cat([p.observed[name] for p in parts]) for name in first.observed},
        )

    @property
    def gap(self) -> Tensor:
        """``N``, upper minus lower bound; noise can make it negative."""
        return self.reverse.log_prob - self.forward.log_prob

    @property
    def mean_gap(self) -> float:
        """The mean gap per datum: on average at least what annealing loses, forth and back."""
        return float(self.gap.mean())

    @property
    def mean_gap_std_error(self) -> float:
        """Standard error of `mean_gap`, by its spread over the data."""
        if len(self.gap) < 2:
            return math.nan
        return float(self.gap.std() / math.sqrt(len(self.gap)))

    def __str__(self) -> str:
        size = len(self.gap)
        lines = [
            f"log p(x) between {self.forward.mean:.3f} and {self.reverse.mean:.3f} nats per datum, "
            f"on average over {size} simulated data ({self.forward.method}, "
            f"{self.forward.num_samples} samples each way)",
            f"  gap {self.mean_gap:.3f} +- {self.mean_gap_std_error:.3f}, largest "
            f"{self.gap.max():.3f}",
        ]
        if not self.mean_gap <= _LARGE:
            lines.append(
                f"  warning: a gap above {_LARGE:g} nat. Log p(x) of real data is likely too low "
                f"by as much: {self.forward.advice[0].lower()}{self.forward.advice[1:]}"
            )
        return "\n".join(lines)

    __repr__ = __str__


@torch.no_grad()
def bidirectional(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int = 16,
    temperatures: int | Temperatures = 1000,
    start: Start = "prior",
    transition: HMC = HMC(),  # noqa: B008 - it can't be changed
    sites: Collection[str] | None = None,
    chunk_size: int | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    plate: str = "data",
    progress: bool = True,
    **kwargs: Any,
) -> BidirectionalBound:
    """Log p(x_i) of data that the model draws, between two bounds: how good is annealing here?

        z_i, x_i ~ p(z, x | g)
        forward:  log (1/K) sum_k w_ik,           chains from the start to the posterior
        reverse: -log (1/K) sum_k 1 / w'_ik,      chains from z_i back to the start

    The latent z_i that x_i was drawn with is an exact draw from its posterior, which real data do
    not come with. Chains that go from there through the kernels of the forward run in reverse order
    have E[1 / w'] = 1 / p(x_i), so that the forward value is too low and the reverse one too high
    on average, and the gap between them bounds the error of both (Grosse et al. 2015). A small gap
    on simulated data lends trust to `annealed_importance_sampling` with the same settings on real
    ones, as far as these are alike (Wu et al. 2017). All K chains of the reverse run begin at the
    one z_i: each of their means is unbiased, but they are not independent.

    The arguments say how many data to draw and what they are conditioned on. What the model is
    called with stays as it is, and only its observations are replaced, so that it remains the story
    that they come from; to start from the guide, the arguments that are the observations are
    replaced for the guide. With global latents there is one draw g from the guide for all data and
    chains, and the bounds are of log p(x_i | g).

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise; see `annealed_importance_sampling`.
        *args: The pair's arguments.
        num_samples: ``K``, the number of chains of each datum, each way.
        temperatures: See `annealed_importance_sampling`.
        start: Likewise.
        transition: Likewise.
        sites: Observed sites to draw, all in the plate if None. The others stay as observed, such
            as labels y where p(x | y) is in question.
        chunk_size: Chains that run at a time; chosen by the size of the data if None.
        batch_size: Data that are drawn and run at a time; all if None.
        dtype: See `annealed_importance_sampling`.
        plate: Name of the data plate.
        progress: Whether a terminal shows a progress bar for runs longer than two seconds.
        **kwargs: The pair's keyword arguments.

    Returns:
        Both bounds per datum, and the data.

    Raises:
        ValueError: If `annealed_importance_sampling` would refuse the pair; if observations can't
            be drawn from their density, as those of ``pyro.factor``; or if the start is the guide
            and its arguments do not hold the observations.

    References:
        Grosse, Ghahramani, Adams (2015), Sandwiching the marginal likelihood using bidirectional
        Monte Carlo. Wu, Burda, Salakhutdinov, Grosse (2017), On the quantitative analysis of
        decoder-based models.
    """
    settings = Settings(num_samples, schedule_of(temperatures), transition, chunk_size, progress)
    assumption = assumption_of(model)
    parts: list[BidirectionalBound] = []
    with ready(model, guide, args, kwargs, dtype) as (args, kwargs):
        ends = ends_of(model, guide, args, kwargs, plate=plate, start=start)

        def estimate(args: tuple, kwargs: dict, num_data: int) -> LogMarginal:
            parts.append(_bound(ends, args, kwargs, num_data, settings, sites, assumption))
            return parts[-1].forward

        in_minibatches(estimate, args, kwargs, ends.structure, batch_size)
    return BidirectionalBound.joined(parts)


def _bound(
    ends: Ends,
    args: tuple,
    kwargs: dict,
    num_data: int,
    settings: Settings,
    sites: Collection[str] | None,
    assumption: str | None,
) -> BidirectionalBound:
    """Draw data, and anneal both ways with the kernels of one pilot run."""
    model, guide = ends.original
    plate, start = str(ends.structure.plate), ends.start
    given = _globals_of(ends, args, kwargs)
    pair = simulated_pair(
        model,
        guide,
        args,
        kwargs,
        plate=plate,
        sites=sites,
        given={name: site["value"] for name, site in given.items()},
        guide_sees_them=start == "guide",
    )
    annealer = Annealer(
        ends_of(pair.model, pair.guide, args, kwargs, plate=plate, start=start),
        args,
        kwargs,
        num_data,
        settings,
        assumption=assumption,
        given={name: sample_table(site, plate)[0] for name, site in given.items()},
    )
    return BidirectionalBound(annealer.forward(), annealer.back(pair.latents), pair.observed)


def _globals_of(ends: Ends, args: tuple, kwargs: dict) -> dict[str, dict]:
    """One draw of the global latents from the guide, which all data and chains share."""
    guide = ends.original[1]
    if guide is None or not ends.global_latents:
        return {}
    with device_of(args, kwargs):
        return sample_prior_sites(guide, ends.global_latents, args, kwargs, given={})
