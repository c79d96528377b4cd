"""A story of your own: from an empty file to a comparison in ArviZ.

The library asks for two Python functions, a model and a guide, and for a plate named "data". This
page is to be copied. Its story is Bayesian factor analysis, which is none of the library's models:

    tau_k ~ HalfNormal(1)                  how much factor k matters      (global, K of them)
    W_dk ~ N(0, tau_k^2)                   its effect on feature d        (global)
    sigma_d ~ LogNormal(-1, 1)             the noise of feature d         (global)
    z_i ~ N(0, I_K)                        the factors of datum i         (local)
    x_i ~ N(W z_i, diag sigma^2)           what is measured of it

The prior of W has a scale for each factor: one that explains nothing is shrunk to nothing
(automatic relevance determination, MacKay 1994, Bishop 1999). How many factors are there? We fit
one to five, to data that were drawn with three, and to measurements of 569 breast tumours, and
compare held-out log p(x), beside maximum likelihood (scikit-learn's FactorAnalysis, exact); and,
without data held out, by ArviZ's leave-one-out cross-validation.

What to look for: of five factors for data with three, two have a tau near 0, and cost nothing of
log p(x), while maximum likelihood pays for them; the tumours have use for all five.

    python examples/own_story.py          # --data is ignored: these data are no images
"""

import argparse
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from common import arguments, save
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from sklearn.datasets import load_breast_cancer
from sklearn.decomposition import FactorAnalysis
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

import pyro_lvm as lvm

FACTORS = range(1, 6)  # the variants to compare
TRUTH = 3  # of the simulated data

# --------------------------------------------------------------------------------- 1. the story


def story(num_features: int, num_factors: int) -> Callable[[Tensor], None]:
    """A model is any function of the data. This one is made for a number of factors."""
    ones = torch.ones(num_features)

    def model(x: Tensor) -> None:
        # Global latents are drawn outside of the data plate, once for all data. Their shapes are
        # *event* shapes (.to_event): whatever is on the left of them belongs to the library,
        # which puts several draws there at once.
        relevance = dist.HalfNormal(1.0).expand([num_factors]).to_event(1)
        tau = pyro.sample("tau", relevance)  # ... x K
        loadings = dist.Normal(torch.zeros(num_features, 1), tau.unsqueeze(-2)).to_event(2)
        W = pyro.sample("W", loadings)  # ... x D x K  # noqa: N806
        sigma = pyro.sample("sigma", dist.LogNormal(-ones, 1.0).to_event(1))  # ... x D
        # What each datum has of its own is inside the plate. It has the size of the batch:
        # `lvm.fit` tells Pyro that it stands for all data, so that globals count once.
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(num_factors), 1.0).to_event(1))
            # Of several draws W is draws x 1 x D x K: the plate's dimension, of size 1, is in it.
            own = W if W.dim() == 2 else W.squeeze(-3)
            pyro.sample("x", dist.Normal(z @ own.mT, sigma).to_event(1), obs=x)

    return model


# --------------------------------------------------------------------------------- 2. the guide


class Guide(PyroModule):
    """What is believed after the data: q(tau, W, sigma) q(z_i | x_i).

    A PyroModule, since it has parameters; a function with pyro.param is as good.
    """

    def __init__(self, model: Callable, num_features: int, num_factors: int) -> None:
        super().__init__()
        # Globals: one of Pyro's autoguides, an independent normal for each number. It must not see
        # the local sites, which are another guide's.
        self.globals = AutoNormal(poutine.block(model, hide=["z", "x"]), init_scale=0.05)
        # Locals: q(z_i | x_i) is computed from x_i, so that new data need no new parameters. The
        # exact posterior of factor analysis is linear in x; so is a network without hidden layers.
        self.encoder = lvm.nn.MLP(
            num_features, [], head=lvm.nn.NormalHead(num_factors, scale="shared")
        )

    def forward(self, x: Tensor) -> None:
        """Draw every latent of the model, by the same names and in the same plates."""
        self.globals(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(x))


class Pair(NamedTuple):
    """Model and guide: this is what every function of the library takes."""

    model: Callable[[Tensor], None]
    guide: Guide


def build(data: "Data", num_factors: int = TRUTH) -> Pair:
    """A variant of the story with its guide."""
    model = story(data.train.shape[1], num_factors)
    return Pair(model, Guide(model, data.train.shape[1], num_factors))


# --------------------------------------------------------------------------------- 3. the fit


def train(pair: Pair, data: "Data", args: argparse.Namespace) -> lvm.Fit:
    """Minibatches of 50; the objective is the ELBO, as it is if no other is given.

    The learning rate rises and falls again, so that the end is not blurred by the noise of steps.
    """
    steps = args.epochs * math.ceil(len(data.train) / 50)
    return lvm.fit(
        pair.model,
        pair.guide,
        data.train,
        epochs=args.epochs,
        batch_size=50,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.01),
        scheduler=lambda o: OneCycleLR(o, max_lr=0.03, total_steps=steps),
        elbo=lvm.TraceInfo_ELBO(),
        device="cpu",  # twenty numbers per datum leave a GPU nothing to do
        seed=args.seed,
    )


# --------------------------------------------------------------------------------- 4. the score


def held_out(pair: Pair, data: "Data", args: argparse.Namespace) -> lvm.LogMarginal:
    """Log p(x_i | training data) of test data: an average over draws of globals and of z_i."""
    return lvm.marginal.importance_sampling(
        pair.model, pair.guide, data.test, num_samples=args.samples
    )


def maximum_likelihood(data: "Data", num_factors: int) -> float:
    """The same story without priors, in closed form: what our number has to be near, or above."""
    fitted = FactorAnalysis(num_factors, max_iter=5000).fit(data.train.numpy())
    return float(fitted.score(data.test.numpy()))


def results(data: "Data", args: argparse.Namespace) -> tuple[pd.DataFrame, dict[str, Pair]]:
    """Fit and score all variants."""
    pairs = {f"{k} factors": build(data, k) for k in FACTORS}
    scores = {}
    for name, pair in pairs.items():
        fit = train(pair, data, args)
        print(f"{data.name}, {name}: {fit.history['loss'][-1]:.3f} nats lost, {fit.seconds:.0f} s")
        scores[name] = held_out(pair, data, args)
    # Differences have errors of their own, much smaller than those of the scores: test data that
    # are hard for one variant are hard for the next.
    table = lvm.compare(scores)[["mean", "se", "diff", "dse", "unreliable"]]
    exact = {name: maximum_likelihood(data, k) for name, k in zip(pairs, FACTORS, strict=True)}
    return table.assign(ML=table.index.map(exact)).sort_index(), pairs


# --------------------------------------------------------------------------------- 5. ArviZ


def posteriors(pairs: dict[str, Pair], data: "Data", args: argparse.Namespace) -> dict:
    """What ArviZ knows a fit by: posterior, prior, predictive draws, log-likelihood.

    The last is log p(x_i | globals), z_i integrated out for every draw of the globals: what
    leave-one-out cross-validation needs.
    """
    few = max(25, min(args.samples // 10, 100))
    settings = {"num_samples": few, "num_weights": few, "predictive": False}
    return {n: lvm.to_arviz(*pair, data.train, **settings) for n, pair in pairs.items()}


# --------------------------------------------------------------------------------- data, pictures


class Data(NamedTuple):
    """N x D; features have mean 0 and deviation 1 in the training data."""

    name: str
    train: Tensor
    test: Tensor


def simulated() -> tuple[Data, float]:
    """Draws of a linear Gaussian model of three factors, and log p of the test data under it."""
    generator = torch.Generator().manual_seed(3)
    loadings = torch.randn(12, TRUTH, generator=generator)
    noise = 0.5 + torch.rand(12, generator=generator)
    known = lvm.datasets.LinearGaussian(loadings, torch.zeros(12), noise)
    x = known.sample(1000, generator)
    data = standardized("simulated", x[:500], x[500:])
    shift = x[:500].std(0).log().sum()  # from the density of x to that of the standardised x
    return data, float(known.log_prob(x[500:]).mean() + shift)


def tumours() -> Data:
    """Thirty measurements of cell nuclei, positive numbers, in logarithms."""
    x = torch.as_tensor(load_breast_cancer().data).float()
    x = (x + 0.01 * x.mean(0)).log()[
        torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    ]
    return standardized("tumours", x[:400], x[400:])


def standardized(name: str, train: Tensor, test: Tensor) -> Data:
    """In units of the training data."""
    mean, deviation = train.mean(0), train.std(0)
    return Data(name, (train - mean) / deviation, (test - mean) / deviation)


def draw(
    on_toy: pd.DataFrame, truth: float, on_data: pd.DataFrame, loo: pd.DataFrame, *groups: Any
) -> plt.Figure:
    """Scores against the number of factors, and how much each of five factors matters."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    for ax, table, title in zip(axes, (on_toy, on_data), ("simulated", "tumours"), strict=False):
        ax.errorbar(FACTORS, table["diff"], table["dse"], fmt="ko-", capsize=3, label="this story")
        best = table["mean"].max()
        ax.plot(FACTORS, table["ML"] - best, "C0^--", label="maximum likelihood")
        ax.set(title=f"{title}: held-out log p(x)", ylabel="nats per datum, to the best")
    axes[0].axhline(truth - on_toy["mean"].max(), color="C3", ls=":", label="the truth: 3 factors")
    loo = loo.sort_index()
    axes[1].errorbar(FACTORS, loo["diff"], loo["dse"], fmt="C1s:", capsize=3, label="leave-one-out")
    for ax, idata, title in zip(axes[2:], groups, ("simulated", "tumours"), strict=True):
        tau = idata["posterior"]["tau"].values.reshape(-1, max(FACTORS))  # draws x K
        ax.boxplot(tau[:, (-tau.mean(0)).argsort()], showfliers=False)
        ax.set(title=f"{title}: posterior of tau", ylabel="scale of the loadings", ylim=(0, None))
    for ax in axes[:2]:
        ax.legend()
    for ax in axes:
        ax.set_xlabel("factors" if ax in axes[:2] else "factor")
    return figure


def main() -> None:
    args = arguments(__doc__, epochs=100)
    # Pyro knows parameters by their names, and variants of one story have the same: fitted in one
    # process they would share them. With this they belong to their modules.
    with pyro.settings.context(module_local_params=True):
        tell(args)


def tell(args: argparse.Namespace) -> None:
    """Both data sets, the scores of all variants, and the pictures."""
    toy, truth = simulated()
    on_toy, toy_pairs = results(toy, args)
    print(f"\nHeld-out log p(x), nats; {truth:.3f} under the truth of {TRUTH} factors")
    print(f"{on_toy.round(3).to_string()}\n")
    data = tumours()
    on_data, pairs = results(data, args)
    print(f"\nHeld-out log p(x), nats, {len(data.test)} tumours\n{on_data.round(3).to_string()}\n")
    groups = posteriors(pairs, data, args)
    with warnings.catch_warnings():  # ArviZ warns of unreliable data, which our table counts
        warnings.simplefilter("ignore")
        loo = lvm.compare(groups)
    print(f"Leave-one-out cross-validation, {len(data.train)} tumours\n{loo.round(3).to_string()}")
    toy_groups = posteriors({"5 factors": toy_pairs["5 factors"]}, toy, args)
    figure = draw(on_toy, truth, on_data, loo, toy_groups["5 factors"], groups["5 factors"])
    save(figure, args, "own_story")


if __name__ == "__main__":
    main()
