"""Naive Monte Carlo: within its errors of closed forms, and visibly bad where it must be."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import PROBLEMS

from pyro_lvm.datasets import linear_gaussian
from pyro_lvm.distributions.uniform_over import UniformOver
from pyro_lvm.marginal import importance_sampling, naive_monte_carlo
from pyro_lvm.models import GaussianMixture

pytestmark = pytest.mark.usefixtures("float64")

KNOWN = [
    name for name, make in PROBLEMS.items() if name not in ("global_and_local", "nested_masked")
]
DISCRETE = {
    "mixture": ["z"],
    "score_function": ["y"],
    "guide_chain": ["a", "b", "c"],
    "mixture_prior": ["y"],
    "topics": ["t"],
    "masked_mixture": ["z"],
}


def off(score, problem):
    """The distance from the closed form, in standard errors and with room for rounding."""
    return (score.log_prob - problem.log_prob).abs() / (score.std_error + 1e-12)


@pytest.mark.parametrize("name", KNOWN)
def test_any_model(name):
    problem = PROBLEMS[name]()
    score = naive_monte_carlo(problem.model, *problem.args, num_samples=4000)
    assert off(score, problem).max() < 5
    assert 0 < score.std_error.max() < 0.05  # drawn, and not summed out


@pytest.mark.parametrize("name", DISCRETE)
def test_uniform_draws_of_discrete_latents(name):
    problem = PROBLEMS[name]()
    score = naive_monte_carlo(
        problem.model, *problem.args, num_samples=4000, uniform=DISCRETE[name]
    )
    assert off(score, problem).max() < 5
    assert score.std_error.max() > 0


def test_weights_of_uniform_draws_are_those_of_the_lecture():
    """|Z| p(x, z) of a mixture, whose variance is known."""
    problem = PROBLEMS["mixture"]()
    loc = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 0.0]])
    weights = torch.tensor([0.2, 0.3, 0.5])
    likelihood = dist.Normal(loc, 1.0).to_event(1).log_prob(problem.args[0][:, None]).exp()  # N x C
    joint, mean = likelihood * weights, (likelihood * weights).sum(1)
    variances = {
        "uniform": 3 * joint.square().sum(1) - mean**2,
        "prior": (likelihood.square() * weights).sum(1) - mean**2,
    }
    for kind, variance in variances.items():
        uniform = ["z"] if kind == "uniform" else []
        score = naive_monte_carlo(problem.model, *problem.args, num_samples=50_000, uniform=uniform)
        expected = (variance / 50_000).sqrt() / mean
        assert torch.allclose(score.std_error, expected, rtol=0.03)


def test_our_mixture_is_sampled_and_importance_sampling_sums():
    x = torch.randn(20, 2)
    gmm = GaussianMixture(4, 2).initialize(x)
    drawn = naive_monte_carlo(gmm.model, x, num_samples=3000)
    summed = importance_sampling(gmm.model, gmm.guide, x, num_samples=2)
    assert (summed.std_error < 1e-6).all()
    assert ((drawn.log_prob - gmm.log_prob(x)).abs() < 5 * drawn.std_error).all()


def test_it_is_bad_in_ten_dimensions_and_says_so():
    problem = linear_gaussian(20, 10)
    x = problem.sample(20)
    score = naive_monte_carlo(problem.model, x, num_samples=10_000)
    assert (problem.log_prob(x) - score.log_prob).mean() > 10  # nats too low
    assert score.num_unreliable == 20
    assert "importance_sampling" in str(score)
    assert "fewer than 10 effective samples at 20 of 20 data" in str(score)
    small = linear_gaussian(6, 1, scale=2.0)
    good = naive_monte_carlo(small.model, small.sample(20), num_samples=10_000)
    assert "warning" not in str(good)


def test_conditions_and_the_cost_of_a_decoder():
    """The prior may depend on arguments; the decoder runs once per chunk, not for the draws."""
    calls = []

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            calls.append(z.shape)
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x, y = torch.randn(8), torch.randn(8)
    score = naive_monte_carlo(model, x, y, num_samples=3000, chunk_size=1000)
    exact = dist.Normal(y, 1.25**0.5).log_prob(x)
    assert ((score.log_prob - exact).abs() < 5 * score.std_error).all()
    assert sum(shape == (1000, 8) for shape in calls) == 3


def test_uniform_over_values():
    values = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    fn = UniformOver(values).expand([5, 4])
    draws = fn.sample((3000,))
    assert draws.shape == (3000, 5, 4, 2)
    share = (draws == values[1]).all(-1).double().mean()
    assert share == pytest.approx(1 / 3, abs=5 * (2 / 9 / 60_000) ** 0.5)
    assert torch.allclose(fn.log_prob(draws).exp(), torch.tensor(1 / 3))
    assert fn.log_prob(draws).shape == (3000, 5, 4)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_samples": 0}, "num_samples.*positive"),
        ({"uniform": ["nothing"]}, r"latents of the model, which are \['z'\]"),
        ({"uniform": "z"}, "list of latents"),
        ({"uniform": ["z"]}, "finitely many values in uniform; got Normal at site 'z'"),
        ({"plate": "rows"}, "plate named 'rows'"),
        ({"batch_size": 0}, "batch_size.*positive"),
    ],
)
def test_what_is_refused(settings, match):
    problem = PROBLEMS["normal_normal"]()
    with pytest.raises(ValueError, match=match):
        naive_monte_carlo(problem.model, *problem.args, **settings)
