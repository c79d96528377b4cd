"""log p(x) by plain averages over latents that have seen no data."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_lvm.checks import check_count
from pyro_lvm.distributions.uniform_over import UniformOver
from pyro_lvm.infer.prior import prior_guide
from pyro_lvm.marginal.log_marginal import LogMarginal
from pyro_lvm.marginal.sampling import averaged_weights
from pyro_lvm.pair import Program, device_of, inspect_pair, unmasked, untouched_random_state

__all__ = ["naive_monte_carlo"]

_ADVICE = (
    "Hardly any latent drawn from the prior explains such a datum: use importance_sampling with a "
    "guide that has seen it, or annealed_importance_sampling."
)


@torch.no_grad()
def naive_monte_carlo(
    model: Program,
    *args: Any,
    num_samples: int = 1000,
    uniform: Sequence[str] = (),
    chunk_size: int | None = None,
    batch_size: int | None = None,
    plate: str = "data",
    progress: bool = True,
    **kwargs: Any,
) -> LogMarginal:
    """Log p(x_i) by Monte Carlo over the prior.

        log p(x_i) ~ log (1/K) sum_k p(x_i | z_k),    z_k ~ p(z)

    For a discrete latent in ``uniform``, which has the values Z, the sum over them is estimated by
    values that are drawn alike:

        p(x_i) = |Z| E_uniform[p(x_i, z)] ~ |Z| (1/K) sum_k p(x_i, z_k),    z_k ~ uniform(Z)

    Both means are unbiased for p(x_i), and useless where the posterior is a small part of the
    prior: their relative variance grows exponentially with the information that x_i has about z.
    They are here to be compared with estimators that use a guide. All latents are drawn, those that
    the model would enumerate too (`exact` sums these), and each datum has draws of its own. With
    global latents the value is that of the prior predictive density.

    Args:
        model: The model, called with ``args`` and ``kwargs``; no guide.
        *args: The model's arguments.
        num_samples: ``K``.
        uniform: Names of discrete latents to draw uniformly.
        chunk_size: Samples in one vectorised run of the model; chosen by the size of the data if
            None.
        batch_size: Data in one run of the model; all if None.
        plate: Name of the data plate.
        progress: Whether a terminal shows a progress bar for runs longer than two seconds.
        **kwargs: The model's keyword arguments.

    Returns:
        The estimate per datum, with standard error, effective sample size and Pareto k.

    Raises:
        ValueError: If the model has no plate of that name, or a site in ``uniform`` is no latent
            with finitely many values.
    """
    check_count("num_samples", num_samples)
    latents = _latents(model, args, kwargs)
    _check_known(uniform, latents)
    guide = prior_guide(model, latents)
    guide = unmasked(_Uniform(frozenset(uniform))(guide), uniform)
    story = unmasked(model, uniform)
    structure = inspect_pair(story, guide, args, kwargs, plate=plate)
    return averaged_weights(
        story,
        guide,
        args,
        kwargs,
        structure,
        num_samples=num_samples,
        chunk_size=chunk_size,
        batch_size=batch_size,
        method="naive Monte Carlo",
        advice=_ADVICE,
        progress=progress,
    )


def _latents(model: Program, args: tuple, kwargs: dict) -> list[str]:
    """The latent sites of a model, in its order."""
    with poutine.block(), untouched_random_state(args, kwargs), device_of(args, kwargs):
        nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
    return [
        name
        for name, site in nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    ]


def _check_known(uniform: Sequence[str], latents: Sequence[str]) -> None:
    unknown = [name for name in uniform if name not in latents]
    if isinstance(uniform, str) or unknown:
        raise ValueError(
            f"Expected uniform to be a list of latents of the model, which are {list(latents)}; "
            f"got {uniform!r}."
        )


class _Uniform(Messenger):
    """Draws discrete sites uniformly over their values, with that density."""

    def __init__(self, sites: frozenset[str]) -> None:
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.sites or msg["is_observed"] or msg["done"]:
            return
        fn = msg["fn"]
        if not getattr(fn, "has_enumerate_support", False):
            raise ValueError(
                f"Expected latents with finitely many values in uniform; got "
                f"{type(fn).__name__} at site '{msg['name']}'. Leave it to the prior."
            )
        values = fn.enumerate_support(expand=False)
        values = values.reshape(len(values), *values.shape[values.dim() - fn.event_dim :])
        # the prior's plates, not its parameters, have expanded it: values are the same for all data
        msg["fn"] = UniformOver(values, fn.batch_shape)
