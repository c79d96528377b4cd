"""The seam: terms of every kind of pair against Pyro's objectives and closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS, score_function
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from pyro_lvm.pair import inspect_pair
from pyro_lvm.terms import compute_terms

pytestmark = pytest.mark.usefixtures("float64")
WITH_CLOSED_FORM = [
    "normal_normal",
    "modules",
    "auxiliary",
    "score_function",
    "mixture",
    "topics",
    "mixture_prior",
    "semi_supervised",
    "guide_chain",
    "independent_guide",
    "two_under_a_sum",
    "masked_mixture",
]


def elbo_of(terms):
    """The ELBO of all data that the terms add up to, averaged over particles."""
    local = terms.log_likelihood + sum(terms.log_prior.values()) - sum(terms.log_guide.values())
    total = terms.plate_scale * local.sum(1) + terms.global_log_prior - terms.global_log_guide
    return total.mean()


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("name", PROBLEMS)
def test_terms_add_up_to_pyros_elbo(name, num_particles):
    problem = PROBLEMS[name]()
    nesting = inspect_pair(problem.model, problem.guide, problem.args).max_plate_nesting
    host = (TraceEnum_ELBO if problem.enumerated else Trace_ELBO)(
        num_particles=num_particles,
        vectorize_particles=num_particles > 1,
        max_plate_nesting=nesting,
    )
    pyro.set_rng_seed(1)
    loss = host.loss(problem.model, problem.guide, *problem.args)
    pyro.set_rng_seed(1)
    terms = compute_terms(
        problem.model,
        problem.guide,
        *problem.args,
        num_particles=num_particles,
        max_plate_nesting=nesting,
    )
    if name == "mixture_prior":  # Pyro's bound for it is this one too: y is summed out inside
        assert set(terms.log_prior) == {"z"}
    assert elbo_of(terms).item() == pytest.approx(-loss, rel=1e-12)


@pytest.mark.parametrize("name", WITH_CLOSED_FORM)
def test_weights_average_to_the_marginal(name):
    problem, num_samples = PROBLEMS[name](), 40_000
    with torch.no_grad():
        terms = compute_terms(
            problem.model, problem.guide, *problem.args, num_particles=num_samples
        )
    assert terms.log_weight.shape == (num_samples, NUM_DATA)
    ratio = (terms.log_weight - problem.log_prob).exp()  # its mean is one
    error = ratio.std(0) / math.sqrt(num_samples)
    assert ((ratio.mean(0) - 1).abs() <= 5 * error + 1e-9).all()


@pytest.mark.parametrize("name", ["mixture", "guide_chain", "masked_mixture"])
def test_sums_alone_give_the_exact_marginal(name):
    problem = PROBLEMS[name]()
    terms = compute_terms(problem.model, problem.guide, *problem.args)
    assert torch.allclose(terms.log_weight[0], problem.log_prob, rtol=0, atol=1e-12)


def test_prior_of_a_latent_under_a_sum_is_its_marginal_prior():
    problem = PROBLEMS["mixture_prior"]()
    terms = compute_terms(problem.model, problem.guide, *problem.args, num_particles=2)
    z = terms.samples["z"]
    parts = dist.Normal(torch.tensor([-2.0, 1.0]), 1.0).log_prob(z[..., None])
    prior = (parts + torch.tensor([0.25, 0.75]).log()).logsumexp(-1)
    assert torch.allclose(terms.log_prior["z"], prior, rtol=0, atol=1e-12)
    likelihood = dist.Normal(z, 0.5).log_prob(problem.args[0])
    assert torch.allclose(terms.log_likelihood, likelihood, rtol=0, atol=1e-12)


def test_priors_of_two_latents_under_one_sum_follow_the_chain_rule():
    problem = PROBLEMS["two_under_a_sum"]()
    terms = compute_terms(problem.model, problem.guide, *problem.args, num_particles=2)
    a, b = terms.samples["a"][..., None], terms.samples["b"][..., None]
    centre, log_weights = torch.tensor([-1.0, 0.5]), torch.tensor([0.25, 0.75]).log()
    log_a = dist.Normal(centre, 1.0).log_prob(a) + log_weights
    both = log_a + dist.Normal(2 * centre, 1.0).log_prob(b)
    assert torch.allclose(terms.log_prior["a"], log_a.logsumexp(-1))
    assert torch.allclose(terms.log_prior["b"], both.logsumexp(-1) - log_a.logsumexp(-1))


def test_expectation_over_guide_sums():
    problem = PROBLEMS["semi_supervised"]()
    terms = compute_terms(problem.model, problem.guide, *problem.args)
    x = problem.args[0]
    q = torch.softmax(torch.stack([-0.8 * x, 0.8 * x], -1), -1)
    prior = (q * torch.tensor([0.25, 0.75]).log()).sum(-1)
    assert torch.allclose(terms.log_prior["y"][0], prior, atol=1e-12)
    assert torch.allclose(terms.log_guide["y"][0], (q * q.log()).sum(-1), atol=1e-12)


def test_shapes_and_scale_of_a_subsampled_plate():
    problem = PROBLEMS["global_and_local"]()
    terms = compute_terms(problem.model, problem.guide, num_particles=4)
    assert terms.plate_scale == 5.0
    assert terms.size == 30
    assert terms.log_likelihood.shape == terms.samples["z"].shape == (4, NUM_DATA)
    assert terms.global_samples["mean"].shape == terms.global_log_prior.shape == (4,)
    prior = dist.Normal(0.0, 3.0).log_prob(terms.global_samples["mean"])
    assert torch.allclose(terms.global_log_prior, prior)
    local = dist.Normal(terms.global_samples["mean"][:, None], 1.0).log_prob(terms.samples["z"])
    assert torch.allclose(terms.log_prior["z"], local)  # no plate scale in it


def test_nested_plate_mask_and_user_scale():
    problem = PROBLEMS["nested_masked"]()
    terms = compute_terms(problem.model, problem.guide, *problem.args, num_particles=3)
    z, w, x = terms.samples["z"], terms.samples["w"], problem.args[0]
    assert z.shape == (3, NUM_DATA, 2)
    assert w.shape == (3, NUM_DATA, 4)
    log_x = dist.Normal(w + z[..., 1:], 1.0).log_prob(x.T)
    log_x[:, ::2, 3] = 0.0  # masked
    assert torch.allclose(terms.log_likelihood, 0.5 * log_x.sum(-1))
    assert torch.allclose(terms.log_prior["w"], dist.Normal(z[..., :1], 1.0).log_prob(w).sum(-1))


def test_subsampled_plate_inside_the_data_plate_keeps_its_scale_in_the_term():
    x = torch.randn(8, 5)

    def model():
        with pyro.plate("data", 5, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("words", 8, subsample_size=2, dim=-2) as index:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

    def guide():
        with pyro.plate("data", 5, dim=-1):
            pyro.sample("z", dist.Delta(torch.zeros(5)))

    draws = torch.stack([compute_terms(model, guide).log_likelihood[0] for _ in range(400)])
    full = dist.Normal(0.0, 1.0).log_prob(x).sum(0)
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - full).abs() < 5 * error).all()


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("name", ["normal_normal", "mixture", "semi_supervised", "mixture_prior"])
def test_single_datum_and_particle_keep_their_dimensions(name, num_particles):
    problem = PROBLEMS[name]()
    one = tuple(a[:1] for a in problem.args)
    terms = compute_terms(problem.model, problem.guide, *one, num_particles=num_particles)
    assert terms.log_weight.shape == (num_particles, 1)
    assert all(t.shape == (num_particles, 1) for t in terms.log_prior.values())


def test_gradients_flow_through_the_terms():
    problem = PROBLEMS["normal_normal"]()
    compute_terms(problem.model, problem.guide, *problem.args)
    slope = pyro.param("slope").unconstrained()
    terms = compute_terms(problem.model, problem.guide, *problem.args)
    (gradient,) = torch.autograd.grad(terms.log_weight.sum(), slope)
    assert gradient.abs() > 0


def test_user_scale_around_a_sum_stays_outside_it():
    problem = PROBLEMS["mixture"]()
    scaled = poutine.scale(problem.model, scale=0.5)
    terms = compute_terms(scaled, problem.guide, *problem.args)
    assert torch.allclose(terms.log_weight[0], 0.5 * problem.log_prob, atol=1e-12)


def plain(x):
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1), obs=x)


def sequential(x):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"x{i}", dist.Normal(0.0, 1.0), obs=x[i])


def global_sum(x):
    y = pyro.sample("y", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(y, 1.0), obs=x)


def other_plate(x):
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def scaled_prior_of_a_sum(x):
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=0.5):
            y = pyro.sample("y", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(y, 1.0), obs=x)


def renamed_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(0.5))
        pyro.sample("why", dist.Bernoulli(0.5))


def sequential_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})


@pytest.mark.parametrize(
    ("model", "guide", "match"),
    [
        (plain, None, "plate named 'data'.*no plates at all.*Wrap the data"),
        (other_plate, None, r"plates named \['rows'\]"),
        (sequential, None, "vectorised"),
        (global_sum, None, "got 'y' outside"),
        (scaled_prior_of_a_sum, None, r"one poutine.scale.*\[0.5, 1.0\]"),
        (score_function().model, None, "got none at site 'y'.*Add pyro.sample"),
        (score_function().model, renamed_guide, "got 'why'.*is_auxiliary"),
        (score_function().model, sequential_guide, "sequential one, 'y'"),
    ],
)
def test_what_is_refused(model, guide, match):
    with pytest.raises(ValueError, match=match):
        compute_terms(model, guide, torch.randn(4))
