"""A pair as plain distributions of its local latents, with all else held as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_lvm.infer.prior import latent_story, prior_guide
from pyro_lvm.pair import PairStructure, Program, hold_globals, hold_subsamples
from pyro_lvm.terms import Terms, terms_at
from pyro_lvm.terms.latents import LatentTables, latent_tables

__all__ = ["HeldPair", "hold"]


@dataclass(frozen=True, eq=False)
class HeldPair:
    """The local latents of a pair as random variables.

    Attributes:
        model: The model.
        story: The model as far as its last local latent.
        guide: The guide, with nothing enumerated.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        structure: What the pair is made of.
    """

    model: Program
    story: Program
    guide: Program
    args: tuple
    kwargs: dict
    structure: PairStructure

    def posterior(self, num_particles: int) -> tuple[Terms, dict[str, LatentTables]]:
        """Draws of q(z | x_i) for each datum, and their distributions."""
        return self._run(self.guide, num_particles)

    def prior(self, num_particles: int) -> tuple[Terms, dict[str, LatentTables]]:
        """Draws of p(z) for each datum, and their distributions."""
        sites = self.structure.local_latents
        return self._run(prior_guide(self.model, sites), num_particles)

    def at(self, values: Mapping[str, Tensor]) -> Terms:
        """The densities at given values, ``K x N x ...``."""
        return terms_at(self.story, self.guide, values, *self.args, **self._places(), **self.kwargs)

    def _run(self, guide: Program, count: int) -> tuple[Terms, dict[str, LatentTables]]:
        return latent_tables(
            self.story, guide, *self.args, num_particles=count, **self._places(), **self.kwargs
        )

    def _places(self) -> dict[str, Any]:
        nesting = self.structure.max_plate_nesting
        return {"plate": str(self.structure.plate), "max_plate_nesting": nesting}


def hold(
    model: Program, guide: Program, args: tuple, kwargs: dict, structure: PairStructure
) -> HeldPair:
    """A pair as the distributions of its local latents.

    Subsampled plates keep one minibatch and global latents one draw of the guide, which all runs
    have in common. Sites that the guide enumerates are drawn. A user's own ``poutine.scale`` is
    left away, since a density to a power is none.

    Args:
        model: The model.
        guide: The guide.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        structure: What the pair is made of.
    """
    if structure.subsampled:
        model, guide = hold_subsamples(model, guide, args, kwargs)
    model, guide = hold_globals(model, guide, args, kwargs, plate=str(structure.plate))
    model, guide = (
        _Unscaled(str(structure.plate))(poutine.infer_config(p, config_fn=_Drawn(structure)))
        for p in (model, guide)
    )
    story = latent_story(model, structure.local_latents)
    return HeldPair(model, story, guide, args, kwargs, structure)


class _Drawn:
    """Settings of sites with which the guide's local latents are drawn."""

    def __init__(self, structure: PairStructure) -> None:
        self.names = frozenset([*structure.local_latents, *structure.auxiliary])

    def __call__(self, site: dict) -> dict:
        return {**site["infer"], "enumerate": None} if site["name"] in self.names else {}


class _Unscaled(Messenger):
    """Leaves no scale on the sites in the data plate but the plate's own."""

    def __init__(self, plate: str) -> None:
        super().__init__()
        self.plate = plate

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate and not site_is_subsample(msg):
                msg["scale"] = (frame.full_size or frame.size) / frame.size
