"""to_arviz against closed forms, group by group; compare against its formulas."""

import dataclasses
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_lvm.datasets import linear_gaussian
from pyro_lvm.inference_data import compare, to_arviz
from pyro_lvm.marginal import exact, importance_sampling
from pyro_lvm.models import GaussianMixture

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz

pytestmark = pytest.mark.usefixtures("float64")


def names_of(idata):
    groups = idata.children if hasattr(idata, "children") else idata.groups()
    return {name.strip("/") for name in groups}


def draws(idata, group, name):
    """The values of a variable, draws along the first dimension."""
    return torch.as_tensor(idata[group][name].values[0])


def standard_normal_mean(values, mean, variance):
    """z-scores of the mean of independent draws, given their mean and variance."""
    return (values.mean(0) - mean) / (variance / len(values)).sqrt()


def assert_moments(values, mean, variance):
    """Mean and variance of normal draws, each within five standard errors."""
    assert standard_normal_mean(values, mean, variance).abs().max() < 5
    error = math.sqrt(2 / len(values))
    assert (values.var(0) / variance - 1).abs().max() < 5 * error


# ---------------------------------------------------------------------------- groups and shapes

N = NUM_DATA
LATENTS = {  # site -> its shape behind the draws
    "normal_normal": {"z": (N,)},
    "modules": {"z": (N, 2)},
    "global_and_local": {"mean": (), "z": (N,)},
    "nested_masked": {"z": (N, 2), "w": (N, 4)},
    "auxiliary": {"z": (N,), "a": (N,)},
    "score_function": {"y": (N,)},
    "mixture": {"z": (N,)},
    "topics": {"logit": (N,), "t": (N, 3)},
    "mixture_prior": {"y": (N,), "z": (N,)},
    "semi_supervised": {"y": (N,), "z": (N,)},
    "guide_chain": {"a": (N,), "b": (N,), "c": (N, 2)},
    "independent_guide": {"y": (N,), "z": (N,)},
    "two_under_a_sum": {"a": (N,), "b": (N,), "y": (N,)},
    "masked_mixture": {"z": (N,)},
}
OBSERVED = {
    **{key: {"x": (N,)} for key in LATENTS},
    "modules": {"x": (N, 2, 3)},
    "nested_masked": {"x": (N, 4)},
    "mixture": {"x": (N, 2)},
    "topics": {"word": (N, 3)},
    "guide_chain": {"x": (N, 2)},
    "masked_mixture": {"x0": (N,), "x1": (N,)},
}


MISSING = {("nested_masked", "x"): 3, ("masked_mixture", "x0"): 2, ("masked_mixture", "x1"): 3}


@pytest.mark.parametrize("name", PROBLEMS)
def test_groups_dims_and_shapes(name):
    problem = PROBLEMS[name]()
    idata = to_arviz(problem.model, problem.guide, *problem.args, num_samples=7, num_weights=5)
    observed = OBSERVED[name]
    replicates = {n: (1, 7, *shape) for n, shape in observed.items()}
    groups = {"posterior", "log_likelihood", "sample_stats", "observed_data"}
    groups |= {"prior", "prior_predictive", "posterior_predictive"}
    assert names_of(idata) == groups
    latents = {n: (1, 7, *shape) for n, shape in LATENTS[name].items()}
    prior = {n: shape for n, shape in latents.items() if n != "a" or name != "auxiliary"}
    expected = {
        "posterior": latents,
        "prior": prior,
        "posterior_predictive": replicates,
        "prior_predictive": replicates,
        "log_likelihood": {"marginal": (1, 7, N)},
        "sample_stats": {"log_weight": (1, 7, N)},
        "observed_data": {**observed, "checksum": (N,)},
    }
    for group, shapes in expected.items():
        dataset = idata[group]
        assert {n: v.shape for n, v in dataset.data_vars.items()} == shapes
        for variable_name, variable in dataset.data_vars.items():
            leading = ["chain", "draw"] * (group != "observed_data")
            if variable_name != "mean":
                leading.append("data")
            rest = [f"{variable_name}_dim_{i}" for i in range(variable.ndim - len(leading))]
            assert list(variable.dims) == leading + rest
            missing = MISSING.get((name, variable_name), 0) * (group == "observed_data")
            assert np.isnan(variable.values).sum() == missing
            assert not np.isinf(variable.values).any()
        for dim, size in dataset.sizes.items():
            assert (dataset.coords[dim].values == np.arange(size)).all()
        assert dataset.attrs["inference_library"] == "pyro_lvm"


def test_predictive_groups_can_be_left_out():
    problem = PROBLEMS["normal_normal"]()
    idata = to_arviz(problem.model, problem.guide, *problem.args, num_samples=3, predictive=False)
    assert names_of(idata).isdisjoint({"prior_predictive", "posterior_predictive"})
    assert "prior" in names_of(idata)


def test_other_plate_names_and_no_guide():
    def model(x):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(5)
    idata = to_arviz(model, None, x, num_samples=4, plate="rows")
    assert idata["log_likelihood"]["marginal"].dims == ("chain", "draw", "rows")
    expected = torch.logaddexp(
        math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(x),
        math.log(0.3) + dist.Normal(1.0, 1.0).log_prob(x),
    )
    assert torch.allclose(draws(idata, "log_likelihood", "marginal"), expected.expand(4, -1))


def test_random_state_goes_on_and_a_seed_repeats():
    problem = linear_gaussian(3, 2)
    x = problem.sample(4)
    values = []
    for seed in (1, 1, 2):
        pyro.set_rng_seed(seed)
        values.append(draws(to_arviz(problem.model, problem.guide, x), "posterior", "z"))
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


# ---------------------------------------------------------------------------- local latents


def test_linear_gaussian_in_every_group():
    problem = linear_gaussian(4, 2)
    x = problem.sample(5)
    idata = to_arviz(problem.model, problem.guide, x, num_samples=4000)
    loc, scale_tril = problem.posterior(x)
    covariance, noise = scale_tril @ scale_tril.T, problem.scale**2
    assert_moments(draws(idata, "posterior", "z"), loc, covariance.diag())
    assert_moments(draws(idata, "prior", "z"), torch.zeros(5, 2), torch.ones(2))
    fitted = loc @ problem.W.T + problem.loc
    spread = (problem.W @ covariance @ problem.W.T).diag() + noise
    assert_moments(draws(idata, "posterior_predictive", "x"), fitted, spread)
    marginal = problem.W.square().sum(1) + noise
    assert_moments(draws(idata, "prior_predictive", "x"), problem.loc.expand(5, -1), marginal)
    log_prob = problem.log_prob(x).expand(4000, -1)
    assert (draws(idata, "log_likelihood", "marginal") - log_prob).abs().max() < 1e-10
    # with the exact posterior every weight p(x, z) / q(z) is p(x)
    assert (draws(idata, "sample_stats", "log_weight") - log_prob).abs().max() < 1e-10
    assert (torch.as_tensor(idata["observed_data"]["x"].values) == x).all()


def test_log_weight_is_the_importance_weight():
    problem = PROBLEMS["normal_normal"]()
    (x,) = problem.args
    idata = to_arviz(problem.model, problem.guide, x, num_samples=50)
    z = draws(idata, "posterior", "z")
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z + 0.3, 1.0).log_prob(x)
    expected = joint - dist.Normal(0.4 * x, 0.8).log_prob(z)
    assert torch.allclose(draws(idata, "sample_stats", "log_weight"), expected)
    assert expected.std(0).min() > 0.01  # the guide is not exact: it could not be another weight


def test_replicates_follow_the_very_draws_of_the_latents():
    """x' given z has the noise alone: a predictive with latents of its own would have more."""
    problem = linear_gaussian(3, 2, scale=0.01)
    idata = to_arviz(problem.model, problem.guide, problem.sample(4), num_samples=300)
    for latent, observed in (
        ("posterior", "posterior_predictive"),
        ("prior", "prior_predictive"),
    ):
        mean = draws(idata, latent, "z") @ problem.W.T + problem.loc
        noise = (draws(idata, observed, "x") - mean) / 0.01
        assert noise.square().mean() == pytest.approx(1.0, abs=5 * math.sqrt(2 / noise.numel()))


@pytest.mark.parametrize("name", ["normal_normal", "modules", "score_function", "topics"])
def test_log_likelihood_is_marginal_over_local_latents(name):
    problem = PROBLEMS[name]()
    score = importance_sampling(problem.model, problem.guide, *problem.args, num_samples=3000)
    pyro.set_rng_seed(3)
    idata = to_arviz(problem.model, problem.guide, *problem.args, num_samples=3, num_weights=3000)
    rows = draws(idata, "log_likelihood", "marginal")
    assert (rows == rows[0]).all()
    assert ((rows[0] - problem.log_prob).abs() < 5 * score.std_error).all()


def test_a_score_is_taken_over_and_has_to_be_of_these_data():
    problem = linear_gaussian(3, 2)
    x = problem.sample(6)
    score = exact_score(problem, x)
    moved = dataclasses.replace(score, log_prob=score.log_prob + 1.0)
    idata = to_arviz(problem.model, problem.guide, x, num_samples=2, score=moved)
    assert torch.equal(draws(idata, "log_likelihood", "marginal")[1], moved.log_prob)
    other = exact_score(problem, problem.sample(6))
    with pytest.raises(ValueError, match="score of these data; got one of other data"):
        to_arviz(problem.model, problem.guide, x, score=other)
    with pytest.raises(ValueError, match=r"no score for a pair with global latents \['mean'\]"):
        to_arviz(*normal_mean(), x[:, 0], score=score)


# ---------------------------------------------------------------------------- enumerated sites


def assert_frequencies(labels, probabilities):
    """labels draws x N, probabilities N x C: each share within five standard errors."""
    for label in range(probabilities.shape[-1]):
        p = probabilities[:, label]
        error = (p * (1 - p) / len(labels)).sqrt()
        assert (((labels == label).double().mean(0) - p).abs() < 5 * error + 1e-9).all()


@pytest.mark.parametrize("name", ["mixture", "guide_chain", "masked_mixture"])
def test_sums_are_exact_in_the_log_likelihood(name):
    problem = PROBLEMS[name]()
    idata = to_arviz(problem.model, problem.guide, *problem.args, num_samples=3)
    expected = problem.log_prob.expand(3, -1)
    assert (draws(idata, "log_likelihood", "marginal") - expected).abs().max() < 1e-10


def test_labels_of_a_mixture_are_drawn_from_their_posterior():
    mixture = GaussianMixture(3, 2)
    x = torch.randn(8, 2)
    mixture.initialize(torch.cat([x, 0.5 * x + 1.0]))
    idata = to_arviz(mixture.model, mixture.guide, x, num_samples=4000)
    assert_frequencies(draws(idata, "posterior", "z"), mixture.responsibilities(x).detach())
    prior = mixture.weights.detach().expand(8, -1)
    assert_frequencies(draws(idata, "prior", "z"), prior)
    # the replicates have the labels' means: E x' = sum_c r_c loc_c
    labels = draws(idata, "posterior", "z").long()
    residuals = draws(idata, "posterior_predictive", "x") - mixture.loc.detach()[labels]
    variance = mixture.covariances().detach().diagonal(dim1=-2, dim2=-1)[labels]
    scaled = residuals / variance.sqrt()
    assert standard_normal_mean(scaled, 0.0, torch.ones(())).abs().max() < 5


def test_labels_given_a_sampled_latent():
    """y | z in a mixture prior: summed out in the model, z from the guide."""
    problem = PROBLEMS["mixture_prior"]()
    idata = to_arviz(problem.model, problem.guide, *problem.args, num_samples=4000)
    z, y = draws(idata, "posterior", "z"), draws(idata, "posterior", "y")
    centre = torch.tensor([-2.0, 1.0])
    logits = dist.Normal(centre, 1.0).log_prob(z[..., None]) + torch.tensor([0.25, 0.75]).log()
    probability = logits.softmax(-1)[..., 1]
    # sum over draws of y - p(y | z): a martingale, of variance sum p (1 - p)
    error = (probability * (1 - probability)).sum(0).sqrt()
    assert ((y - probability).sum(0).abs() < 5 * error).all()
    assert ((y - probability)[z > 0].sum().abs() < 5 * error.sum()).all()
    (x,) = problem.args
    assert_moments(z, 0.8 * x, torch.full_like(x, 0.25))
    prior_y = draws(idata, "prior", "y")
    assert_frequencies(prior_y, torch.tensor([0.25, 0.75]).expand(N, 2))
    assert_moments(draws(idata, "prior", "z") - centre[prior_y.long()], 0.0, torch.ones(N))


def test_labels_of_a_masked_mixture():
    """Masks take observations away, and the label's own mask nothing: its prior stays."""
    problem = PROBLEMS["masked_mixture"]()
    (x,) = problem.args
    idata = to_arviz(problem.model, problem.guide, x, num_samples=4000)
    seen = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 1, 1, 0, 0]])
    log_joint = torch.tensor([0.25, 0.75]).log() + sum(
        seen[i, :, None] * dist.Normal(torch.tensor([-1.0, 0.5]), scale).log_prob(x[i, :, None])
        for i, scale in enumerate((1.0, 0.5))
    )
    assert_frequencies(draws(idata, "posterior", "z"), log_joint.softmax(-1))


def test_labels_in_a_subsampled_plate_have_the_posterior_of_one_datum():
    """The plate's scale, 10 here, is not theirs."""
    everything = torch.linspace(-1.0, 2.0, 40)

    def model():
        with pyro.plate("data", 40, subsample_size=4) as index:
            z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z, 1.0), obs=everything[index])

    idata = to_arviz(model, None, num_samples=3000)
    x = torch.as_tensor(idata["observed_data"]["x"].values)
    parts = [math.log(p) + dist.Normal(z, 1.0).log_prob(x) for z, p in ((0.0, 0.6), (1.0, 0.4))]
    assert torch.allclose(draws(idata, "log_likelihood", "marginal")[0], torch.logaddexp(*parts))
    assert_frequencies(draws(idata, "posterior", "z"), torch.stack(parts, -1).softmax(-1))


def test_sites_that_the_guide_enumerates_are_drawn():
    problem = PROBLEMS["semi_supervised"]()
    (x,) = problem.args
    idata = to_arviz(problem.model, problem.guide, x, num_samples=4000, num_weights=2000)
    logits = torch.stack([-0.8 * x, 0.8 * x], -1)
    y = draws(idata, "posterior", "y")
    assert_frequencies(y, logits.softmax(-1))
    centre = torch.tensor([-2.0, 1.0])[y.long()]
    assert_moments(draws(idata, "posterior", "z") - 0.8 * (x - centre), 0.0, torch.full((N,), 0.25))
    score = importance_sampling(problem.model, problem.guide, x, num_samples=2000)
    deviation = draws(idata, "log_likelihood", "marginal")[0] - problem.log_prob
    assert (deviation.abs() < 5 * score.std_error).all()


# ---------------------------------------------------------------------------- global latents


def normal_mean():
    """x_i ~ N(mean, 1)."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(0.5, 0.7))

    return model, guide


def test_global_latents_without_local_ones():
    x = torch.randn(9)
    idata = to_arviz(*normal_mean(), x, num_samples=2000)
    mean = draws(idata, "posterior", "mean")
    assert_moments(mean, torch.tensor(0.5), torch.tensor(0.49))
    assert_moments(draws(idata, "prior", "mean"), torch.tensor(0.0), torch.tensor(4.0))
    expected = dist.Normal(mean[:, None], 1.0).log_prob(x)
    assert torch.allclose(draws(idata, "log_likelihood", "marginal"), expected)
    replicate = draws(idata, "posterior_predictive", "x") - mean[:, None]
    assert_moments(replicate, torch.zeros(9), torch.ones(9))


def test_autoguides_of_global_latents():
    x = torch.randn(9)
    model, _ = normal_mean()
    for autoguide in (AutoNormal, AutoDelta):
        idata = to_arviz(model, autoguide(model), x, num_samples=20, num_weights=1)
        mean = draws(idata, "posterior", "mean")
        expected = dist.Normal(mean[:, None], 1.0).log_prob(x)
        assert torch.allclose(draws(idata, "log_likelihood", "marginal"), expected)
        assert len(mean.unique()) == (20 if autoguide is AutoNormal else 1)


def test_priors_of_a_mixture():
    mixture = GaussianMixture(
        2, 1, "spherical", priors={"loc": dist.Normal(torch.zeros(2, 1), 3.0).to_event(2)}
    )
    x = torch.randn(4, 1)
    idata = to_arviz(mixture.model, mixture.guide, x, num_samples=6, num_weights=1)
    loc, scale = draws(idata, "posterior", "loc"), mixture.scale.detach()  # draws x C x 1, C x 1
    assert loc.shape == (6, 2, 1)
    parts = dist.Normal(loc[:, None], scale).log_prob(x[None, :, None]).sum(-1)
    expected = (parts + mixture.weights.detach().log()).logsumexp(-1)
    assert torch.allclose(draws(idata, "log_likelihood", "marginal"), expected)


def global_and_local(exact_guide, plated=False):
    """mean ~ N(0, 3), z_i ~ N(mean, 1), x_i ~ N(z_i, 0.5); plated: mean = the sum of two."""

    def mean():
        if not plated:
            return pyro.sample("mean", dist.Normal(0.1, 1.5))
        with pyro.plate("parts", 2, dim=-2):
            return pyro.sample("mean", dist.Normal(0.1, 1.5)).sum(-2, keepdim=True)

    def model(x):
        m = mean()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        m = mean()
        with pyro.plate("data", len(x)):
            if exact_guide:  # precision 1 + 4
                pyro.sample("z", dist.Normal((m + 4 * x) / 5, math.sqrt(1 / 5)))
            else:
                pyro.sample("z", dist.Normal(0.7 * x, 0.7))

    return model, guide


@pytest.mark.parametrize("plated", [False, True])
def test_both_kinds_of_latents_with_an_exact_local_guide(plated):
    x = torch.randn(5)
    idata = to_arviz(*global_and_local(True, plated), x, num_samples=12, num_weights=3)
    mean = draws(idata, "posterior", "mean")
    assert mean.shape == ((12, 2) if plated else (12,))
    total = mean.sum(-1) if plated else mean
    expected = dist.Normal(total[:, None], math.sqrt(1.25)).log_prob(x)
    assert (draws(idata, "log_likelihood", "marginal") - expected).abs().max() < 1e-10
    assert torch.allclose(draws(idata, "sample_stats", "log_weight"), expected)


def test_both_kinds_of_latents_are_within_five_errors_of_the_closed_form():
    x = torch.randn(N)
    num_weights = 2000
    idata = to_arviz(*global_and_local(False), x, num_samples=25, num_weights=num_weights)
    mean = draws(idata, "posterior", "mean")[:, None]
    expected = dist.Normal(mean, math.sqrt(1.25)).log_prob(x)
    # relative variance of w = p(x, z | mean) / q(z) by draws of our own, delta method
    z = 0.7 * x + 0.7 * torch.randn(20_000, 1, N)
    log_weight = dist.Normal(mean, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x)
    w = (log_weight - dist.Normal(0.7 * x, 0.7).log_prob(z) - expected).exp()
    error = (w.var(0) / num_weights).sqrt()
    z_scores = (draws(idata, "log_likelihood", "marginal") - expected) / error
    assert z_scores.abs().max() < 5
    assert 0.3 < z_scores.square().mean() < 2.5


def test_a_subsampled_plate_keeps_its_data():
    """All groups are about the data that the plate has drawn, whatever is run again for them."""
    everything = torch.randn(40)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 40, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=everything[index])

    def guide():
        mean = pyro.sample("mean", dist.Normal(0.1, 0.2))
        with pyro.plate("data", 40, subsample_size=4) as index:
            pyro.sample("z", dist.Normal((mean + 4 * everything[index]) / 5, math.sqrt(1 / 5)))

    idata = to_arviz(model, guide, num_samples=6, num_weights=2)
    x = torch.as_tensor(idata["observed_data"]["x"].values)
    mean = draws(idata, "posterior", "mean")[:, None]
    expected = dist.Normal(mean, math.sqrt(1.25)).log_prob(x)
    assert (draws(idata, "log_likelihood", "marginal") - expected).abs().max() < 1e-10
    assert torch.allclose(draws(idata, "sample_stats", "log_weight"), expected)


def test_a_plate_that_only_the_model_subsamples_keeps_its_data():
    everything = torch.randn(40)

    def model():
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("data", 40, subsample_size=4) as index:
            pyro.sample("x", dist.Normal(mean, 1.0), obs=everything[index])

    idata = to_arviz(model, lambda: pyro.sample("mean", dist.Normal(0.1, 0.2)), num_samples=6)
    x = torch.as_tensor(idata["observed_data"]["x"].values)
    expected = dist.Normal(draws(idata, "posterior", "mean")[:, None], 1.0).log_prob(x)
    assert torch.allclose(draws(idata, "log_likelihood", "marginal"), expected)


# ---------------------------------------------------------------------------- special sites


def test_several_observed_sites_deterministic_sites_and_factors():
    def model(x, y, shift=0.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            pyro.deterministic("double", 2.0 * x)
            pyro.factor("weight", torch.zeros(len(x)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Poisson(1.0 + z + shift), obs=y)

    x, y = torch.randn(5), torch.tensor([0.0, 1.0, 4.0, 2.0, 0.0])
    idata = to_arviz(model, None, x, y, num_samples=5, shift=0.5)
    assert set(idata["observed_data"].data_vars) == {"x", "y", "checksum"}
    assert set(idata["posterior_predictive"].data_vars) == {"x", "y"}
    assert set(idata["prior_predictive"].data_vars) == {"x", "y"}
    assert set(idata["posterior"].data_vars) == {"z"}
    parts = [
        math.log(p) + dist.Normal(z, 1.0).log_prob(x) + dist.Poisson(1.5 + z).log_prob(y)
        for z, p in ((0.0, 0.6), (1.0, 0.4))
    ]
    expected = torch.logaddexp(*parts)
    assert torch.allclose(draws(idata, "log_likelihood", "marginal")[0], expected)
    assert idata["observed_data"].attrs["base_measure"] == "mixed"
    assert "constant_data" not in names_of(idata)


def test_conditions_are_constant_data():
    def model(x, y, scale=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y[:, 0], 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x, y, scale=None):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((4 * x + y[:, 0]) / 5, math.sqrt(1 / 5)))

    x, y = torch.randn(6), torch.randn(6, 2)
    idata = to_arviz(model, guide, x, y, num_samples=2000, num_weights=2, scale=torch.tensor(0.5))
    assert set(idata["constant_data"].data_vars) == {"y"}
    assert torch.equal(torch.as_tensor(idata["constant_data"]["y"].values), y)
    assert idata["constant_data"]["y"].dims == ("data", "y_dim_0")
    assert_moments(draws(idata, "prior", "z"), y[:, 0], torch.ones(6))
    expected = dist.Normal(y[:, 0], math.sqrt(1.25)).log_prob(x)
    assert torch.allclose(draws(idata, "log_likelihood", "marginal")[0], expected)


def test_masked_observations_do_not_count():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, mask = torch.randn(5), torch.tensor([True, False, True, True, False])
    idata = to_arviz(model, None, x, mask, num_samples=1500)
    rows = draws(idata, "log_likelihood", "marginal")
    assert torch.allclose(rows[:, ~mask], torch.zeros(()))
    parts = [math.log(p) + dist.Normal(z, 1.0).log_prob(x) for z, p in ((0.0, 0.6), (1.0, 0.4))]
    assert torch.allclose(rows[0, mask], torch.logaddexp(*parts)[mask])
    assert (torch.as_tensor(idata["constant_data"]["mask"].values) == mask).all()
    # where nothing was seen the posterior is the prior, and replicates are there all the same
    share = torch.softmax(torch.stack(parts, -1), -1)
    share[~mask] = torch.tensor([0.6, 0.4])
    assert_frequencies(draws(idata, "posterior", "z"), share)
    assert draws(idata, "posterior_predictive", "x").std(0).min() > 0.5


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_samples": 1}, "num_samples >= 2; got 1"),
        ({"num_samples": 0}, "num_samples to be a positive integer"),
        ({"num_weights": 0}, "num_weights to be a positive integer"),
        ({"plate": "rows"}, "plate named 'rows'"),
    ],
)
def test_what_to_arviz_refuses(settings, match):
    problem = PROBLEMS["normal_normal"]()
    with pytest.raises(ValueError, match=match):
        to_arviz(problem.model, problem.guide, *problem.args, **settings)


# ---------------------------------------------------------------------------- ArviZ


@pytest.mark.parametrize("name", ["global_and_local", "topics", "modules"])
def test_netcdf_round_trip(name, tmp_path):
    problem = PROBLEMS[name]()
    idata = to_arviz(problem.model, problem.guide, *problem.args, num_samples=40, num_weights=5)
    path = tmp_path / "idata.nc"
    idata.to_netcdf(path)
    back = arviz.from_netcdf(path)
    assert names_of(back) == names_of(idata)
    for group in names_of(idata):
        assert set(back[group].data_vars) == set(idata[group].data_vars)
        for variable in idata[group].data_vars:
            assert idata[group][variable].equals(back[group][variable])
            assert idata[group][variable].dtype == back[group][variable].dtype
    attributes = ("base_measure", "values_per_datum")
    for key in attributes:
        assert back["observed_data"].attrs[key] == idata["observed_data"].attrs[key]
    assert compare({"a": idata, "b": back})["diff"].abs().max() == 0


def test_arvizs_own_functions_work():
    import matplotlib.pyplot

    matplotlib.use("Agg")
    x = torch.randn(30)
    idata = to_arviz(*normal_mean(), x, num_samples=400)
    summary = arviz.summary(idata, round_to="none")
    mean = float(summary.loc["mean", "mean"])
    assert mean == pytest.approx(float(draws(idata, "posterior", "mean").mean()), abs=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the guide is wide: some Pareto k are large
        loo = arviz.loo(idata, pointwise=True)
    assert loo.n_data_points == 30
    is_new = int(arviz.__version__.split(".")[0]) >= 1
    (arviz.plot_dist if is_new else arviz.plot_posterior)(idata, var_names=["mean"])
    arviz.plot_trace(idata, var_names=["mean"])
    matplotlib.pyplot.close("all")


# ---------------------------------------------------------------------------- compare


def exact_score(problem, x):
    """The exact log p(x): importance sampling with the exact posterior needs one sample."""
    return importance_sampling(problem.model, problem.guide, x, num_samples=1)


def scores_like(log_probs):
    """Model name -> a score of one and the same data."""
    problem = linear_gaussian(2, 1)
    score = exact_score(problem, problem.sample(len(next(iter(log_probs.values())))))
    return {n: dataclasses.replace(score, log_prob=v) for n, v in log_probs.items()}


def assert_table(table, log_probs):
    """Every column by its formula; ArviZ's variances divide by N."""
    means = {n: float(v.mean()) for n, v in log_probs.items()}
    order = sorted(means, key=means.get, reverse=True)
    assert list(table.index) == order
    assert list(table["rank"]) == list(range(len(order)))
    best, num = log_probs[order[0]], len(next(iter(log_probs.values())))
    for name, row in table.iterrows():
        v = log_probs[name]
        assert row["mean"] == pytest.approx(means[name], rel=1e-9)
        assert row["se"] == pytest.approx(float(v.std(correction=0)) / math.sqrt(num), rel=1e-6)
        assert row["diff"] == pytest.approx(float((v - best).mean()), rel=1e-9, abs=1e-12)
        dse = float((v - best).std(correction=0)) / math.sqrt(num)
        assert row["dse"] == pytest.approx(dse, rel=1e-6, abs=1e-12)
    assert table["weight"].sum() == pytest.approx(1.0)
    totals = torch.tensor([means[n] * num for n in order])
    assert list(table["weight"]) == pytest.approx(totals.softmax(0).tolist(), abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_compare_by_its_formulas(offset):
    torch.manual_seed(1)
    noise = 5.0 * torch.randn(40) + offset  # common to all models: it cancels in the differences
    log_probs = {
        "middle": noise + 0.03 * torch.randn(40),
        "worst": noise - 0.1 + 0.03 * torch.randn(40),
        "best": noise + 0.05 + 0.03 * torch.randn(40),
    }
    table = compare(scores_like(log_probs))
    assert_table(table, log_probs)
    assert list(table.index) == ["best", "middle", "worst"]
    assert table["dse"].max() < 0.1 * table["se"].min()
    assert list(table["unreliable"]) == [0, 0, 0]
    assert (table["diff"] <= 0).all()


def test_models_that_are_worlds_apart():
    log_probs = {"a": torch.full((20,), -1000.0), "b": torch.full((20,), 1000.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        table = compare(scores_like(log_probs))
    assert list(table["weight"]) == [1.0, 0.0]
    assert list(table["diff"]) == [0.0, -2000.0]


def test_equal_models_share_the_weight():
    values = torch.randn(20)
    table = compare(scores_like({"a": values, "b": values.clone(), "c": values.clone()}))
    assert list(table["weight"]) == pytest.approx([1 / 3] * 3)
    assert (table["diff"] == 0).all()
    assert (table["dse"] == 0).all()


def test_unreliable_data_are_counted():
    scores = scores_like({"a": torch.randn(6), "b": torch.randn(6) - 5})
    k = torch.tensor([0.1, 0.69, 0.71, 2.0, -math.inf, math.nan])
    scores["b"] = dataclasses.replace(scores["b"], pareto_k=k)
    for names in ("ab", "ba"):  # the order in which they are given does not matter
        table = compare({n: scores[n] for n in names})
        assert dict(table["unreliable"]) == {"a": 0, "b": 2}


def test_what_a_score_assumes_stands_beside_it():
    scores = scores_like({"a": torch.randn(6), "b": torch.randn(6) - 5})
    assert "assuming" not in compare(scores)
    scores["a"] = dataclasses.replace(scores["a"], assumption="a kernel of width 1")
    table = compare(scores)
    assert table.loc["a", "assuming"] == "a kernel of width 1"
    assert table.loc["b", "assuming"] == ""


def pair_of_idata(x):
    problem, other = linear_gaussian(4, 2), linear_gaussian(4, 1, seed=3)
    pairs = {"two": problem, "one": other}
    idata = {n: to_arviz(p.model, p.guide, x, num_samples=20) for n, p in pairs.items()}
    return idata, {n: exact_score(p, x) for n, p in pairs.items()}


def test_idata_without_global_latents_are_compared_like_their_scores():
    """Their log-likelihood is the same for all draws, which no importance weight can improve."""
    x = linear_gaussian(4, 2).sample(25)
    idata, scores = pair_of_idata(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # ArviZ's, of Pareto k
        table = compare(idata)
    expected = compare(scores)
    assert list(table.index) == list(expected.index) == ["two", "one"]
    assert np.allclose(table.to_numpy(float), expected.to_numpy(float), rtol=1e-9)
    assert list(table["unreliable"]) == [0, 0]
    assert_table(table, {n: s.log_prob for n, s in scores.items()})


def test_global_latents_are_cross_validated():
    """The leave-one-out density of a conjugate normal mean, in closed form."""
    x = 1.0 + torch.randn(40)

    def pair(prior_scale):
        precision = len(x) + prior_scale**-2

        def model(x):
            mean = pyro.sample("mean", dist.Normal(0.0, prior_scale))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

        def guide(x):
            pyro.sample("mean", dist.Normal(x.sum() / precision, precision**-0.5))

        rest = precision - 1
        loc = (x.sum() - x) / rest
        return (model, guide), dist.Normal(loc, (1 + 1 / rest) ** 0.5).log_prob(x)

    (wide, log_wide), (narrow, log_narrow) = pair(10.0), pair(0.05)
    idata = {"narrow": to_arviz(*narrow, x, num_samples=3000)}
    idata["wide"] = to_arviz(*wide, x, num_samples=3000)
    table = compare(idata)
    assert list(table.index) == ["wide", "narrow"]
    assert list(table["unreliable"]) == [0, 0]
    for name, expected in (("wide", log_wide), ("narrow", log_narrow)):
        assert table.loc[name, "mean"] == pytest.approx(float(expected.mean()), abs=0.01)
        assert table.loc[name, "se"] == pytest.approx(float(expected.std()) / 40**0.5, rel=0.05)
    difference = log_narrow - log_wide
    assert table.loc["narrow", "diff"] == pytest.approx(float(difference.mean()), abs=0.01)
    assert table.loc["narrow", "dse"] == pytest.approx(float(difference.std()) / 40**0.5, rel=0.05)


def test_too_few_draws_to_cross_validate():
    few, enough = (to_arviz(*normal_mean(), torch.randn(6), num_samples=n) for n in (24, 25))
    with pytest.raises(ValueError, match=r"at least 25 draws of the posterior .* got 24"):
        compare({"a": few, "b": few})
    assert np.isfinite(compare({"a": enough, "b": enough})["mean"]).all()


def test_same_data_in_other_precision_and_shape():
    x = torch.rand(7, 64)

    def model(x, event_dim):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            loc = z.reshape(z.shape + (1,) * event_dim)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(event_dim), obs=x)

    flat = exact(model, None, x, 1)
    images = exact(model, None, x.float().reshape(7, 1, 8, 8), 3)
    table = compare({"flat": flat, "images": images})
    assert table["diff"].abs().max() < 1e-5
    idata = to_arviz(model, None, x.float().reshape(7, 1, 8, 8), 3, num_samples=2)
    assert (
        compare({"flat": to_arviz(model, None, x, 1, num_samples=2), "images": idata})["diff"]
        .abs()
        .max()
        < 1e-5
    )


def likelihood(distribution):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", distribution, obs=x)

    return model


@pytest.mark.parametrize("make", [exact, to_arviz])
def test_what_compare_refuses(make):
    binary = (torch.arange(8) % 3 == 0).double()
    normal, bernoulli = likelihood(dist.Normal(0.5, 1.0)), likelihood(dist.Bernoulli(0.3))

    def score(model, x):
        return make(model, None, x)

    good = score(bernoulli, binary)
    assert len(compare({"a": good, "b": score(bernoulli, binary)})) == 2
    for other, match in (
        (score(bernoulli, 1 - binary), "same data, in the same order; got other data for 'b'"),
        (score(bernoulli, binary[:7]), "same data"),
        (score(bernoulli, binary.roll(1)), "same data"),
        (score(normal, binary), "'a' and a continuous one for 'b'.*can't be ranked"),
    ):
        with pytest.raises(ValueError, match=match):
            compare({"a": good, "b": other})
    with pytest.raises(ValueError, match=r"at least two models to compare; got \['a'\]"):
        compare({"a": good})
    with pytest.raises(ValueError, match="at least two"):
        compare({})
    mixed = {"a": exact(bernoulli, None, binary), "b": to_arviz(bernoulli, None, binary)}
    with pytest.raises(TypeError, match="one kind, all LogMarginal or all ArviZ's"):
        compare(mixed)


def test_devices(device):
    problem = linear_gaussian(3, 2).to(device)
    x = problem.sample(5)
    idata = to_arviz(problem.model, problem.guide, x, num_samples=4)
    expected = problem.log_prob(x).cpu().expand(4, -1)
    assert torch.allclose(draws(idata, "log_likelihood", "marginal"), expected)
