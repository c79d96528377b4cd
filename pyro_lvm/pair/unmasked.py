"""Programs without the masks of some latents."""

from collections.abc import Collection
from typing import Any

from pyro.poutine.messenger import Messenger

from pyro_lvm.pair.programs import Program

__all__ = ["unmasked"]


def unmasked(program: Program, names: Collection[str]) -> Program:
    """A program in which a mask takes nothing from the log-probability of some sites.

    A latent that is summed over, or drawn from another distribution than its own, needs its prior:
    without it the sum over its values would not be one.
    """
    return _Unmasked(names)(program)


class _Unmasked(Messenger):
    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["mask"] = None
