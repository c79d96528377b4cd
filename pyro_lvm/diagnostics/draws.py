"""Draws of the local latents of a pair, with their distributions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lvm.diagnostics.held import HeldPair
from pyro_lvm.diagnostics.latent_dimensions import LatentSummary, summarise
from pyro_lvm.marginal.progress import progress_over
from pyro_lvm.terms import Terms
from pyro_lvm.terms.latents import LatentTables

__all__ = ["Draws", "draw", "draw_prior"]

_NUMBERS = 2**22  # of latents in one run of a program, 32 MB in double precision

Run = Callable[[int], tuple[Terms, dict[str, LatentTables]]]


@dataclass(frozen=True, eq=False)
class Draws:
    """Draws of local latents.

    Attributes:
        latents: Site -> its tables, of all draws.
        samples: Site -> ``K x N x ...``, the values of some of the draws in the shape of the site,
            auxiliary sites too.
        auxiliary_kl: ``N``, the mean log q of the auxiliary sites; None if there are none.
    """

    latents: dict[str, LatentTables]
    samples: dict[str, Tensor]
    auxiliary_kl: Tensor | None

    @property
    def continuous(self) -> list[LatentTables]:
        """The tables of the continuous latents."""
        return [tables for tables in self.latents.values() if not tables.discrete]

    @property
    def kl(self) -> Tensor:
        """``N``, KL(q(z | x_i) || p(z)) of all latents together."""
        first, *others = (tables.kl.double().mean(0) for tables in self.latents.values())
        total = sum(others, first)
        return total if self.auxiliary_kl is None else total + self.auxiliary_kl

    def summaries(self, threshold: float) -> tuple[LatentSummary, ...]:
        """One for each latent."""
        return tuple(
            summarise(name, tables, self._kl_of(tables), threshold=threshold)
            for name, tables in self.latents.items()
        )

    def _kl_of(self, tables: LatentTables) -> Tensor | None:
        if self.auxiliary_kl is None:
            return tables.kl.double().mean(0)
        return self.kl if len(self.latents) == 1 else None  # auxiliary sites are of all of them


def draw(
    pair: HeldPair, num_samples: int, *, chunk_size: int | None = None, progress: bool = False
) -> Draws:
    """Draws of q(z | x_i), so many for each datum.

    Args:
        pair: The pair.
        num_samples: ``K``.
        chunk_size: Draws of each datum in one run; what suits the data if None.
        progress: Whether a terminal shows a progress bar for runs longer than two seconds.

    Raises:
        ValueError: If all that the guide draws in the plate are point masses.
    """
    return _draws(pair.posterior, num_samples, chunk_size, progress=progress)


def draw_prior(pair: HeldPair, num_samples: int, *, chunk_size: int | None = None) -> Draws:
    """Draws of p(z) for the same data, so many for each."""
    return _draws(pair.prior, num_samples, chunk_size, progress=False)


def _draws(run: Run, num_samples: int, chunk_size: int | None, *, progress: bool) -> Draws:
    runs = list(_runs(run, num_samples, chunk_size, progress=progress))
    first, tables = runs[0]
    auxiliary = [name for name in first.log_guide if name not in tables]
    points = [name for name, each in tables.items() if each.point_mass]
    if points == list(tables) and not auxiliary:
        raise ValueError(
            f"Expected a guide with a distribution at its local latents; got point masses at "
            f"{points}. Use a guide that samples, an AutoNormal for one."
        )
    kl = [torch.stack([terms.kl[n] for n in auxiliary]).sum(0) for terms, _ in runs if auxiliary]
    return Draws(
        latents={name: LatentTables.joined([each[name] for _, each in runs]) for name in tables},
        samples=first.samples,
        auxiliary_kl=torch.cat(kl).double().mean(0) if kl else None,
    )


def _runs(
    run: Run, num_samples: int, chunk_size: int | None, *, progress: bool
) -> Iterator[tuple[Terms, dict[str, LatentTables]]]:
    """Runs of a program, each with as many particles as memory is meant for."""
    if chunk_size is None:
        terms, latents = run(1)
        width = sum(each.values.shape[-1] for each in latents.values())
        chunk_size = max(1, _NUMBERS // (terms.num_data * max(1, width)))
    starts = range(0, num_samples, chunk_size)
    for start in progress_over(starts, "draws", progress):
        yield run(min(chunk_size, num_samples - start))
