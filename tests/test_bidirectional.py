"""Bounds from both sides against closed forms, on data that the models have drawn."""

import math

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS
from pyro import poutine

import pyro_lvm as lvm
from pyro_lvm.datasets import linear_gaussian
from pyro_lvm.marginal import HMC, BidirectionalBound, bidirectional
from pyro_lvm.marginal.annealing.chains import Kernels, anneal, anneal_back
from pyro_lvm.marginal.annealing.hamiltonian import Point
from pyro_lvm.plots import plot_bidirectional

pytestmark = pytest.mark.usefixtures("float64")

FEW = HMC(num_steps=5, num_pilots=16)  # as many chains as are measured: one recording for both


def check_brackets(bound, exact):
    """Lower <= exact <= upper on average over the data, within five standard errors."""
    for score, sign in ((bound.forward, 1), (bound.reverse, -1)):
        below = sign * (exact - score.log_prob)
        assert below.mean() > -5 * below.std() / math.sqrt(len(below))


def off_posterior(problem):
    """The exact posterior, moved and widened."""

    def guide(x):
        loc, scale_tril = problem._posterior(x)
        loc = loc + 0.3 * scale_tril.sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=1.3 * scale_tril))

    return guide


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_bounds_bracket_the_closed_form_and_close_in_on_it(start):
    problem = linear_gaussian(8, 5, scale=1.0)
    x = problem.sample(100)
    gaps = []
    for temperatures in (3, 20, 200):
        bound = bidirectional(
            problem.model,
            off_posterior(problem),
            x,
            temperatures=temperatures,
            start=start,
            transition=FEW,
        )
        exact = problem.log_prob(bound.observed["x"])
        check_brackets(bound, exact)
        gaps.append(bound.mean_gap)
        assert bound.observed["x"].shape == x.shape
        assert not torch.isclose(bound.observed["x"], x).any()
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 0.2
    error = (bound.forward.log_prob - exact).abs().mean()
    assert error < 0.3


def test_both_weights_are_unbiased_however_coarse_the_path_is():
    """From N(0, 1) to exp(1.5 u - u^2 / 2 / s^2), whose integral is known; 3 steps, 3 kernels."""
    scale = torch.tensor([0.5, 0.8])
    precision = 1 / scale**2

    def densities(u):
        log_start = -0.5 * u.square().sum(-1) - 0.5 * math.log(2 * math.pi)
        log_end = (1.5 * u - 0.5 * precision[:, None] * u.square()).sum(-1)
        force_start, force_end = -u, 1.5 - precision[:, None] * u
        return Point(u, log_start, log_end - log_start, force_start, force_end - force_start)

    log_integral = 0.5 * (1.5 * scale) ** 2 + scale.log() + 0.5 * math.log(2 * math.pi)
    temperatures = [torch.full((2,), b) for b in (0.0, 0.1, 0.4, 1.0)]
    steps = [torch.full((2,), 1.2), torch.full((2,), 0.3)]  # not those of the other order
    kernels, hmc = Kernels(temperatures, steps), HMC(num_steps=2)
    forward = anneal(densities, densities(torch.randn(40_000, 2, 1)), kernels, hmc)
    end = (1.5 * scale**2)[:, None] + scale[:, None] * torch.randn(40_000, 2, 1)
    back = anneal_back(densities, densities(end), kernels, hmc)
    for log_ratio in (forward.log_weight - log_integral, log_integral - back.log_weight):
        w = log_ratio.exp()
        assert ((w.mean(0) - 1).abs() < 5 * w.std(0) / math.sqrt(40_000)).all()
        assert (w.std(0) > 0.1).all()  # or there would be nothing to see


def test_an_exact_guide_sees_the_simulated_data():
    """Both bounds are log p(x) then, chain by chain, for data that are not those it was given."""
    problem = linear_gaussian(6, 3)
    x = problem.sample(5)
    bound = bidirectional(problem.model, problem.guide, x=x, temperatures=3, start="guide")
    exact = problem.log_prob(bound.observed["x"])
    for score in (bound.forward, bound.reverse):
        assert torch.allclose(score.log_prob, exact, rtol=0, atol=1e-9)
        assert score.observations.same_data(bound.forward.observations)
    assert abs(bound.mean_gap) < 1e-9


@pytest.mark.parametrize("name", ["mixture_prior", "semi_supervised"])
def test_sums_over_discrete_latents(name):
    """z is drawn together with the y behind it, and is a draw from p(z | x)."""
    problem = PROBLEMS[name]()
    x = problem.args[0].repeat(20)
    bound = bidirectional(problem.model, problem.guide, x, temperatures=50, transition=FEW)
    drawn, one = bound.observed["x"], torch.tensor(1.25)
    centre, weights = torch.tensor([-2.0, 1.0]), torch.tensor([0.25, 0.75])
    exact = (dist.Normal(centre, one.sqrt()).log_prob(drawn[:, None]) + weights.log()).logsumexp(-1)
    check_brackets(bound, exact)
    assert bound.mean_gap < 0.3
    assert (bound.forward.log_prob - exact).abs().mean() < 0.3  # one datum may be unlucky


def labelled(x, y, num=None):
    """p(x, y | c): a label that is observed, and a condition that is no site."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        label = pyro.sample("y", dist.Bernoulli(0.3), obs=y)
        pyro.sample("x", dist.Normal(z + 3 * label, 0.5), obs=x)


def test_some_sites_are_drawn_and_others_stay_as_observed():
    x, y = torch.zeros(60), (torch.arange(60.0) % 2)
    bound = bidirectional(
        labelled, None, x, y, plate="rows", sites=["x"], temperatures=40, transition=FEW
    )
    drawn = bound.observed["x"]
    assert bound.observed.keys() == {"x"}
    assert drawn[y == 1].mean() - drawn[y == 0].mean() > 2
    exact = dist.Normal(3 * y, math.sqrt(1.25)).log_prob(drawn)
    exact = exact + dist.Bernoulli(torch.tensor(0.3)).log_prob(y)
    check_brackets(bound, exact)
    assert bound.mean_gap < 0.3
    both = bidirectional(labelled, None, x, y, plate="rows", temperatures=2, transition=FEW)
    assert both.observed.keys() == {"x", "y"}
    assert not torch.equal(both.observed["y"], y)


def global_mean(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_all_data_and_chains_share_a_draw_of_the_global_latents(start):
    """A guide that is wide open: with draws of their own the two sides would be nats apart."""

    def guide(x):
        mean = pyro.sample("mean", dist.Normal(1.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean + 0.7 * (x - mean), 0.6))

    bound = bidirectional(
        global_mean, guide, torch.zeros(80), start=start, temperatures=50, transition=FEW
    )
    drawn = bound.observed["x"]
    assert drawn.std() < 2
    assert bound.gap.abs().max() < 1.5
    check_brackets(bound, dist.Normal(drawn.mean(), math.sqrt(1.25)).log_prob(drawn))


def test_nested_plates_and_constrained_latents():
    """Counts of each document's words: a Gamma rate, and observations in a plate of their own."""
    counts = torch.zeros(3, 40)

    def model(counts):
        with pyro.plate("data", counts.shape[1], dim=-1):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            with pyro.plate("words", 3, dim=-2):
                pyro.sample("x", dist.Poisson(rate), obs=counts)

    def guide(counts):
        with pyro.plate("data", counts.shape[1], dim=-1):
            pyro.sample("rate", dist.Gamma(2.5 + counts.sum(0), 4.0))

    for start in ("prior", "guide"):
        bound = bidirectional(model, guide, counts, temperatures=40, start=start, transition=FEW)
        x = bound.observed["x"]  # N x words
        total = x.sum(-1)
        exact = (2 + total).lgamma() - (2 + total) * math.log(4) - (1 + x).lgamma().sum(-1)
        check_brackets(bound, exact)
        assert bound.mean_gap < 0.2


def test_minibatches_are_joined():
    problem = linear_gaussian(4, 2, scale=1.0)
    x = problem.sample(10)
    bound = bidirectional(
        problem.model, None, x, batch_size=4, chunk_size=8, temperatures=60, transition=FEW
    )
    assert bound.gap.shape == (10,)
    exact = problem.log_prob(bound.observed["x"])
    assert (bound.forward.log_prob - exact).abs().max() < 1
    assert (bound.reverse.log_prob - exact).abs().max() < 1


def test_a_minibatch_that_the_pair_draws_is_held():
    problem = PROBLEMS["global_and_local"]()
    bound = bidirectional(problem.model, problem.guide, temperatures=100, transition=FEW)
    assert bound.gap.shape == (6,)
    assert bound.gap.abs().max() < 2


def test_double_precision():
    torch.set_default_dtype(torch.float32)
    encoder = lvm.nn.MLP(6, [5], head=lvm.nn.NormalHead(2))
    vae = lvm.VAE(encoder, lvm.nn.MLP(2, [5], head=lvm.nn.NormalHead(6)))
    x = torch.randn(8, 6)
    bound = bidirectional(
        vae.model, vae.guide, x, dtype=torch.float64, start="guide", temperatures=3, transition=FEW
    )
    assert bound.observed["x"].dtype == torch.float64
    assert next(vae.parameters()).dtype == torch.float32
    assert bound.gap.isfinite().all()


def test_what_is_printed():
    problem = linear_gaussian(8, 5)
    x = problem.sample(20)
    wide = bidirectional(problem.model, None, x, temperatures=5, transition=FEW)
    text = str(wide)
    between = f"{wide.forward.mean:.3f} and {wide.reverse.mean:.3f}"
    assert f"log p(x) between {between} nats per datum" in text
    assert f"gap {wide.mean_gap:.3f} +- {float(wide.gap.std()) / math.sqrt(20):.3f}" in text
    assert "warning: a gap above 1 nat" in text
    assert "take more temperatures" in text
    assert wide.mean_gap == pytest.approx(wide.reverse.mean - wide.forward.mean)
    narrow = bidirectional(problem.model, problem.guide, x, temperatures=2, start="guide")
    assert "warning" not in str(narrow)
    assert math.isnan(BidirectionalBound.joined([narrow]).reverse.pareto_k.nanmean())


def test_picture():
    problem = linear_gaussian(5, 2)
    bound = bidirectional(problem.model, None, problem.sample(12), temperatures=5, transition=FEW)
    exact = problem.log_prob(bound.observed["x"])
    ax = plot_bidirectional(bound, exact=exact)
    upper, lower, ticks = (line.get_ydata() for line in ax.lines)
    order = (bound.forward.log_prob + bound.reverse.log_prob).argsort()
    assert torch.allclose(torch.as_tensor(lower), bound.forward.log_prob[order])
    assert torch.allclose(torch.as_tensor(upper), bound.reverse.log_prob[order])
    assert torch.allclose(torch.as_tensor(ticks), exact[order])
    assert plot_bidirectional(bound, ax=ax) is ax
    with pytest.raises(ValueError, match=r"shape \(12,\)"):
        plot_bidirectional(bound, exact=exact[:5])
    plt.close("all")


def with_factor(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -z.square())
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def scaled(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


NORMAL = PROBLEMS["normal_normal"]()
DATA = NORMAL.args[0].double()


@pytest.mark.parametrize(
    ("model", "guide", "settings", "match"),
    [
        (with_factor, None, {}, "drawn from their density.*pyro.factor at site 'f'"),
        (scaled, None, {}, "log-probability that is scaled at site 'x'"),
        (NORMAL.model, None, {"sites": ["y"]}, r"to simulate; got \['y'\].*has \['x'\]"),
        (
            lambda x: NORMAL.model(DATA + 1),
            NORMAL.guide,
            {"start": "guide"},
            r"among the arguments of the guide.*\['x'\].*start='prior'",
        ),
        (NORMAL.model, None, {"num_samples": 0}, "num_samples.*positive integer"),
        (NORMAL.model, None, {"start": "guide"}, "Use start='prior'"),
        (PROBLEMS["mixture"]().model, None, {}, "continuous latent"),
    ],
)
def test_what_is_refused(model, guide, settings, match):
    data = PROBLEMS["mixture"]().args[0].double() if "continuous" in match else DATA
    with pytest.raises(ValueError, match=match):
        bidirectional(model, guide, data, **settings)
