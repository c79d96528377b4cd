"""The importance weighted bound and its parts, from runs that come in chunks."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lvm.terms import Terms

__all__ = ["Chunk", "Estimate"]


class Chunk(NamedTuple):
    """What is kept of a run.

    Attributes:
        log_weight: ``K x N``.
        reconstruction: The mean over particles and data.
        kl: Site -> likewise.
        global_kl: Of all global latents; the same for all particles.
        plate_scale: Data in all / data in this run.
        has_globals: Whether there are sites outside the plate.
    """

    log_weight: Tensor
    reconstruction: Tensor
    kl: dict[str, Tensor]
    global_kl: Tensor
    plate_scale: float
    has_globals: bool

    @classmethod
    def of(cls, terms: Terms) -> "Chunk":
        """The summary of a run."""
        return cls(
            log_weight=terms.log_weight,
            reconstruction=terms.log_likelihood.detach().mean(),
            kl={name: value.detach().mean() for name, value in terms.kl.items()},
            global_kl=terms.global_kl.mean(),
            plate_scale=terms.plate_scale,
            has_globals=terms.has_globals,
        )


class Estimate(NamedTuple):
    """The bound from all particles.

    Attributes:
        chunks: What is kept of each run.
        bound: L_K of each datum, ``N``.
    """

    chunks: list[Chunk]
    bound: Tensor

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> "Estimate":
        """The bound from chunks of particles."""
        chunks = list(chunks)
        log_weight = torch.cat([chunk.log_weight for chunk in chunks])
        return cls(chunks, log_weight.logsumexp(0) - math.log(len(log_weight)))

    @property
    def loss(self) -> Tensor:
        """The negative bound over all data."""
        first = self.chunks[0]
        return first.global_kl - first.plate_scale * self.bound.sum()

    def weights(self) -> list[Tensor]:
        """The normalised weights v, for each chunk ``K x N``, without a gradient."""
        log_weights = [chunk.log_weight.detach() for chunk in self.chunks]
        total = torch.cat(log_weights).logsumexp(0)
        return [torch.exp(log_weight - total) for log_weight in log_weights]

    @torch.no_grad()
    def parts(self) -> dict[str, Tensor]:
        """The parts of the loss, per datum."""
        first, counts = self.chunks[0], [float(len(chunk.log_weight)) for chunk in self.chunks]

        def mean(values: Iterable[Tensor]) -> Tensor:
            weighted = [v * (n / sum(counts)) for v, n in zip(values, counts, strict=True)]
            return torch.stack(weighted).sum()

        size = first.plate_scale * len(self.bound)
        kl = {name: mean(chunk.kl[name] for chunk in self.chunks) for name in first.kl}
        reconstruction = mean(chunk.reconstruction for chunk in self.chunks)
        parts = {"loss": self.loss.detach() / size, "reconstruction": reconstruction}
        parts |= {f"kl[{name}]": value for name, value in kl.items()}
        if first.has_globals:
            parts["kl[global]"] = first.global_kl.detach() / size
        parts["weighting"] = self.bound.detach().mean() - reconstruction + sum(kl.values())
        return parts
