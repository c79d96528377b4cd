"""Where a Gaussian mixture starts: the clusters of k-means."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_lvm.models.gaussian_moments import Table, maximum_likelihood, moments_given

__all__ = ["clusters", "deviations_of"]


def deviations_of(x: Tensor, precision: float, *, spherical: bool) -> Tensor:
    """Standard deviations by feature, ``1 x D``, or the one of all, ``1 x 1``.

    Those that are only rounding are replaced by what is typical of the others.

    Args:
        x: ``N x D``.
        precision: That of the numbers that the data were made of.
        spherical: Whether all features have one.
    """
    variances = x.var(0, unbiased=False)
    varies = variances.sqrt() > precision * x.abs().amax(0)
    typical = variances[varies].mean() if varies.any() else torch.ones(()).to(x)
    variances = torch.where(varies, variances, typical)
    return (typical if spherical else variances).sqrt().reshape(1, -1)


def clusters(
    x: Tensor,
    shapes: Mapping[str, tuple[int, ...]],
    deviations: Tensor,
    least: Tensor,
    *,
    spherical: bool,
) -> Table:
    """The parameters of k-means clusters.

    Args:
        x: ``N x D`` (float64, CPU).
        shapes: Parameter -> its shape.
        deviations: Those of all data.
        least: The least ``scale``.
        spherical: Whether all features have one.
    """
    num_components = shapes["weights"][0]
    whole = Table(  # one Gaussian for all data, as many times as there are components
        torch.full(shapes["weights"], 1 / num_components).to(x),
        x.mean(0).expand(shapes["loc"]),
        deviations.expand(shapes["scale"]),
        torch.zeros(shapes["tril"]).to(x) if "tril" in shapes else None,
    )
    moments, _ = moments_given(x, whole, labels=_kmeans(x, num_components))
    start = maximum_likelihood(moments, whole, least, spherical=spherical)
    return start._replace(weights=(moments.counts + 1) / (len(x) + num_components))


def _kmeans(x: Tensor, num_clusters: int) -> Tensor:
    """Labels of k-means after a k-means++ start, ``N``."""
    from sklearn.cluster import KMeans

    if len(x) < num_clusters:
        raise ValueError(f"Expected at least {num_clusters} data to start from; got {len(x)}.")
    seed = int(torch.randint(2**31 - 1, ()))
    with warnings.catch_warnings():  # fewer distinct points than clusters: some start empty
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        fitted = KMeans(num_clusters, init="k-means++", n_init=1, random_state=seed).fit(x.numpy())
    return torch.as_tensor(fitted.labels_, dtype=torch.long)
