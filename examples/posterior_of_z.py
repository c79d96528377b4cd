"""How good is q(z | x)? A VAE's amortised guide beside NUTS and quadrature, image by image.

A VAE codes an image by one pass through its encoder, q(z | x) = N(m(x), diag s(x)^2). What it
stands for is the posterior under the decoder,

    p(z | x) = p(x | z) p(z) / p(x),    KL(q(z | x) || p(z | x)) = log p(x) - ELBO(x),

which two latents let us see: on a grid the integral p(x) is a sum, exact to all digits shown, and
NUTS samples p(z | x) from the same Pyro model with the decoder held fixed. Three test images are
chosen by the effective sample size of q(z | x) as a proposal: the worst, the median, the best.

    python examples/posterior_of_z.py                        # 8 x 8 digits of scikit-learn
    python examples/posterior_of_z.py --data folder/of/MNIST
"""

import argparse
import math
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import xarray
from common import images, parser, ready, save
from nuts import nuts
from torch import Tensor, nn

import pyro_lvm as lvm
from pyro_lvm.inference_data import summarize

POINTS = 201  # of the grid along each axis


def main() -> None:
    options = parser(__doc__, epochs=100)
    options.add_argument("--draws", type=int, default=1000, help="of each chain of NUTS")
    args = ready(options.parse_args())
    data = images(args.data)
    vae = build(data)
    print(f"{train(vae, data, args)}\n")
    vae = vae.cpu().requires_grad_(False)
    chosen = choose(vae, data.test[: args.images])
    studies = {name: study(vae, x, args) for name, x in chosen.items()}
    print("log p(x) and KL(q(z | x) || p(z | x)) in nats:")
    print(f"{pd.DataFrame({n: s.values for n, s in studies.items()}).T.round(3).to_string()}\n")
    for name, found in studies.items():
        print(f"z of the {name} image:")
        print(f"{table(found).round(3).to_string()}\n")
    draw(vae, chosen, studies, args)


def build(data: lvm.datasets.Split) -> lvm.VAE:
    """A VAE with two latents."""
    num_pixels = data.train.shape[1]
    hidden = [400, 400] if num_pixels > 100 else [100, 100]
    encoder = lvm.nn.MLP(num_pixels, hidden, activation=nn.Tanh, head=lvm.nn.NormalHead(2))
    decoder = lvm.nn.MLP(2, hidden, activation=nn.Tanh, head=lvm.nn.BernoulliHead(num_pixels))
    return lvm.VAE(encoder, decoder)


def train(vae: lvm.VAE, data: lvm.datasets.Split, args: argparse.Namespace) -> lvm.Fit:
    """The ELBO, on pixels that are drawn afresh from their grey values."""
    return lvm.fit(
        vae.model,
        vae.guide,
        data.train,
        transform=torch.bernoulli,
        epochs=args.epochs,
        validation=data.validation,
        device=args.device,
    )


def choose(vae: lvm.VAE, x: Tensor) -> dict[str, Tensor]:
    """Three images, 1 x D, by how many of 500 draws from q(z | x) count."""
    ess = lvm.marginal.importance_sampling(vae.model, vae.guide, x, num_samples=500).ess
    order = ess.argsort().tolist()
    places = {"worst": order[0], "median": order[len(order) // 2], "best": order[-1]}
    return {name: x[i : i + 1] for name, i in places.items()}


@dataclass(frozen=True)
class Grid:
    """The posterior of one image on a grid.

    Attributes:
        axes: The coordinates along each of the two axes, ``POINTS``.
        log_joint: log p(x, z), ``POINTS x POINTS``.
    """

    axes: tuple[Tensor, Tensor]
    log_joint: Tensor

    @property
    def log_prob(self) -> float:
        """Log p(x): the sum times the area of a cell."""
        cell = math.log((self.axes[0][1] - self.axes[0][0]) * (self.axes[1][1] - self.axes[1][0]))
        return self.log_joint.logsumexp((0, 1)).item() + cell

    @property
    def mass(self) -> Tensor:
        """The probability of every cell."""
        return self.log_joint.flatten().softmax(0).reshape(self.log_joint.shape)

    @property
    def mean(self) -> Tensor:
        """E[z | x], 2."""
        sides = (self.mass.sum(1), self.mass.sum(0))
        return torch.stack(
            [side @ axis.double() for side, axis in zip(sides, self.axes, strict=True)]
        )

    @property
    def sd(self) -> Tensor:
        """The standard deviations of z given x, 2."""
        sides, squares = (self.mass.sum(1), self.mass.sum(0)), [a.double() ** 2 for a in self.axes]
        second = torch.stack([side @ square for side, square in zip(sides, squares, strict=True)])
        return (second - self.mean**2).sqrt()

    def sample(self, num_samples: int) -> Tensor:
        """Draws, K x 2, even within their cells."""
        cells = torch.multinomial(self.mass.flatten(), num_samples, replacement=True)
        index = torch.stack([cells // POINTS, cells % POINTS], -1)
        origin = torch.stack([axis[0] for axis in self.axes])
        step = torch.stack([axis[1] - axis[0] for axis in self.axes])
        return origin + step * (index + torch.rand(num_samples, 2) - 0.5)


@torch.no_grad()
def grid(vae: lvm.VAE, x: Tensor, axes: tuple[Tensor, Tensor]) -> Grid:
    """Log p(x, z) at all points of a grid."""
    z = torch.cartesian_prod(*axes)
    log_joint = [
        (vae.decode(part).log_prob(x) + vae.prior_distribution().log_prob(part)).double()
        for part in z.split(5000)
    ]
    return Grid(axes, torch.cat(log_joint).reshape(POINTS, POINTS))


def quadrature(vae: lvm.VAE, x: Tensor) -> Grid:
    """A grid over all of the prior, and then a finer one where the posterior is."""
    found = grid(vae, x, (torch.linspace(-6, 6, POINTS),) * 2)
    for _ in range(2):
        near = (found.log_joint > found.log_joint.max() - 20).nonzero()  # exp(-20) is no mass
        low, high = (near.min(0).values - 1).clamp(min=0), (near.max(0).values + 1)
        ends = [
            (a[i], a[min(j, POINTS - 1)]) for a, i, j in zip(found.axes, low, high, strict=True)
        ]
        axes = [torch.linspace(start.item(), end.item(), POINTS) for start, end in ends]
        found = grid(vae, x, (axes[0], axes[1]))
    return found


@dataclass(frozen=True)
class Study:
    """What is known of the posterior of one image."""

    grid: Grid
    posteriors: dict[str, Any]
    values: dict[str, float]


def study(vae: lvm.VAE, x: Tensor, args: argparse.Namespace) -> Study:
    """Quadrature, NUTS and q(z | x) for one image."""
    pair, draws = (vae.model, vae.guide), min(args.draws, args.samples)
    exact = quadrature(vae, x)
    score = lvm.marginal.importance_sampling(*pair, x, num_samples=args.samples)
    chains = nuts(vae.model, x, draws=draws)
    by_guide = lvm.to_arviz(*pair, x, num_samples=2 * draws, score=score, predictive=False)
    elbo = by_guide["sample_stats"]["log_weight"].values.mean().item()
    return Study(
        exact,
        {
            "quadrature": as_posterior(exact.sample(2 * draws)),
            "NUTS": lvm.to_arviz(vae.model, chains, x, score=score, predictive=False),
            "q(z | x)": by_guide,
        },
        {
            "log p(x), quadrature": exact.log_prob,
            "importance sampling": score.mean,
            "its error": score.sampling_std_error,
            "ELBO": elbo,
            "KL(q || p)": exact.log_prob - elbo,
            "ESS of q, %": 100 * score.ess.item() / args.samples,
        },
    )


def table(found: Study) -> pd.DataFrame:
    """ArviZ's numbers for each coordinate of z, beside the moments on the grid."""
    rows = summarize(found.posteriors)
    names = ("z[0, 0]", "z[0, 1]")
    mean, sd = (dict(zip(names, v.tolist(), strict=True)) for v in (found.grid.mean, found.grid.sd))
    variable = rows.index.get_level_values("variable")
    rows.insert(1, "exact mean", variable.map(mean))
    rows.insert(3, "exact sd", variable.map(sd))
    return rows


def as_posterior(z: Tensor) -> dict[str, xarray.Dataset]:
    """Draws, K x 2, as the group that ArviZ reads."""
    dims = ("chain", "draw", "data", "z_dim_0")
    return {"posterior": xarray.Dataset({"z": (dims, z.numpy()[None, :, None])})}


def draw(
    vae: lvm.VAE, chosen: dict[str, Tensor], studies: dict[str, Study], args: argparse.Namespace
) -> None:
    """Under each image its posterior in the plane, and along the first axis."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 10), layout="constrained")
    for column, (name, found) in zip(axes.T, studies.items(), strict=True):
        draw_plane(column[0], vae, chosen[name], found)
        share = found.values["ESS of q, %"]
        column[0].set_title(f"{name} image for q(z | x): {share:.0f} % of its draws count")
        lvm.plots.plot_densities(found.posteriors, "z", {"data": 0, "z_dim_0": 0}, ax=column[1])
        column[1].set_xlabel("$z_0$")
    save(figure, args, "posterior_of_z")


def draw_plane(ax: Any, vae: lvm.VAE, x: Tensor, found: Study) -> None:
    """Quadrature as shades, NUTS as points, the guide as ellipses, and the image itself."""
    mass = found.grid.mass.numpy()
    ordered = np.sort(mass.ravel())[::-1]
    inside = [ordered[np.searchsorted(ordered.cumsum(), share)] for share in (0.95, 0.8, 0.5)]
    ax.contourf(*found.grid.axes, mass.T, [*inside, mass.max()], cmap="Blues", alpha=0.8)
    z = found.posteriors["NUTS"]["posterior"]["z"].values.reshape(-1, 2)
    ax.plot(*z[:1000].T, ".", color="black", markersize=2, alpha=0.4, label="NUTS")
    q = vae.encode(x)
    loc, scale = q.mean[0], q.variance[0].sqrt()
    angle = torch.linspace(0, 2 * math.pi, 100)
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    for share in (0.5, 0.8, 0.95):  # P(|z| < r) = 1 - exp(-r^2 / 2)
        ring = loc + math.sqrt(-2 * math.log(1 - share)) * scale * circle
        ax.plot(*ring.T, color="#D55E00", linewidth=1.2, label="q(z | x)" if share == 0.5 else None)
    for set_limits, values in ((ax.set_xlim, z[:, 0]), (ax.set_ylim, z[:, 1])):
        margin = 0.2 * (values.max() - values.min())
        set_limits(values.min() - margin, values.max() + margin)
    side = math.isqrt(x.shape[1])
    inset = ax.inset_axes((0.02, 0.74, 0.24, 0.24))
    inset.imshow(x.reshape(side, side), cmap="gray")
    inset.set(xticks=[], yticks=[])
    ax.set(xlabel="$z_0$", ylabel="$z_1$")
    ax.legend(loc="lower right", fontsize="small")


if __name__ == "__main__":
    main()
