"""A die and a handful of throws: maximum likelihood, the posterior, and four ways to get it.

A die has probabilities p of its six faces, and shows n_k times face k. The likelihood is highest at
the frequencies, p_k = n_k / N, which call a face impossible that has not come up yet. A prior
p ~ Dirichlet(a) keeps it possible: the posterior is Dirichlet(a + n), its mean

    E[p_k | n] = (a_k + n_k) / (sum_j a_j + N),

and the evidence of the throws in their order, by which priors can be compared, is

    p(throws) = B(a + n) / B(a),    B(a) = prod_k Gamma(a_k) / Gamma(sum_k a_k).

As everything is known here, so is the error of what is used elsewhere: importance sampling of the
evidence, NUTS, and SVI with three guides. A Dirichlet guide contains the posterior. The autoguides
are normal in unconstrained space (stick-breaking), where the posterior is only nearly normal: what
they miss, here a few percent of a standard deviation, more draws do not mend.

    python examples/bayesian_die.py
"""

import argparse
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from common import parser, ready, save
from nuts import nuts
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import constraints

import pyro_lvm as lvm
from pyro_lvm.inference_data import summarize

THROWS = torch.tensor([6, 3, 6, 6, 1, 4, 6, 2, 6, 3, 1, 6]) - 1  # no five yet
COUNTS = torch.bincount(THROWS, minlength=6)
PRIORS = {
    "Jeffreys, 1/2": torch.full((6,), 0.5),
    "uniform, 1": torch.ones(6),
    "a fair die, 10": torch.full((6,), 10.0),
    "a fair die, 100": torch.full((6,), 100.0),
}
FACES = [f"face {k}" for k in range(1, 7)]


def main() -> None:
    options = parser(__doc__, epochs=1000)
    options.add_argument("--draws", type=int, default=2000, help="of each chain of NUTS")
    args = ready(options.parse_args())
    print(f"{len(THROWS)} throws: {dict(zip(FACES, COUNTS.tolist(), strict=True))}\n")
    print("Frequencies, and the posterior mean under each prior:")
    print(f"{means().round(3).to_string()}\n")
    print("Evidence log p(throws) in nats, exactly and by importance sampling:")
    print(f"{evidences(args).round(3).to_string()}\n")
    posteriors = fitted(PRIORS["uniform, 1"], args)
    table = errors(posteriors)
    print("Uniform prior: the two faces of the picture, estimates less the closed form:")
    print(f"{table.loc[['p[5]', 'p[4]']].round(4).to_string()}\n")
    print("The largest error over all faces, its sign left out:")
    print(worst(table).round(4).to_string())
    draw(posteriors, args)


def story(prior: Tensor) -> Callable[[Tensor], None]:
    """The die with a Dirichlet prior on its faces."""

    def model(throws: Tensor) -> None:
        p = pyro.sample("p", dist.Dirichlet(prior))
        with pyro.plate("data", len(throws)):
            pyro.sample("throw", dist.Categorical(p), obs=throws)

    return model


def conjugate_guide(throws: Tensor) -> None:
    """The family that the posterior is in."""
    a = pyro.param("a", torch.ones(6), constraint=constraints.positive)
    pyro.sample("p", dist.Dirichlet(a))


def means() -> pd.DataFrame:
    """Maximum likelihood beside the posterior means."""
    rows = {"maximum likelihood": COUNTS / len(THROWS)}
    rows |= {name: dist.Dirichlet(prior + COUNTS).mean for name, prior in PRIORS.items()}
    return pd.DataFrame({name: row.tolist() for name, row in rows.items()}, index=FACES).T


def log_evidence(prior: Tensor) -> float:
    """The closed form, log B(a + n) - log B(a)."""

    def log_beta(a: Tensor) -> Tensor:
        return torch.lgamma(a).sum() - torch.lgamma(a.sum())

    return float(log_beta(prior.double() + COUNTS) - log_beta(prior.double()))


def evidences(args: argparse.Namespace) -> pd.DataFrame:
    """The evidence of every prior; the samples come from the prior itself, the simplest guide."""
    rows = {}
    for name, prior in PRIORS.items():
        estimate = lvm.marginal.evidence(
            story(prior), from_prior(prior), THROWS, num_samples=args.samples
        )
        exact, error = log_evidence(prior), estimate.sampling_std_error
        rows[name] = {
            "exact": exact,
            "estimate": estimate.mean,
            "its error": error,
            "off by (errors)": (estimate.mean - exact) / error,
            "ESS": float(estimate.ess),
        }
    return pd.DataFrame(rows).T


def from_prior(prior: Tensor) -> Callable[[Tensor], None]:
    """A guide that knows nothing of the throws."""
    return lambda throws: pyro.sample("p", dist.Dirichlet(prior))


def fitted(prior: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The posterior by NUTS and by SVI, as ArviZ's groups."""
    model = story(prior)
    draws = min(args.draws, args.samples)
    posteriors = {"NUTS": lvm.to_arviz(model, nuts(model, THROWS, draws=draws), THROWS)}
    guides = {
        "SVI, Dirichlet": conjugate_guide,
        "SVI, full normal": AutoMultivariateNormal(model),
        "SVI, diagonal normal": AutoNormal(model),
    }
    for name, guide in guides.items():
        pyro.clear_param_store()
        train(model, guide, args)
        posteriors[name] = lvm.to_arviz(model, guide, THROWS, num_samples=2 * draws)
    return posteriors


def train(model: Callable, guide: Callable, args: argparse.Namespace) -> lvm.Fit:
    """SVI with ever smaller steps; all throws are one batch."""
    return lvm.fit(
        model,
        guide,
        THROWS,
        elbo=lvm.TraceInfo_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1),
        epochs=args.epochs,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, args.epochs),
        device="cpu",
    )


def errors(posteriors: dict[str, Any]) -> pd.DataFrame:
    """How far posteriors are from the closed form, in p and in Monte Carlo standard errors."""
    exact = dist.Dirichlet(PRIORS["uniform, 1"] + COUNTS)
    table = summarize(posteriors, ["p"])
    face = [int(variable.strip("p[]")) for variable in table.index.get_level_values("variable")]
    mean, sd = exact.mean[face].numpy(), exact.variance.sqrt()[face].numpy()
    return pd.DataFrame(
        {
            "mean": table["mean"],
            "error": table["mean"] - mean,
            "in MCSE": (table["mean"] - mean) / table["mcse_mean"],
            "sd": table["sd"],
            "error of sd": table["sd"] - sd,
            "in its MCSE": (table["sd"] - sd) / table["mcse_sd"],
            "ESS": table["ess_bulk"],
            "R-hat": table["r_hat"],
        }
    )


def worst(table: pd.DataFrame) -> pd.DataFrame:
    """The largest error of each method over the faces."""
    methods = table.groupby("posterior", sort=False)
    largest = table.drop(columns=["mean", "sd", "ESS"]).abs().groupby("posterior", sort=False).max()
    return largest.assign(ESS=methods["ESS"].min())


def draw(posteriors: dict[str, Any], args: argparse.Namespace) -> None:
    """What priors do, and how well each method finds the posterior of two faces."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    draw_priors(left)
    exact = dist.Dirichlet(PRIORS["uniform, 1"] + COUNTS).concentration
    for ax, face in ((middle, 5), (right, 4)):
        beta = dist.Beta(exact[face], exact.sum() - exact[face])  # a marginal of the Dirichlet
        lvm.plots.plot_densities({**posteriors, "closed form": beta}, "p", {"p_dim_0": face}, ax=ax)
        ax.set_title(f"{FACES[face]}, seen {COUNTS[face]} times of {len(THROWS)}")
        ax.set_xlabel(f"probability of {FACES[face]}, uniform prior")
    save(figure, args, "bayesian_die")


def draw_priors(ax: Any) -> None:
    """Posterior means and standard deviations beside the frequencies."""
    places = torch.arange(6)
    ax.bar(places, COUNTS / len(THROWS), color="0.85", label="maximum likelihood")
    for i, (name, prior) in enumerate(PRIORS.items()):
        posterior = dist.Dirichlet(prior + COUNTS)
        ax.errorbar(
            places + 0.15 * (i - 1.5),
            posterior.mean,
            yerr=posterior.variance.sqrt(),
            fmt="o",
            markersize=4,
            label=name,
        )
    ax.axhline(1 / 6, color="0.5", linestyle="dotted")
    ax.set_xticks(places, FACES)
    ax.set(ylabel="probability", title="Frequencies, and posteriors under four priors")
    ax.legend(fontsize="small", frameon=False)


if __name__ == "__main__":
    main()
