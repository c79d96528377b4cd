"""Draws of a model's local latents from its prior, at the cost of the prior alone."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_lvm.pair import Program

__all__ = ["sample_prior_sites"]


def sample_prior_sites(
    model: Program,
    sites: Iterable[str],
    args: tuple,
    kwargs: dict,
    *,
    given: Mapping[str, Any],
) -> dict[str, dict]:
    """Run a model forward as far as the last of some latent sites, and return these sites.

    The run stops right behind the last site, so no decoder is evaluated. What the model conditions
    on stays as it is: its arguments, the observed sites on the way, and the values in ``given``
    (global latents, the indices of subsampled plates). So the draws are from p(z | given), for
    conditional stories and learned priors too, with gradients where the prior is reparameterised.

    Args:
        model: The model.
        sites: Names of the latent sites to draw.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
        given: Site -> value for sites that are not to be drawn.

    Returns:
        Site -> the site as Pyro's trace would hold it, with ``value``, ``fn`` and plates.

    Raises:
        ValueError: If the model ends before all sites are drawn.
    """
    draws = _UntilDrawn(frozenset(sites), given)
    with contextlib.suppress(_AllDrawn), poutine.block(), draws:
        model(*args, **kwargs)
    missing = draws.wanted - set(draws.sites)
    if missing:
        raise ValueError(f"Expected latent sites {sorted(missing)} in the model; it has none such.")
    return draws.sites


class _AllDrawn(Exception):  # noqa: N818 - not an error: it leaves the model early
    """Leaves the model behind the last site that is wanted."""


class _UntilDrawn(Messenger):
    def __init__(self, wanted: frozenset[str], given: Mapping[str, Any]) -> None:
        super().__init__()
        self.wanted, self.given = wanted, given
        self.sites: dict[str, dict] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.given and msg["name"] not in self.wanted:
            msg["value"] = self.given[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.wanted and not site_is_subsample(msg):
            self.sites[msg["name"]] = msg.copy()
            if len(self.sites) == len(self.wanted):
                raise _AllDrawn
