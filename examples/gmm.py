"""A Gaussian mixture: EM and SVI, how many components, and the posterior of its parameters.

The label of a datum is summed out,

    p(x) = sum_c weights_c N(x; loc_c, S_c),

so that the likelihood is exact, and EM and SVI climb the same hill. For Old Faithful (durations of
eruptions and waiting times, in minutes) its height is known from the literature. More components
always climb higher; how many there are is asked of data left out, five times a fifth of them, by
log p(x) with paired errors.

With priors on the parameters the story is Bayesian, and its posterior has a mode for each order of
the components: p(x) is the same for all of them. Chains of NUTS find any of these, a guide finds
one, and R-hat of loc_1 is about which one, not about convergence. Relabelling makes them one: here
every draw has its components ordered by their first coordinate (the duration), after sampling. This
is harmless where the components are far apart in it, as they are, and arbitrary where they overlap.

    python examples/gmm.py                        # two digits of scikit-learn, on two axes
    python examples/gmm.py --data folder          # with folder/faithful/faithful.csv
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
import xarray as xr
from common import parser, ready, save
from matplotlib.patches import Ellipse
from nuts import nuts
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from torch import Tensor

import pyro_lvm as lvm
from pyro_lvm.inference_data import summarize

AXES = {True: ("duration, min", "waiting time, min"), False: ("first axis", "second axis")}
PUBLISHED = {  # log-likelihood of Old Faithful at the maximum, nats over 272 data
    (1, "full"): -1289.7967,
    (2, "full"): -1130.2640,
    (2, "tied"): -1140.1868,
    (2, "diagonal"): -1147.8064,
    (2, "spherical"): -1709.5293,
}
MOST_COMPONENTS, FOLDS = 4, 5


def main() -> None:
    options = parser(__doc__, epochs=1000)
    options.add_argument("--draws", type=int, default=500, help="of each chain of NUTS")
    args = ready(options.parse_args())
    x = load(args.data)
    print(f"{len(x)} data. Log-likelihood in nats at the maximum, by EM and by SVI:")
    print(f"{likelihoods(x, args).round(4).to_string()}\n")
    print(f"log p(x) of {FOLDS} fifths, each left out once, nats per datum:")
    comparison = lvm.compare(held_out(x, args))
    print(f"{comparison.round(3).to_string()}\n")
    standard = (x - x.mean(0)) / x.std(0)
    posteriors = bayesian(standard, args)
    names = ["weights", "loc", "scale"]
    print("Posterior of two components as drawn, data standardised; R-hat sees the labels:")
    print(f"{summarize(posteriors, ['loc']).round(3).to_string()}\n")
    relabelled = {name: ordered(idata) for name, idata in posteriors.items()}
    print("The same, components ordered by their first coordinate in every draw:")
    print(summarize(relabelled, names).round(3).to_string())
    draw(x, comparison, posteriors, relabelled, args)


def load(folder: Path | None) -> Tensor:
    """Old Faithful, or zeros and ones among scikit-learn's digits on two principal axes."""
    if folder is not None:
        return lvm.datasets.old_faithful(folder)
    data = lvm.datasets.digits()
    x = data.train[data.train_labels < 2].double()
    return (x - x.mean(0)) @ torch.linalg.svd(x - x.mean(0))[2][:2].T


def build(x: Tensor, components: int = 2, covariance: str = "full") -> lvm.GaussianMixture:
    """A mixture that starts from k-means."""
    torch.manual_seed(0)  # the same start for EM and SVI
    mixture = lvm.GaussianMixture(components, x.shape[1], covariance)
    return mixture.to(x.dtype).initialize(x)


def train(mixture: lvm.GaussianMixture, x: Tensor, args: argparse.Namespace) -> lvm.Fit:
    """SVI: all data are one batch and nothing is drawn, so that this is gradient ascent."""
    return lvm.fit(
        mixture.model,
        mixture.guide,
        x,
        elbo=lvm.TraceInfo_ELBO(max_plate_nesting=1),
        epochs=args.epochs,
        batch_size=len(x),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, args.epochs),
        device="cpu",  # a few numbers: a GPU would wait
        compile=False,
    )


def likelihoods(x: Tensor, args: argparse.Namespace) -> pd.DataFrame:
    """The total log-likelihood of every covariance, beside what is published."""
    rows = {}
    for (components, covariance), published in PUBLISHED.items():
        by_em, by_svi = (build(x, components, covariance) for _ in range(2))
        by_em.fit_em(x, max_iterations=args.epochs, tolerance=1e-10)
        train(by_svi, x, args)
        rows[f"{components} {covariance}"] = {
            "EM": by_em.log_prob(x).sum().item(),
            "SVI": by_svi.log_prob(x).sum().item(),
        } | ({} if args.data is None else {"published": published})
    return pd.DataFrame(rows).T


def held_out(x: Tensor, args: argparse.Namespace) -> dict[str, lvm.LogMarginal]:
    """Cross-validated log p(x) by number of components."""
    folds = torch.randperm(len(x)).chunk(FOLDS)
    scores = {}
    for components in range(1, MOST_COMPONENTS + 1):
        parts = [left_out(x, fold, components, args) for fold in folds]
        scores[f"C = {components}"] = lvm.LogMarginal.joined(parts)
    return scores


def left_out(x: Tensor, fold: Tensor, components: int, args: argparse.Namespace) -> lvm.LogMarginal:
    """Log p(x_i) of some data by a mixture that was fitted to the others."""
    rest = torch.ones(len(x), dtype=torch.bool)
    rest[fold] = False
    mixture = build(x[rest], components)
    mixture.fit_em(x[rest], max_iterations=args.epochs)
    return lvm.marginal.exact(mixture.model, mixture.guide, x[fold])


def bayesian(x: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The posterior of weights, means and scales by NUTS and by SVI."""
    start = build(x, covariance="diagonal")
    start.fit_em(x, max_iterations=args.epochs)
    mixture = story(x, start.values())
    draws = min(args.draws, args.samples)
    chains = nuts(mixture.model, x, draws=draws, warmup=300)
    train_guide(mixture, x, args)
    return {
        "NUTS": lvm.to_arviz(mixture.model, chains, x, predictive=False),
        "SVI": lvm.to_arviz(
            mixture.model, mixture.guide, x, num_samples=2 * draws, predictive=False
        ),
    }


def story(x: Tensor, values: dict[str, Tensor]) -> lvm.GaussianMixture:
    """A mixture with priors; its guide, a normal of full covariance, starts at these values."""
    shape, zero = (2, x.shape[1]), torch.zeros((), dtype=x.dtype)
    values = {name: value.detach() for name, value in values.items()}
    return lvm.GaussianMixture(
        *shape,
        "diagonal",
        priors={
            "weights": dist.Dirichlet(torch.ones(2, dtype=x.dtype)),
            "loc": dist.Normal(zero, 2.0).expand(shape).to_event(2),
            "scale": dist.LogNormal(zero - 1, 1.0).expand(shape).to_event(2),
        },
        autoguide=partial(
            AutoMultivariateNormal, init_loc_fn=init_to_value(values=values), init_scale=0.05
        ),
    ).to(x.dtype)


def train_guide(mixture: lvm.GaussianMixture, x: Tensor, args: argparse.Namespace) -> lvm.Fit:
    """SVI of the guide, with draws of the parameters."""
    return lvm.fit(
        mixture.model,
        mixture.guide,
        x,
        elbo=lvm.TraceInfo_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1),
        epochs=args.epochs,
        batch_size=len(x),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, args.epochs),
        device="cpu",
        compile=False,
    )


def ordered(idata: Any) -> dict[str, Any]:
    """The posterior with its components in the order of their first coordinate, draw by draw."""
    posterior = idata["posterior"]
    order = posterior["loc"].values[..., 0].argsort(-1)  # chain x draw x component
    arrays = {}
    for name in ("weights", "loc", "scale"):
        values = posterior[name].values
        index = order.reshape(order.shape + (1,) * (values.ndim - order.ndim))
        arrays[name] = (posterior[name].dims, np.take_along_axis(values, index, axis=2))
    return {"posterior": xr.Dataset(arrays, coords=dict(posterior.coords))}


def draw(
    x: Tensor,
    comparison: pd.DataFrame,
    posteriors: dict[str, Any],
    relabelled: dict[str, Any],
    args: argparse.Namespace,
) -> None:
    """Data and components, held-out scores, and the densities of the parameters."""
    figure, axes = plt.subplots(2, 3, figsize=(16, 9.6), layout="constrained")
    draw_components(axes[0, 0], x, args)
    lvm.plots.plot_comparison(comparison, ax=axes[0, 1])
    plot = lvm.plots.plot_densities
    draw_traces(axes[0, 2], posteriors)
    plot(relabelled, "loc", {"loc_dim_0": 0, "loc_dim_1": 0}, ax=axes[1, 0])
    plot(relabelled, "scale", {"scale_dim_0": 0, "scale_dim_1": 0}, ax=axes[1, 1])
    plot(relabelled, "weights", {"weights_dim_0": 0}, ax=axes[1, 2])
    for ax in axes[1]:
        ax.set_title("The component on the left, by relabelling")
    save(figure, args, "gmm")


def draw_traces(ax: Any, posteriors: dict[str, Any]) -> None:
    """The first coordinate of what each chain calls the first mean."""
    for name, idata in posteriors.items():
        for c, trace in enumerate(idata["posterior"]["loc"].values[..., 0, 0]):
            ax.plot(trace, linewidth=0.7, label=f"{name}, chain {c + 1}")
    ax.set(xlabel="draw", ylabel="loc[0, 0]", title="As drawn: which component is first is chance")
    ax.legend(fontsize="small", frameon=False)


def draw_components(ax: Any, x: Tensor, args: argparse.Namespace) -> None:
    """The data, coloured by the responsibility of a component, with ellipses of two deviations."""
    mixture = build(x)
    mixture.fit_em(x, max_iterations=args.epochs)
    share = mixture.responsibilities(x)[:, 0].detach()
    points = ax.scatter(*x.T, c=share, cmap="coolwarm", s=14, vmin=0, vmax=1)
    ax.figure.colorbar(points, ax=ax, label="responsibility p(z = 0 | x)")
    for loc, covariance in zip(mixture.loc.detach(), mixture.covariances().detach(), strict=True):
        ax.add_patch(ellipse(loc, covariance))
    xlabel, ylabel = AXES[args.data is not None]
    ax.set(xlabel=xlabel, ylabel=ylabel, title="Two components by EM")


def ellipse(loc: Tensor, covariance: Tensor) -> Ellipse:
    """Where a Gaussian is at two standard deviations."""
    variances, axes = torch.linalg.eigh(covariance)
    width, height = (4 * variances.sqrt()).tolist()
    angle = torch.rad2deg(torch.atan2(axes[1, 0], axes[0, 0])).item()
    return Ellipse(loc.tolist(), width, height, angle=angle, fill=False, color="black")


if __name__ == "__main__":
    main()
