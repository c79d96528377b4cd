"""The record of an annealed estimate, which tells how its chains have moved."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_lvm.marginal.log_marginal import LogMarginal

__all__ = ["AnnealedLogMarginal"]

_FAR = 0.15  # of an acceptance rate from the one that was aimed at


@dataclass(frozen=True, repr=False)
class AnnealedLogMarginal(LogMarginal):
    """A `LogMarginal` from chains.

    Attributes:
        acceptance: ``N``, the mean rate at which the measured chains' proposals were accepted; nan
            without transitions.
        aim: The rate that the pilot run steered to.
        num_temperatures: T, the largest number of steps from 0 to 1 of any datum.
    """

    acceptance: Tensor = field(kw_only=True)
    aim: float = field(kw_only=True)
    num_temperatures: int = field(kw_only=True)

    @classmethod
    def joined(cls, parts: Sequence[LogMarginal]) -> LogMarginal:
        """One estimate of those of several minibatches, in their order."""
        chains = [part for part in parts if isinstance(part, AnnealedLogMarginal)]
        whole = super().joined(parts)
        assert isinstance(whole, AnnealedLogMarginal)
        return replace(
            whole,
            acceptance=torch.cat([part.acceptance for part in chains]),
            num_temperatures=max(part.num_temperatures for part in chains),
        )

    def __str__(self) -> str:
        first, *rest = super().__str__().splitlines()
        moved = f"  {self.num_temperatures} temperatures"
        if not self.acceptance.isnan().all():
            rate = float(self.acceptance.nanmean())
            moved += f"; {rate:.2f} of proposals accepted ({self.aim:g} aimed at)"
        return "\n".join([first, moved, *rest])

    def warnings(self) -> list[str]:
        """Reasons not to trust the estimate, each with what to do about it."""
        found, size = super().warnings(), len(self.acceptance)
        few = int((self.acceptance < self.aim - _FAR).sum())
        many = int((self.acceptance > self.aim + _FAR).sum())
        if few:
            found.append(
                f"chains have hardly moved at {few} of {size} data, as fewer proposals were "
                f"accepted than in the pilot run. Take more temperatures, or more pilot chains "
                f"(transition=HMC(num_pilots=...))."
            )
        if many:
            found.append(
                f"steps are shorter than they might be at {many} of {size} data, as more proposals "
                f"were accepted than in the pilot run. Take more temperatures, or more pilot "
                f"chains (transition=HMC(num_pilots=...))."
            )
        return found
