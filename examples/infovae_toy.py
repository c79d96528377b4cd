"""The toy of the InfoVAE paper: two data, one latent, and every number by quadrature.

The data are x = -1 and x = +1, half each (Zhao, Song and Ermon 2017, figure 1). The latent is
z ~ N(0, 1), and the decoder p(x | z) = N(f(z), sigma(z)^2) may be as sure as sigma = s, its floor.
The lower the floor, the more there is to gain by telling -1 from +1: log(1/s), wherever q(z | -1)
and q(z | +1) do not overlap. The objectives, with q(z) = (q(z | -1) + q(z | +1)) / 2, are

    E_q[log p(x | z)] - (1 - alpha) KL(q(z | x) || p(z)) - (alpha + lambda - 1) MMD^2(q(z), p(z)):

the ELBO, and InfoVAE with alpha = 0 and 1, the paper's lambda = 500 and kernel exp(-(z - z')^2).
The paper says that the ELBO buys certainty with a q(z) that leaves the prior and a q(z | x) that
leaves the true posterior p(z | x), and that InfoVAE does not. Both distances are integrals over a
line, so that one can look. As ELBO = log p(x) - KL(q(z | x) || p(z | x)), alpha = 0 charges for
both and alpha = 1 for the first alone; but log p(x) can pay. How much has to be paid is up to the
family of q(z | x), before any training.

**Normal q(z | x)**, N(-m, t^2) and N(m, t^2). Two of these make up the prior only if m = 0, where
z knows nothing of x and -log p(x | z) is 1.42. With the best decoder for each m and t, which has
f(z) = tanh(m z / t^2), the best m and t give, whatever a network may do,

    objective         floor     m      t    -log p(x|z)   KL(q(z)||p(z))   KL(q(z|x)||p(z|x))
    ELBO              0.5     0.858  0.514      0.45           0.09               0.09
    ELBO              0.1     0.934  0.357     -1.26           0.35               0.22
    ELBO              0.02    0.953  0.304     -2.90           0.50               0.27
    InfoVAE, alpha 0  0.5     0.546  0.814      1.16           0.001              0.06
    InfoVAE, alpha 0  0.1     0.582  0.780      1.08           0.003              0.18
    InfoVAE, alpha 0  0.02    0.582  0.780      1.08           0.003              0.18
    InfoVAE, alpha 1  0.5     0.609  0.749      1.05           0.004              0.08
    InfoVAE, alpha 1  0.1     0.637  0.713      0.91           0.007              0.34
    InfoVAE, alpha 1  0.02    0.638  0.712      0.91           0.007              0.40

Under the ELBO both distances grow as the floor falls. InfoVAE keeps q(z), and the second distance
levels off: with alpha = 0 below the ELBO's, with alpha = 1 above it at the lower floors. What
InfoVAE gives up is the reconstruction. No objective makes a family do what it can't.

**Skew normal q(z | x)**, 2 N(z; 0, 1) Phi(-a z) and 2 N(z; 0, 1) Phi(a z). They make up the prior
for every a, as Phi(-u) + Phi(u) = 1, and approach half normals as a grows, where both distances are
0 and the reconstruction is as good as the floor allows. No q(z | x) of any family has an ELBO that
is more than 0.0004 nats above that, so that all three objectives share this optimum: with a family
that has it, the ELBO's distances need not grow either. Training decides how near one comes.

**What networks do** with skew normals (seed 0, 3,000 steps each). Every distance is below 0.08, and
each is larger at the lowest floor than at the highest:

    objective           -log p(x|z)           KL(q(z)||p(z))         KL(q(z|x)||p(z|x))
    floor            0.5    0.1    0.02     0.5    0.1    0.02       0.5    0.1    0.02
    best            0.23  -1.38   -2.99    0      0      0          0      0      0
    ELBO            0.24  -1.38   -2.99    0.005  0.036  0.070      0.002  0.009  0.008
    alpha 0         0.33  -1.27   -2.84    0.001  0.004  0.009      0.031  0.044  0.077
    alpha 1         0.29  -1.30   -2.87    0.002  0.006  0.012      0.018  0.030  0.058

The ELBO reconstructs best and leaves a gap around 0, so that its first distance grows. InfoVAE
keeps that one at 0.012 or less; its price, where the decoder is not as sure around 0 as it could
be, is the second distance, larger than the ELBO's, and 0.05 to 0.15 nats of reconstruction. Here
alpha = 0 is no better than alpha = 1: the KL is at most log 2 where q(z) is the prior.

Normals are not trained here. Trials of 2,000 to 4,000 steps did not reliably reach the best m and t
at the floor 0.02: InfoVAE mostly stayed near m = 0, and the ELBO's two distances were from 0.56 and
0.23 to 0.82 and 0.66.

    python examples/infovae_toy.py --out out        # then open out/infovae_toy.png
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim.lr_scheduler import CosineAnnealingLR

import pyro_lvm as lvm

mpl.use("Agg")
import matplotlib.pyplot as plt

FLOORS = (0.5, 0.1, 0.02)
DATA = torch.tensor([[-1.0], [1.0]])
COPIES, BATCH = 2000, 200  # of each datum, and data in a batch: 20 steps an epoch
KERNEL = lvm.divergences.RBF(bandwidths=(math.sqrt(0.5),))  # exp(-(z - z')^2), the paper's
OBJECTIVES = {  # alpha and lambda
    "ELBO": (0.0, 1.0),
    "InfoVAE, alpha 0": (0.0, 500.0),
    "InfoVAE, alpha 1": (1.0, 500.0),
}
NORMAL, SKEW = "normal, optimum", "skew normal, trained"
Pair = tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]  # x -> q(z | x), z -> p(x | z)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the picture goes")
    parser.add_argument("--epochs", type=int, default=150, help="of 20 steps, for each of 9 fits")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)  # too little work to share: threads would mostly wait for each other
    args.out.mkdir(parents=True, exist_ok=True)
    rows, pairs = [], {}
    for kind, name, floor in itertools.product((NORMAL, SKEW), OBJECTIVES, FLOORS):
        if kind == NORMAL:
            pair = normal_pair(*best_normal(name, floor), floor)
        else:
            torch.manual_seed(args.seed)
            vae = build(floor)
            fit(vae, name, args.epochs, args.seed)
            pair = (vae.double().encode, vae.decode)
        rows.append({"q(z|x)": kind, "objective": name, "floor": floor, **measure(*pair)})
        pairs[kind, name] = pair  # that of the lowest floor, the last, stays
    table = pd.DataFrame(rows)
    print(table.round(3).to_string(index=False))
    draw(table, pairs).savefig(args.out / "infovae_toy.png", dpi=80)
    seconds = time.perf_counter() - start
    print(f"{seconds:.0f} s; open {args.out / 'infovae_toy.png'}")


def normal_pair(m: float, t: float, floor: float) -> Pair:
    """q(z | x) = N(m x, t^2), and the decoder that is best for it: the moments of q(x | z)."""

    def decode(z: Tensor) -> dist.Distribution:
        u = m * z / t**2
        return dist.Normal(torch.tanh(u), (1 / torch.cosh(u)).clamp(min=floor)).to_event(1)

    return lambda x: dist.Normal(m * x, t).to_event(1), decode


def normal_loss(m: float, t: float, objective: str, floor: float) -> float:
    """The negative objective of that pair, with KL and MMD^2 in closed form."""
    alpha, lambda_ = OBJECTIVES[objective]

    def kernel(loc: float, variance: float) -> float:  # E exp(-d^2) of d ~ N(loc, variance)
        return math.exp(-(loc**2) / (1 + 2 * variance)) / math.sqrt(1 + 2 * variance)

    kl = (m**2 + t**2 - 1 - 2 * math.log(t)) / 2
    within = (kernel(0, 2 * t**2) + kernel(2 * m, 2 * t**2)) / 2
    mmd = within + kernel(0, 2) - 2 * kernel(m, 1 + t**2)
    found = measure(*normal_pair(m, t, floor), points=1 << 13)
    return found["-log p(x|z)"] + (1 - alpha) * kl + (alpha + lambda_ - 1) * mmd


def best_normal(objective: str, floor: float) -> tuple[float, float]:
    """The best m and t: a walk to the best neighbour on finer and finer grids."""
    loss, best = cache(partial(normal_loss, objective=objective, floor=floor)), (0.7, 0.6)
    for step in (0.05, 0.01, 0.001):
        moves = [(i * step, j * step) for i in (0, -1, 1) for j in (0, -1, 1)]
        last = None
        while best != last:
            last = best
            best = min(((last[0] + i, last[1] + j) for i, j in moves), key=lambda mt: loss(*mt))
    return best


class SkewNormal(dist.TorchDistribution):
    """2 N(u; 0, 1) Phi(skew u) / scale with u = (z - loc) / scale (Azzalini 1985).

    A draw is u = (skew |e_0| + e_1) / sqrt(1 + skew^2) with e_0, e_1 ~ N(0, 1).
    """

    arg_constraints = {}  # noqa: RUF012
    support = dist.constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, skew: Tensor) -> None:
        self.loc, self.scale, self.skew = torch.broadcast_tensors(loc, scale, skew)
        super().__init__(self.loc.shape)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """Draws, ``sample_shape x batch``."""
        like = self.loc.expand(torch.Size(sample_shape) + self.batch_shape)
        half, whole = torch.randn_like(like).abs(), torch.randn_like(like)
        return self.loc + self.scale * (self.skew * half + whole) / (1 + self.skew**2).sqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, in nats."""
        u = (value - self.loc) / self.scale
        normal = dist.Normal(self.loc, self.scale).log_prob(value)
        return math.log(2) + normal + torch.special.log_ndtr(self.skew * u)


class SkewNormalHead(nn.Module):
    """The last step of an encoder with one latent: three raw numbers to a skew normal."""

    event_shape, params_per_value = (1,), 3

    def forward(self, raw: Tensor) -> dist.Distribution:
        """Turn ``batch x 3`` into a distribution over one latent."""
        loc, scale, skew = raw.split(1, -1)  # each batch x 1
        # some tens of skew make a half normal: raw numbers of order 1 should reach them
        return SkewNormal(loc, 1e-4 + softplus(scale), 10 * skew).to_event(1)


def build(floor: float) -> lvm.VAE:
    """Networks of the paper's kind, if smaller; a step from -1 to +1 is what tanh is good at."""
    mlp = partial(lvm.nn.MLP, 1, [64, 64], activation=nn.Tanh)
    return lvm.VAE(mlp(head=SkewNormalHead()), mlp(head=lvm.nn.NormalHead(1, floor=floor)))


def fit(vae: lvm.VAE, objective: str, epochs: int, seed: int) -> None:
    """Fit by Adam, whose rate falls to 0."""
    alpha, lambda_ = OBJECTIVES[objective]
    divergence = lvm.MMD(KERNEL) if alpha + lambda_ > 1 else None
    steps = epochs * len(DATA) * COPIES // BATCH
    lvm.fit(
        vae.model,
        vae.guide,
        DATA.repeat(COPIES, 1),
        elbo=lvm.TraceInfo_ELBO(alpha=alpha, lambda_=lambda_, divergence=divergence),
        epochs=epochs,
        batch_size=BATCH,
        optimizer=lambda p: torch.optim.Adam(p, lr=3e-3),
        scheduler=lambda o: CosineAnnealingLR(o, steps),
        device="cpu",  # too small for more
        seed=seed,
    )


@torch.no_grad()
def log_densities(encode: Any, decode: Any, z: Tensor) -> dict[str, Tensor]:
    """Logarithms of q(z|x), p(x|z), p(z|x), each ``Z x N``, and of p(z), q(z), each ``Z``.

    The points z are even, cover q and p and end where both vanish: there the mean of equal cells is
    as good as a quadrature of any order. ``encode`` maps ``N x 1``, ``decode`` ``Z x 1 x 1``.
    """
    x = DATA.to(z)
    q = encode(x).log_prob(z[:, None, None])  # Z x N
    prior = dist.Normal(0.0, 1.0).log_prob(z)  # Z
    likelihood = decode(z[:, None, None]).log_prob(x)  # Z x N
    joint = prior[:, None] + likelihood
    posterior = joint - joint.logsumexp(0) - (z[1] - z[0]).log()  # p(x) = int p(z) p(x | z) dz
    aggregate = q.logsumexp(1) - math.log(len(x))
    return {
        "q(z|x)": q,
        "p(x|z)": likelihood,
        "p(z|x)": posterior,
        "p(z)": prior,
        "q(z)": aggregate,
    }


def measure(encode: Any, decode: Any, points: int = 1 << 17) -> dict[str, float]:
    """By quadrature over z in [-12, 12]; nats per datum, and the spread of q(z).

    Raises:
        ValueError: If the points miss some of q(z | x).
    """
    z = torch.linspace(-12, 12, points, dtype=torch.float64)
    log = log_densities(encode, decode, z)
    weight = log["q(z|x)"].exp() * (z[1] - z[0])  # Z x N
    if (weight.sum(0) - 1).abs().max() > 1e-3:
        raise ValueError(f"Expected q(z | x) to sum to 1; got {weight.sum(0).tolist()}.")
    aggregate = weight.mean(1)  # Z, of q(z)
    mean = (aggregate * z).sum()
    found = {
        "-log p(x|z)": -(weight * log["p(x|z)"]).sum(0).mean(),
        "std": (aggregate * (z - mean) ** 2).sum().sqrt(),
        "KL prior": (aggregate * (log["q(z)"] - log["p(z)"])).sum(),  # KL(q(z) || p(z))
        "KL post": (weight * (log["q(z|x)"] - log["p(z|x)"])).sum(0).mean(),  # of q and p(z | x)
    }
    return {name: float(value) for name, value in found.items()}


def draw(table: pd.DataFrame, pairs: dict[tuple[str, str], Pair]) -> Any:
    """A row for each kind of q(z | x): densities at the lowest floor, distances at all."""
    figure, axes = plt.subplots(2, 4, figsize=(16, 7.5), layout="constrained")
    for ax, ((kind, name), pair) in zip(axes[:, :3].flat, pairs.items(), strict=True):
        draw_densities(ax, *pair)
        ax.set_title(f"{name}, floor {FLOORS[-1]}\n{kind}")
    for ax, (kind, rows) in zip(axes[:, 3], table.groupby("q(z|x)"), strict=True):
        draw_distances(ax, rows)
        ax.set_title(f"distances over the floor\n{kind}")
    for column, where in ((0, "outside lower left"), (3, "outside lower right")):
        figure.legend(*axes[0, column].get_legend_handles_labels(), loc=where, ncols=3)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def draw_densities(ax: Any, encode: Any, decode: Any) -> None:
    z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    density = {n: v.exp() for n, v in log_densities(encode, decode, z).items()}
    ax.fill_between(z, density["q(z)"], color="0.85", label="q(z)")
    ax.plot(z, density["p(z)"], color="black", linestyle="dashed", label="p(z)")
    for datum, (color, x) in enumerate((("#0072B2", "-1"), ("#E69F00", "+1"))):
        for what, width, style in (("q", 2, "solid"), ("p", 1.5, "dotted")):
            y, label = density[f"{what}(z|x)"][:, datum], f"{what}(z|x={x})"
            ax.plot(z, y, color=color, linewidth=width, linestyle=style, label=label)
    ax.set(xlim=(-4, 4), ylim=(0, 1.4), xlabel="z", ylabel="density")


def draw_distances(ax: Any, table: pd.DataFrame) -> None:
    colors = dict(zip(OBJECTIVES, ("#CC79A7", "#009E73", "#000000"), strict=True))
    for name, rows in table.groupby("objective"):
        for what, style, label in (
            ("KL prior", "o-", "KL(q(z) || p(z))"),
            ("KL post", "s--", "KL(q(z|x) || p(z|x))"),
        ):
            y = rows[what].clip(lower=1e-4)  # what is less is drawn on the edge
            ax.plot(rows["floor"], y, style, color=colors[name], label=f"{name}: {label}")
    ax.set(xscale="log", yscale="log", xlabel="floor of the decoder's std", ylabel="nats")
    ax.set(xlim=(FLOORS[0] * 1.3, FLOORS[-1] / 1.3), ylim=(8e-5, 1.5))  # the floor falls
    ax.set_xticks(FLOORS, [f"{floor:g}" for floor in FLOORS])
    ax.minorticks_off()
    ax.grid(alpha=0.3)


if __name__ == "__main__":
    main()
