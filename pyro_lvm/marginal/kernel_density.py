"""log p(x) of stories without a density, by a kernel density around their draws."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lvm.checks import check_count, check_data
from pyro_lvm.distributions.bandwidth import best_bandwidth
from pyro_lvm.distributions.kernel_density import KernelDensity
from pyro_lvm.marginal.log_marginal import LogMarginal, Observations
from pyro_lvm.marginal.weights import StreamingWeights
from pyro_lvm.pair import Program
from pyro_lvm.terms import simulate

__all__ = ["kernel_density"]

_ADVICE = (
    "Few draws are near such a datum: take more, or state an observation noise "
    "(marginal.with_gaussian_noise) and use annealed_importance_sampling."
)


@torch.no_grad()
def kernel_density(
    model: Program,
    *args: Any,
    validation: Tensor,
    num_samples: int = 10_000,
    bandwidths: Sequence[float] | None = None,
    site: str | None = None,
    plate: str = "data",
    **kwargs: Any,
) -> LogMarginal:
    """Log p(x_i) by a Gaussian kernel around draws of the story (a Parzen window).

        log p(x_i) ~ log (1/S) sum_s N(x_i; x'_s, h^2 I),    x'_s ~ p(x)

    The bandwidth h is the one under which the validation data have the largest mean. This is how
    models without a density were compared (Breuleux et al. 2011, Goodfellow et al. 2014), and it
    says little of a model in many dimensions: it is the log-density of x' + h e, e ~ N(0, I),
    estimated by far too few draws, and prefers models that repeat training data (Theis et al.
    2016). The printed value says which kernel it rests on. Only the data in the plate are drawn:
    a conditional story is drawn given its own conditions, and these are averaged over.

    Args:
        model: The story, called with ``args`` and ``kwargs``, which contain the data to score.
        *args: The story's arguments.
        validation: Data to choose the bandwidth by, ``V x event``, not those that are scored.
        num_samples: ``S``.
        bandwidths: Values of h to choose from; if None, forty between .02 and 2 times the root mean
            square deviation of the validation data.
        site: The observed site to draw; may be None if there is only one.
        plate: Name of the data plate.
        **kwargs: The story's keyword arguments.

    Returns:
        The estimate per datum, and as the error that of ``S`` draws, given h.

    Raises:
        ValueError: If the story has no such site, or the validation data do not fit.
    """
    check_count("num_samples", num_samples)
    site, observed = _observed(model, args, kwargs, plate, site)
    check_data("validation", validation, floating=True)
    if validation.shape[1:] != observed.shape[1:]:
        raise ValueError(
            f"Expected validation data of shape {tuple(observed.shape[1:])} each, as at site "
            f"'{site}'; got {tuple(validation.shape[1:])}."
        )
    points = _draws(model, args, kwargs, plate, site, num_samples)
    bandwidth = best_bandwidth(points, validation.flatten(1), bandwidths)
    weights = StreamingWeights(num_samples)
    for chunk in KernelDensity(points, bandwidth).log_kernels(observed.flatten(1)):
        weights.add(chunk)
    return weights.summary(
        "kernel density",
        Observations.of_values({site: observed}, len(observed), "continuous"),
        advice=_ADVICE,
        assumption=(
            f"a Gaussian kernel of width {bandwidth:.3g} around draws of the story, chosen on "
            f"{len(validation)} validation data"
        ),
    )


def _observed(
    model: Program, args: tuple, kwargs: dict, plate: str, site: str | None
) -> tuple[str, Tensor]:
    """The site that is meant, and what is observed there."""
    observed = simulate(model, args, kwargs, plate=plate, sites=site and [site]).observed
    if len(observed) != 1:
        raise ValueError(
            f"Expected site= to say which observed site to draw; this story has {list(observed)}."
        )
    return next(iter(observed.items()))


def _draws(
    model: Program, args: tuple, kwargs: dict, plate: str, site: str, num_samples: int
) -> Tensor:
    """So many draws of a story, ``S x D``: each run gives as many as there are data."""
    parts: list[Tensor] = []
    while sum(map(len, parts)) < num_samples:
        run = simulate(model, args, kwargs, plate=plate, sites=[site])
        parts.append(run.drawn[site].flatten(1))
    return torch.cat(parts)[:num_samples]
