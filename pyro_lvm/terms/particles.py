"""The plate over particles, around the sites of the data plate alone."""

from functools import cache
from typing import Any

from pyro.poutine.plate_messenger import PlateMessenger

from pyro_lvm.terms.sites import PARTICLES

__all__ = ["LocalParticles", "sharing_globals"]


@cache
def sharing_globals(base: Any) -> Any:
    """A subclass of an objective of Pyro's whose particles share what is outside of the data plate.

    Its instances take that plate's name as ``plate``.
    """
    return type(f"Shared{base.__name__}", (_SharingGlobals, base), {})


class _SharingGlobals:
    """Mixin for subclasses of ``pyro.infer.ELBO``."""

    num_particles: int
    max_plate_nesting: int

    def __init__(self, *, plate: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.plate = plate

    def _vectorized_num_particles(self, fn: Any) -> Any:
        dim = -self.max_plate_nesting
        return LocalParticles(self.num_particles, dim=dim, plate=self.plate)(fn)


class LocalParticles(PlateMessenger):
    """A vectorised plate over particles that sites outside of the data plate are not in.

    What is outside is drawn once, and all particles share it.

    Args:
        size: ``K``.
        dim: The plate's dimension, left of those of all other plates.
        plate: Name of the data plate.
    """

    def __init__(self, size: int, *, dim: int, plate: str) -> None:
        super().__init__(PARTICLES, size, dim=dim)
        self.plate = plate

    def _process_message(self, msg: Any) -> None:
        # the plates of the program are inside this one, and were there before
        if any(frame.name == self.plate for frame in msg["cond_indep_stack"]):
            super()._process_message(msg)
