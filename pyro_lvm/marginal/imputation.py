"""What is missing in observations, drawn given what there is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_lvm.checks import check_count
from pyro_lvm.marginal.importance import check_proposal
from pyro_lvm.marginal.log_marginal import Observations
from pyro_lvm.marginal.progress import progress_bar
from pyro_lvm.marginal.sampling import samples_at_once
from pyro_lvm.marginal.weights import StreamingWeights
from pyro_lvm.pair import (
    PairStructure,
    Program,
    hold_globals,
    hold_subsamples,
    inspect_pair,
    no_guide,
)
from pyro_lvm.terms import Completion, Terms, complete

__all__ = ["Imputation", "impute"]

_FEW = 10


@dataclass(frozen=True)
class Imputation:
    """Draws of the missing entries of ``N`` incomplete data, with importance weights.

    Attributes:
        draws: Site -> ``K x N x (nested plates) x event``; what was observed is as it was.
        masks: Site -> ``N x (nested plates) x event``, True where an entry was observed.
        log_weight: ``K x N``, log p(x_o, z_k) / q(z_k | x_o), not normalised, nats; with global
            latents relative to the mean of the draws that share these.
        ess: ``N``, effective number of draws, (sum w)^2 / sum w^2.
        pareto_k: ``N``, shape of the tail of the weights, as in `LogMarginal`.
    """

    draws: dict[str, Tensor]
    masks: dict[str, Tensor]
    log_weight: Tensor
    ess: Tensor
    pareto_k: Tensor

    @property
    def num_samples(self) -> int:
        """``K``."""
        return len(self.log_weight)

    @property
    def weights(self) -> Tensor:
        """The weights of each datum's draws, ``K x N``, which add up to 1."""
        return torch.softmax(self.log_weight, 0)

    def mean(self, site: str | None = None) -> Tensor:
        """Estimates of E[x_m | x_o], ``N x (nested plates) x event``; x_o itself where observed.

            sum_k w_k x_mk / sum_k w_k

        Self-normalised importance sampling: consistent, with a bias of the order of 1 / K.

        Args:
            site: Which site; may be None if there is only one with a mask.
        """
        site = self._site(site)
        draws = self.draws[site]
        mean = (self._weights_of(draws) * draws).sum(0)
        return torch.where(self.masks[site], draws[0].to(mean), mean)

    def std_error(self, site: str | None = None) -> Tensor:
        """Standard errors of `mean` from sampling, by the delta method; 0 where observed.

            sqrt(sum_k w_k^2 (x_mk - mean)^2) / sum_k w_k

        Args:
            site: As for `mean`.
        """
        site = self._site(site)
        draws, mean = self.draws[site], self.mean(site)
        squares = (self._weights_of(draws) * (draws - mean)).square().sum(0)
        return torch.where(self.masks[site], 0.0, squares.sqrt())

    def resample(self, num_samples: int) -> dict[str, Tensor]:
        """Draws that all count alike: some of these, drawn by their weights, with replacement.

        Of few effective draws many are the same.

        Args:
            num_samples: ``S``.

        Returns:
            Site -> ``S x N x (nested plates) x event``.
        """
        check_count("num_samples", num_samples)
        chosen = torch.multinomial(self.weights.T, num_samples, replacement=True).T  # S x N
        data = torch.arange(chosen.shape[1], device=chosen.device)
        return {name: draws[chosen, data] for name, draws in self.draws.items()}

    @property
    def num_unreliable(self) -> int:
        """Data whose Pareto k is above 0.7."""
        return int((self.pareto_k > 0.7).sum())

    def __str__(self) -> str:
        size = len(self.ess)
        lines = [f"{self.num_samples} draws of what is missing in {size} data"]
        for name, mask in self.masks.items():
            missing = int((~mask).sum())
            share = missing / mask.numel()
            lines.append(f"  {name}: {missing} of {mask.numel()} entries ({share:.1%})")
        lines.append(
            f"  ESS median {self.ess.median():.0f}, least {self.ess.min():.1f}; "
            f"Pareto k > 0.7 at {self.num_unreliable} of {size} data"
        )
        return "\n".join([*lines, *(f"  warning: {w}" for w in self.warnings())])

    __repr__ = __str__

    def warnings(self) -> list[str]:
        """Reasons not to trust means and draws, each with what to do about it."""
        size, found = len(self.ess), []
        few = int((self.ess < _FEW).sum()) if self.num_samples > _FEW else 0
        if self.num_unreliable:
            found.append(
                f"Pareto k above 0.7 at {self.num_unreliable} of {size} data: rare draws carry "
                f"most of the weight there, and neither means nor their errors are to be trusted."
            )
        if few:
            found.append(f"fewer than {_FEW} effective draws at {few} of {size} data.")
        advice = (
            "The guide misses mass of the posterior given what is observed: take more samples, "
            "widen the guide (marginal.widened), or train it on incomplete data."
        )
        return [*found[:-1], f"{found[-1]} {advice}"] if found else []

    def _weights_of(self, draws: Tensor) -> Tensor:
        return self.weights.reshape(*self.weights.shape, *[1] * (draws.dim() - 2))

    def _site(self, site: str | None) -> str:
        if site is None and len(self.draws) == 1:
            return next(iter(self.draws))
        if site not in self.draws:
            raise ValueError(
                f"Expected one of the sites {list(self.draws)}; got {site!r}. Name it by site=."
            )
        return site


@torch.no_grad()
def impute(
    model: Program,
    guide: Program | None,
    *args: Any,
    num_samples: int = 100,
    chunk_size: int | None = None,
    plate: str = "data",
    progress: bool = True,
    **kwargs: Any,
) -> Imputation:
    """Draw the missing entries of observations given the observed ones.

        z_k ~ q(z | x_o),    w_k = p(x_o, z_k) / q(z_k | x_o),    x_mk ~ p(x_m | z_k, x_o)

    The draws with their weights stand for p(x_m | x_o), as K grows, whatever the guide (Mattei and
    Frellsen 2019, equation 12). What is missing is what masks say of the model's observed sites:
    `lvm.masked`, a model's own argument ``mask``, an `Incomplete` distribution or ``poutine.mask``.
    Sites that the model enumerates are drawn from their exact posterior, so that the draws of a
    mixture are exact and have equal weights.

    Global latents are drawn from the guide, as the posterior that it stands for. About the square
    root of ``num_samples`` draws share one draw of them, and are weighted among each other.

    Args:
        model: The model, called with ``args`` and ``kwargs``.
        guide: The guide, likewise; None if it samples nothing.
        *args: The pair's arguments.
        num_samples: ``K``. All draws are in memory.
        chunk_size: Samples in one vectorised run of the pair; chosen by the size of the data if
            None. With 1 the pair runs sample by sample without a dimension for particles.
        plate: Name of the data plate.
        progress: Whether a terminal shows a progress bar for runs longer than two seconds.
        **kwargs: The pair's keyword arguments.

    Returns:
        The draws.

    Raises:
        ValueError: If no observed site has a mask, or the guide is a point mass at a local latent.
    """
    check_count("num_samples", num_samples)
    guide = no_guide if guide is None else guide
    structure = inspect_pair(model, guide, args, kwargs, plate=plate)
    check_proposal(structure, structure.local_latents)
    if structure.subsampled:
        model, guide = hold_subsamples(model, guide, args, kwargs)
    grouped = _has_random_globals(structure)
    chunk = samples_at_once(structure, args, kwargs) if chunk_size is None else chunk_size
    check_count("chunk_size", chunk)
    draw = partial(
        complete,
        args=args,
        kwargs=kwargs,
        max_plate_nesting=structure.max_plate_nesting,
        summed_out=structure.model_enumerated,
        shared_globals=grouped,
        plate=plate,
    )
    parts: list[_Part] = []
    with progress_bar("imputation", num_samples, progress) as tick, pyro.validation_enabled(False):
        for group in _sizes(num_samples, math.isqrt(num_samples) if grouped else num_samples):
            pair = model, guide
            if grouped:
                pair = hold_globals(model, guide, args, kwargs, plate=plate)
            drawn = [draw(*pair, num_particles=size) for size in _sizes(group, chunk)]
            _check_masks(drawn[0].terms)
            parts.append(_Part.of(drawn, relative=grouped))
            tick(group)
    return _joined(parts, drawn[0].terms)


class _Part(NamedTuple):
    """Draws of one group, which have their global latents in common."""

    draws: dict[str, Tensor]
    log_weight: Tensor

    @classmethod
    def of(cls, drawn: Sequence[Completion], *, relative: bool) -> "_Part":
        """Several runs as one; the mean of the weights is 1 if they are relative ones."""
        log_weight = torch.cat([d.terms.log_weight for d in drawn])
        if relative:
            log_weight = log_weight - log_weight.logsumexp(0) + math.log(len(log_weight))
        names = drawn[0].values
        return cls({n: torch.cat([d.values[n] for d in drawn]) for n in names}, log_weight)


def _joined(parts: Sequence[_Part], terms: Terms) -> Imputation:
    log_weight = torch.cat([part.log_weight for part in parts])
    weights = StreamingWeights(len(log_weight))
    weights.add(log_weight)
    summary = weights.summary("imputation", Observations.of(terms))
    return Imputation(
        draws={n: torch.cat([part.draws[n] for part in parts]) for n in parts[0].draws},
        masks=terms.masks,
        log_weight=log_weight,
        ess=summary.ess,
        pareto_k=summary.pareto_k,
    )


def _sizes(total: int, most: int) -> list[int]:
    """How many at a time, nearly the same number each time."""
    times = math.ceil(total / most)
    return [total // times + (i < total % times) for i in range(times)]


def _has_random_globals(structure: PairStructure) -> bool:
    """Whether the guide draws global latents, as what it makes of an auxiliary site perhaps."""
    random = [n for n in structure.global_latents if n not in structure.point_masses]
    return bool(random) or bool(structure.global_latents and structure.auxiliary)


def _check_masks(terms: Terms) -> None:
    if not terms.masks:
        raise ValueError(
            f"Expected observed sites with a mask that says what is missing; got "
            f"{list(terms.observed)} without one. Wrap the model by "
            f"lvm.masked(model, x=~x.isnan()), or pass the mask that it takes."
        )
