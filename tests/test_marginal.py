"""log p(x): exact values against scikit-learn, estimates against closed forms, with error bars."""

import dataclasses
import itertools
import math
import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS
from pyro.infer.autoguide import AutoDelta
from sklearn.mixture import GaussianMixture as SklearnMixture

from pyro_lvm.datasets import linear_gaussian
from pyro_lvm.marginal import exact, importance_sampling, widened
from pyro_lvm.marginal.sampling import samples_at_once
from pyro_lvm.marginal.weights import StreamingWeights
from pyro_lvm.models import GaussianMixture
from pyro_lvm.pair import inspect_pair
from pyro_lvm.terms import compute_terms

pytestmark = pytest.mark.usefixtures("float64")


def off_posterior(problem, shift=0.3, widen=1.3):
    """The exact posterior, moved and widened: a guide that is good but not exact."""

    def guide(x):
        loc, scale_tril = problem.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample(
                "z",
                dist.MultivariateNormal(
                    loc + shift * scale_tril.sum(-1), scale_tril=widen * scale_tril
                ),
            )

    return guide


def off_posterior_normal(problem, narrow):
    """A normal guide with the posterior's mean, too narrow by a factor."""

    def guide(x):
        loc, scale_tril = problem.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, narrow * scale_tril.diagonal()).to_event(1))

    return guide


@pytest.mark.parametrize("num_latents", [1, 3])
def test_importance_sampling_is_within_its_errors_of_the_closed_form(num_latents):
    problem = linear_gaussian(6, num_latents)
    x = problem.sample(50)
    score = importance_sampling(problem.model, off_posterior(problem), x, num_samples=4000)
    z_scores = (score.log_prob - problem.log_prob(x)) / score.std_error
    assert z_scores.abs().max() < 5
    assert z_scores.square().mean() < 2.5  # the errors are not too short on average
    assert z_scores.square().mean() > 0.3  # nor too long
    assert score.num_unreliable == 0
    assert score.ess.min() > 100


def test_exact_posterior_is_exact_with_one_sample():
    problem = linear_gaussian(6, 3)
    x = problem.sample(20)
    score = importance_sampling(problem.model, problem.guide, x, num_samples=1)
    assert torch.allclose(score.log_prob, problem.log_prob(x), rtol=0, atol=1e-10)
    many = importance_sampling(problem.model, problem.guide, x, num_samples=200)
    assert torch.allclose(many.log_prob, problem.log_prob(x), rtol=0, atol=1e-10)
    assert (many.std_error < 1e-6).all()
    assert (many.pareto_k == -math.inf).all()


def test_error_falls_with_the_root_of_the_number_of_samples():
    problem = linear_gaussian(6, 2)
    x = problem.sample(200)
    errors = []
    for num_samples in (100, 400, 1600):
        guide = off_posterior(problem)
        score = importance_sampling(problem.model, guide, x, num_samples=num_samples)
        deviation = score.log_prob - problem.log_prob(x)
        errors.append(float(deviation.square().mean().sqrt()))
        assert errors[-1] == pytest.approx(float(score.std_error.square().mean().sqrt()), rel=0.2)
    for large, small in itertools.pairwise(errors):
        # each is a root mean square over 200 data, known to about 5 %
        assert large / small == pytest.approx(2.0, rel=0.25)


@pytest.mark.parametrize("name", ["normal_normal", "modules", "score_function", "topics"])
def test_any_pair(name):
    problem = PROBLEMS[name]()
    score = importance_sampling(problem.model, problem.guide, *problem.args, num_samples=3000)
    error = score.std_error + 1e-12
    assert ((score.log_prob - problem.log_prob).abs() < 5 * error).all()


def test_chunks_do_not_change_the_estimate():
    """The same weights in other chunks give the same statistics, one particle at a time too."""
    log_weight = torch.randn(500, 4) * 1.5
    summaries = []
    for chunk in (500, 64, 1):
        weights = StreamingWeights(500)
        for part in log_weight.split(chunk):
            weights.add(part)
        summaries.append(weights)
    first = summaries[0]
    for other in summaries[1:]:
        assert torch.allclose(first.log_sum, other.log_sum)
        assert torch.allclose(first.log_sum_squares, other.log_sum_squares)
        assert torch.equal(first.largest, other.largest)
    assert torch.allclose(first.log_sum, log_weight.logsumexp(0))
    problem = PROBLEMS["normal_normal"]()
    score = importance_sampling(
        problem.model, problem.guide, *problem.args, num_samples=300, chunk_size=1
    )
    assert ((score.log_prob - problem.log_prob).abs() < 5 * score.std_error).all()


def test_standard_error_and_ess_are_the_textbooks():
    log_weight = torch.randn(50, 3)
    weights = StreamingWeights(50)
    weights.add(log_weight)
    problem = PROBLEMS["normal_normal"]()
    score = importance_sampling(problem.model, problem.guide, *problem.args, num_samples=1)
    summary = weights.summary("test", score.observations)
    w = log_weight.exp()
    assert torch.allclose(summary.log_prob, w.mean(0).log())
    assert torch.allclose(summary.std_error, w.std(0) / w.mean(0) / math.sqrt(50))
    assert torch.allclose(summary.ess, w.sum(0) ** 2 / w.square().sum(0))


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_pareto_k_is_arvizs(scale):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "psislw"):
        pytest.skip("ArviZ 1 has no psislw on arrays")
    log_weight = torch.randn(2000, 5) * scale
    weights = StreamingWeights(2000)
    for part in log_weight.split(300):
        weights.add(part)
    _, expected = arviz.psislw(log_weight.T.numpy(), reff=1.0)
    assert torch.allclose(weights._pareto_k(), torch.as_tensor(expected), atol=0.02)


def test_generalised_pareto_tail_has_its_shape():
    """Weights that are exactly Pareto with k = 0.5: P(w > t) = t^(-2)."""
    log_weight = -0.5 * torch.rand(40_000, 3).log()
    weights = StreamingWeights(40_000)
    weights.add(log_weight)
    assert ((weights._pareto_k() - 0.5).abs() < 0.2).all()


@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_exact_mixture_equals_scikit_learn(covariance):
    x = torch.cat([torch.randn(60, 3) + 2, torch.randn(60, 3) * 0.5])
    mixture = GaussianMixture(3, 3, covariance).initialize(x)
    reference = SklearnMixture(3, covariance_type="full")
    reference.weights_ = mixture.weights.detach().numpy()
    reference.means_ = mixture.loc.detach().numpy()
    reference.covariances_ = mixture.covariances().detach().numpy()
    precisions = torch.linalg.inv(mixture.covariances()).detach()
    reference.precisions_cholesky_ = torch.linalg.cholesky(precisions).numpy()
    score = exact(mixture.model, mixture.guide, x)
    expected = torch.as_tensor(reference.score_samples(x.numpy()))
    assert (score.log_prob - expected).abs().max() < 1e-8
    assert (score.std_error == 0).all()
    shares = torch.as_tensor(reference.predict_proba(x.numpy()))
    assert (mixture.responsibilities(x) - shares).abs().max() < 1e-8
    assert (mixture.log_prob(x) - expected).abs().max() < 1e-8


@pytest.mark.parametrize("name", ["mixture", "guide_chain"])
def test_exact_equals_the_sum(name):
    problem = PROBLEMS[name]()
    score = exact(problem.model, problem.guide, *problem.args)
    assert torch.allclose(score.log_prob, problem.log_prob, rtol=0, atol=1e-12)


def bayesian_mean(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def test_global_latents_are_averaged_over():
    """log E_q(g) p(x_i | g) for a normal guide: x_i ~ N(loc, 1 + scale^2)."""
    x = torch.randn(NUM_DATA)

    def guide(x):
        pyro.sample("mean", dist.Normal(0.5, 0.7))

    score = importance_sampling(bayesian_mean, guide, x, num_samples=5000)
    expected = dist.Normal(0.5, math.sqrt(1 + 0.49)).log_prob(x)
    assert ((score.log_prob - expected).abs() < 5 * score.std_error).all()


def test_point_estimates_of_global_latents_are_conditioned_on():
    x = torch.randn(NUM_DATA)
    guide = AutoDelta(bayesian_mean, init_loc_fn=lambda site: torch.tensor(0.4))
    score = exact(bayesian_mean, guide, x)
    assert torch.allclose(score.log_prob, dist.Normal(0.4, 1.0).log_prob(x))


def test_printing_says_what_is_known():
    problem = linear_gaussian(6, 2)
    x = problem.sample(30)
    good = importance_sampling(problem.model, off_posterior(problem), x, num_samples=2000)
    assert f"{good.mean:.3f} +- {good.mean_std_error:.3f} nats per datum over 30 data" in str(good)
    assert "warning" not in str(good)

    def bad_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 0.05).to_event(1))

    bad = importance_sampling(problem.model, bad_guide, x, num_samples=2000)
    assert bad.num_unreliable > 15
    assert "warning: Pareto k above 0.7" in str(bad)
    assert "marginal.widened" in str(bad)


@pytest.mark.parametrize("settings", [{"num_samples": 4000}, {"num_samples": 500, "chunk_size": 1}])
def test_widened_guide_reaches_the_tails(settings):
    problem = linear_gaussian(6, 2)
    x = problem.sample(20)
    narrow = off_posterior_normal(problem, 0.4)
    before = importance_sampling(problem.model, narrow, x, **settings)
    after = importance_sampling(problem.model, widened(narrow, (1.0, 2.0, 4.0)), x, **settings)
    assert ((after.log_prob - problem.log_prob(x)).abs() < 5 * after.std_error).all()
    assert before.num_unreliable > 2 * after.num_unreliable + 5


def test_widened_guide_has_the_density_of_the_mixture():
    """For an event of rank one, against the formula."""
    problem = linear_gaussian(6, 2)
    x = problem.sample(3)
    guide = widened(off_posterior_normal(problem, 0.5), (1.0, 3.0))
    terms = compute_terms(problem.model, guide, x, num_particles=5)
    loc, scale_tril = problem.posterior(x)
    scale = 0.5 * scale_tril.diagonal()
    parts = [dist.Normal(loc, s * scale).log_prob(terms.samples["z"]).sum(-1) for s in (1.0, 3.0)]
    expected = torch.logsumexp(torch.stack(parts), 0) - math.log(2)
    assert torch.allclose(terms.log_guide["z"], expected)


def test_error_of_the_mean_contains_the_data():
    problem = linear_gaussian(6, 2)
    x = problem.sample(400)
    score = importance_sampling(problem.model, off_posterior(problem), x, num_samples=500)
    spread = problem.log_prob(x).std() / math.sqrt(400)
    assert score.mean_std_error == pytest.approx(float(spread), rel=0.05)
    assert score.sampling_std_error < 0.3 * score.mean_std_error
    expected = score.std_error.square().sum().sqrt() / 400
    assert score.sampling_std_error == pytest.approx(float(expected))


def delta_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(torch.zeros(len(x))))


@pytest.mark.parametrize(
    ("function", "name", "guide", "settings", "match"),
    [
        (exact, "normal_normal", None, {}, r"got samples at \['z'\].*importance_sampling"),
        (exact, "semi_supervised", None, {}, r"\['z'\]"),
        (exact, "normal_normal", None, {"plate": "rows"}, "plate named 'rows'"),
        (importance_sampling, "normal_normal", delta_guide, {}, "point mass at"),
        (
            importance_sampling,
            "score_function",
            widened(PROBLEMS["score_function"]().guide),
            {},
            "normal latents to widen; got Bernoulli at site 'y'",
        ),
        (importance_sampling, "normal_normal", None, {"num_samples": 0}, "num_samples.*positive"),
        (importance_sampling, "normal_normal", None, {"chunk_size": 0}, "chunk_size.*positive"),
    ],
)
def test_what_is_refused(function, name, guide, settings, match):
    problem = PROBLEMS[name]()
    with pytest.raises(ValueError, match=match):
        function(problem.model, guide or problem.guide, *problem.args, **settings)


def test_observations_are_known_in_any_order_of_the_sites():
    x, y = torch.randn(5, 3), torch.randn(5)

    def story(*names):
        def model():
            with pyro.plate("data", 5):
                for name in names:
                    value = {"x": x, "y": y}[name]
                    event_dim = value.dim() - 1
                    fn = dist.Normal(torch.zeros(value.shape[1:]), 1.0).to_event(event_dim)
                    pyro.sample(name, fn, obs=value)

        return exact(model, None).observations

    assert story("x", "y").same_data(story("y", "x"))
    assert not story("x", "y").same_data(story("x"))
    assert not story("x").same_data(story("y"))


def test_all_chunks_see_the_minibatch_that_was_drawn_first():
    """x_i = 10 i, known by its density: mixed up data would be far from every closed form."""
    x = 10 * torch.arange(30.0)
    plates = []

    def plate():
        return pyro.plate("data", 30, subsample_size=4)

    def model():
        with plate() as index:
            plates.append(index)
            z = pyro.sample("z", dist.Normal(x[index], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0 + 0.1 * index), obs=x[index])

    def guide():
        with plate() as index:
            pyro.sample("z", dist.Normal(x[index], 1.0))

    score = importance_sampling(model, guide, num_samples=900, chunk_size=30)
    index = plates[-1]
    exact_value = dist.Normal(0.0, (1 + (1 + 0.1 * index) ** 2).sqrt()).log_prob(torch.zeros(4))
    assert all(torch.equal(index, other) for other in plates[-20:])
    assert ((score.log_prob - exact_value).abs() < 5 * score.std_error).all()


def test_exact_refuses_random_global_latents():
    def guide(x):
        pyro.sample("mean", dist.Normal(0.5, 0.7))

    with pytest.raises(ValueError, match=r"got samples at \['mean'\]"):
        exact(bayesian_mean, guide, torch.randn(NUM_DATA))


@pytest.mark.parametrize("num_latents", [2, 10, 50])
def test_every_size_of_linear_gaussian(num_latents):
    """Guides that are off by as much in all directions together, whatever the number of these."""
    problem = linear_gaussian(2 * num_latents, num_latents)
    x = problem.sample(30)
    guide = off_posterior(problem, shift=0.3 / num_latents**0.5, widen=1 + 0.3 / num_latents**0.5)
    score = importance_sampling(problem.model, guide, x, num_samples=4000)
    z_scores = (score.log_prob - problem.log_prob(x)) / score.std_error
    assert z_scores.abs().max() < 5
    assert 0.3 < z_scores.square().mean() < 2.5
    assert score.num_unreliable == 0


@pytest.mark.parametrize(("shift", "widen"), [(0.3, 1.3), (0.5, 1.1), (0.0, 2.0)])
def test_intervals_cover_the_closed_form(shift, widen):
    """200 runs: copies of a datum have draws of their own, so that one run of them is as many."""
    problem = linear_gaussian(6, 2)
    x = problem.sample(5).repeat_interleave(200, 0)
    score = importance_sampling(
        problem.model, off_posterior(problem, shift, widen), x, num_samples=1000
    )
    trusted = (score.pareto_k < 0.5).reshape(5, 200)
    covered = (score.log_prob - problem.log_prob(x)).abs() < 1.96 * score.std_error
    covered = (covered.reshape(5, 200) & trusted).sum(1) / trusted.sum(1)
    assert trusted.sum(1).min() > 150
    assert covered.min() >= 0.90
    assert covered.max() <= 0.99


@pytest.mark.parametrize("name", ["normal_normal", "modules"])
def test_minibatches_of_data(name):
    problem = PROBLEMS[name]()
    score = importance_sampling(
        problem.model, problem.guide, *problem.args, num_samples=3000, batch_size=4
    )
    assert score.log_prob.shape == (NUM_DATA,)
    assert ((score.log_prob - problem.log_prob).abs() < 5 * score.std_error + 1e-12).all()
    whole = importance_sampling(problem.model, problem.guide, *problem.args, num_samples=2)
    assert score.observations.same_data(whole.observations)


def test_minibatches_take_all_arguments_apart():
    """x given y, in rows; what has no row for each datum stays whole."""

    def model(x, y, *, scale, noise):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, scale))
            pyro.sample("x", dist.Normal(z, noise[0] + noise[1]), obs=x)

    def guide(x, y, *, scale, noise):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + y) / 2, 1.5 * scale))

    x, y, scale, noise = torch.randn(5), torch.randn(5), 1 + torch.rand(5), torch.ones(2) / 2
    score = importance_sampling(
        model, guide, x, y, scale=scale, noise=noise, num_samples=4000, batch_size=2
    )
    expected = dist.Normal(y, (scale**2 + 1).sqrt()).log_prob(x)
    assert ((score.log_prob - expected).abs() < 5 * score.std_error).all()


def test_what_can_not_be_taken_apart_is_refused():
    problem = PROBLEMS["global_and_local"]()
    with pytest.raises(ValueError, match="subsamples plate 'data'"):
        importance_sampling(problem.model, problem.guide, batch_size=2)
    x = torch.randn(NUM_DATA)

    def model(x):
        with pyro.plate("data", NUM_DATA):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([NUM_DATA]), obs=x.mean())

    with pytest.raises(ValueError, match=r"got 6 data for 2 rows.*len\(x\)"):
        importance_sampling(model, None, x, batch_size=2)
    with pytest.raises(ValueError, match="argument with 6 rows"):
        importance_sampling(lambda: model(x), None, batch_size=2)


@pytest.mark.parametrize(
    ("num_data", "features", "expected"),
    [(1000, 784, 4), (10, 784, 401), (100, 2, 327), (10**6, 784, 1)],
)
def test_chunks_have_as_many_numbers_whatever_the_data(num_data, features, expected):
    structure = dataclasses.replace(
        inspect_pair(PROBLEMS["mixture"]().model, None, PROBLEMS["mixture"]().args),
        num_data=num_data,
        values_per_datum=features,
    )
    assert samples_at_once(structure, (torch.zeros(1),), {}) == expected


def test_structure_knows_how_many_values_a_datum_has():
    problem = PROBLEMS["nested_masked"]()
    assert inspect_pair(problem.model, problem.guide, problem.args).values_per_datum == 4
    problem = PROBLEMS["modules"]()
    assert inspect_pair(problem.model, problem.guide, problem.args).values_per_datum == 6


MEASURE_MEMORY = """
import resource, sys, torch, pyro_lvm as lvm
torch.manual_seed(0)
torch.set_num_threads(1)
encoder = lvm.nn.MLP(784, [200, 200], head=lvm.nn.NormalHead(50))
decoder = lvm.nn.MLP(50, [200, 200], head=lvm.nn.BernoulliHead(784))
vae = lvm.VAE(encoder, decoder)
x = (torch.rand(100, 784) < 0.1).float()
lvm.marginal.importance_sampling(vae.model, vae.guide, x, num_samples=int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples():
    """Peak memory of a process that has nothing else to do, 100 samples against 50,000."""

    def peak(num_samples):
        command = [sys.executable, "-c", MEASURE_MEMORY, str(num_samples)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak(50_000) == pytest.approx(peak(100), rel=0.1)
