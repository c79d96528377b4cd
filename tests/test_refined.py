"""Refined guides: exact posteriors reached, closed-form gaps, and no trace in the pair."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS
from pyro import poutine
from pyro.distributions.transforms import AffineTransform
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import kl_divergence

import pyro_lvm as lvm
from pyro_lvm.datasets import linear_gaussian
from pyro_lvm.diagnostics import inference_gaps
from pyro_lvm.marginal import exact, importance_sampling, refined
from pyro_lvm.pair import hold_subsamples, inspect_pair
from pyro_lvm.terms import compute_terms, terms_at

pytestmark = pytest.mark.usefixtures("float64")


def fitted(guide, *args, site="z"):
    """The distribution that a guide has at a site."""
    return poutine.trace(guide).get_trace(*args).nodes[site]["fn"]


def elbo(model, guide, *args, num_particles=2000):
    terms = compute_terms(model, guide, *args, num_particles=num_particles)
    return (terms.log_likelihood - sum(terms.kl.values())).mean(0)


def wrong_full(problem, shift=0.5):
    """A full-covariance guide that is off in location, width and correlation."""
    size = problem.W.shape[1]

    def guide(x):
        loc, tril = problem.posterior(x)
        with pyro.plate("data", len(x)):
            tril = 0.4 * tril + 0.2 * torch.eye(size, dtype=tril.dtype, device=tril.device)
            pyro.sample("z", dist.MultivariateNormal(0.8 * loc + shift, scale_tril=tril))

    return guide


def wrong_normal(problem, scale=0.7, shift=0.5):
    def guide(x):
        loc, _ = problem.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * loc + shift, scale).to_event(1))

    return guide


def posterior_of(problem, x):
    loc, tril = problem.posterior(x)
    return dist.MultivariateNormal(loc, scale_tril=tril)


def mean_field_gap(problem):
    """KL of the best normal with independent dimensions: its precisions are the posterior's.

    KL = (log det C + sum_d log (C^-1)_dd) / 2.
    """
    tril = problem.posterior(problem.loc.unsqueeze(0))[1]
    precision = torch.cholesky_inverse(tril)
    return tril.diagonal().log().sum() + precision.diagonal().log().sum() / 2


def test_full_covariance_reaches_the_posterior(device):
    problem = linear_gaussian(6, 2).to(device)
    x = problem.sample(30)
    guide = refined(problem.model, wrong_full(problem), x, num_steps=1000)
    gap = kl_divergence(fitted(guide, x), posterior_of(problem, x))
    start = kl_divergence(fitted(wrong_full(problem), x), posterior_of(problem, x))
    assert start.min() > 1.0
    assert gap.max() < 0.02
    assert gap.mean() < 0.005


@pytest.mark.parametrize("scale", [0.002, 0.7])
def test_mean_field_reaches_the_best_of_its_family(scale):
    """From a guide that is much too narrow as well."""
    problem = linear_gaussian(3, 2, seed=7)
    x = problem.sample(30)
    guide = refined(problem.model, wrong_normal(problem, scale), x, num_steps=1000)
    q = fitted(guide, x)
    assert isinstance(q.base_dist, dist.Normal)
    as_full = dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
    gap = kl_divergence(as_full, posterior_of(problem, x)) - mean_field_gap(problem)
    assert gap.min() > -1e-9  # no normal of this kind is better
    assert gap.max() < 0.02
    assert gap.mean() < 0.005


def test_more_steps_come_closer():
    problem = linear_gaussian(6, 2)
    x = problem.sample(40)
    gaps = []
    for num_steps in (50, 200, 800):
        guide = refined(problem.model, wrong_full(problem), x, num_steps=num_steps)
        gaps.append(float(kl_divergence(fitted(guide, x), posterior_of(problem, x)).mean()))
    assert gaps[0] > 4 * gaps[1] > 8 * gaps[2]


PRECISION = 5 * torch.eye(3, dtype=torch.float64) - 0.25  # (1 + 11')^-1 + 4

# each: prior, likelihood given z, observations, guide, posterior
CONJUGATE = {
    "Gamma": (
        lambda: dist.Gamma(2.0, 1.0),
        lambda z: dist.Poisson(z),
        lambda: torch.tensor([0.0, 1.0, 4.0, 9.0]),
        lambda x: dist.Gamma(x + 1.0, 1.0),
        lambda x: dist.Gamma(x + 2.0, torch.full_like(x, 2.0)),
    ),
    "Beta": (
        lambda: dist.Beta(1.5, 2.0),
        lambda z: dist.Binomial(10, probs=z),
        lambda: torch.tensor([0.0, 3.0, 5.0, 10.0]),
        lambda x: dist.Beta(torch.ones_like(x) * 2, torch.ones_like(x)),
        lambda x: dist.Beta(1.5 + x, 12.0 - x),
    ),
    "Dirichlet": (
        lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
        lambda z: dist.Multinomial(6, probs=z),
        lambda: torch.tensor([[6.0, 0.0, 0.0], [2.0, 2.0, 2.0], [0.0, 1.0, 5.0]]),
        lambda x: dist.Dirichlet(0.5 * x + 1.0),
        lambda x: dist.Dirichlet(x + torch.tensor([1.0, 2.0, 3.0])),
    ),
    "LogNormal": (
        lambda: dist.LogNormal(0.0, 1.0),
        lambda z: dist.Normal(z.log(), 0.5),
        lambda: torch.tensor([-2.0, 0.0, 1.0]),
        lambda x: dist.LogNormal(torch.zeros_like(x), 1.0),
        lambda x: dist.LogNormal(0.8 * x, math.sqrt(0.2)),
    ),
    "LowRankMultivariateNormal": (  # of rank one, as the posterior's covariance is too
        lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1),
        lambda z: dist.Normal(z, 0.5).to_event(1),
        lambda: torch.tensor([[-2.0, 0.0, 1.0], [0.5, 0.5, 3.0]]),
        lambda x: dist.LowRankMultivariateNormal(
            0.5 * x, 0.3 * torch.ones(len(x), 3, 1), torch.ones(3)
        ),
        lambda x: dist.MultivariateNormal(
            4 * x @ torch.linalg.inv(PRECISION), precision_matrix=PRECISION
        ),
    ),
    "expanded": (  # a distribution that has fewer batch dimensions than its site
        lambda: dist.Normal(0.0, 1.0),
        lambda z: dist.Normal(z, 0.5),
        lambda: torch.tensor([-2.0, 0.0, 1.0]),
        lambda x: dist.Normal(torch.zeros(1), 1.0).expand([3]),
        lambda x: dist.Normal(0.8 * x, math.sqrt(0.2)),
    ),
    "event of rank two": (
        lambda: dist.Gamma(2.0 * torch.ones(2, 3), 1.0).to_event(2),
        lambda z: dist.Poisson(z).to_event(2),
        lambda: torch.arange(12.0).reshape(2, 2, 3),
        lambda x: dist.Gamma(x + 1.0, 1.0).to_event(2),
        lambda x: dist.Gamma(x + 2.0, torch.full_like(x, 2.0)).to_event(2),
    ),
}


@pytest.mark.parametrize("name", CONJUGATE)
def test_families_reach_conjugate_posteriors(name):
    prior, likelihood, data, start, posterior = CONJUGATE[name]
    x = data()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", start(x))

    q = fitted(refined(model, guide, x, num_steps=600, num_particles=8), x)
    assert type(q) is type(fitted(guide, x))
    gap, before = (kl_divergence(f, posterior(x)) for f in (q, fitted(guide, x)))
    assert gap.max() < 0.02
    assert gap.sum() < 0.1 * before.sum()


def chain(x):
    """z1 ~ N(0, 1), z2 ~ N(z1, 1), x ~ N(z2, 1): x ~ N(0, 3)."""
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
        pyro.sample("x", dist.Normal(z2, 1.0), obs=x)


def chain_guide(x):
    """z2 | x ~ N(2 x / 3, 2/3) and z1 | z2 ~ N(z2 / 2, 1/2), but for constants and widths."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(0.5 * x + 0.3, 0.5))
        pyro.sample("z1", dist.Normal(0.5 * z2 - 0.7, 0.3))


def test_hierarchies_reach_the_posterior():
    """The guide's order is not the model's, so that closed forms of the KL would be wrong."""
    x = 2 * torch.randn(20)
    guide = refined(chain, chain_guide, x, num_steps=800, num_particles=8)
    exact_value = dist.Normal(0.0, math.sqrt(3.0)).log_prob(x)
    assert (exact_value - elbo(chain, chain_guide, x)).min() > 0.3
    assert (exact_value - elbo(chain, guide, x)).abs().max() < 0.05
    trace = poutine.trace(guide).get_trace(x)
    z1, z2 = trace.nodes["z1"], trace.nodes["z2"]
    assert (z1["fn"].loc - 0.5 * z2["value"]).abs().max() < 0.1  # added to what it computes
    assert (z2["fn"].scale - math.sqrt(2 / 3)).abs().max() < 0.1


def test_enumerated_sites_are_refined():
    """Weights and widths of the exact posterior: ELBO = log p(x), y summed in the guide."""
    problem = PROBLEMS["semi_supervised"]()
    guide = refined(problem.model, problem.guide, *problem.args, num_steps=500)
    before, after = (elbo(problem.model, g, *problem.args) for g in (problem.guide, guide))
    assert (problem.log_prob - before).max() > 0.4
    assert (problem.log_prob - after).abs().max() < 0.01


def test_what_the_guide_enumerates_alone():
    """Categorical sites only: the logits of the exact posterior, by exact gradients."""
    weights, loc = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([-1.0, 0.0, 2.0])
    x = torch.randn(7)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(loc[y], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            probs = torch.ones(3) / 3
            pyro.sample("y", dist.Categorical(probs), infer={"enumerate": "parallel"})

    better = refined(model, guide, x, num_steps=500)
    expected = (weights.log() + dist.Normal(loc, 1.0).log_prob(x[:, None])).log_softmax(-1)
    assert (fitted(better, x, site="y").probs - expected.exp()).abs().max() < 2e-3
    assert (elbo(model, better, x) - exact(model, better, x).log_prob).abs().max() < 1e-3


def test_a_nested_plate_has_offsets_of_its_own():
    """Words in documents: w_ij ~ N(0, 1), x_ij ~ N(w_ij, 1), a posterior for each of them."""
    x = 2 * torch.randn(3, 5)

    def model(x):
        with pyro.plate("data", 5, dim=-1), pyro.plate("words", 3, dim=-2):
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 5, dim=-1), pyro.plate("words", 3, dim=-2):
            pyro.sample("w", dist.Normal(torch.zeros(2), 0.5).to_event(1))

    better = refined(model, guide, x, num_steps=800)
    q = fitted(better, x, site="w")
    # precision [[2, 1], [1, 2]]: means x / 3 each, best variances 1/2
    assert (q.mean - (x / 3).unsqueeze(-1)).abs().max() < 0.1
    assert (q.variance - 0.5).abs().max() < 0.1
    terms = compute_terms(model, better, x, num_particles=7)
    assert terms.samples["w"].shape == (7, 5, 3, 2)


def test_auxiliary_sites_are_refined_and_what_is_computed_follows():
    problem = PROBLEMS["auxiliary"]()
    guide = refined(problem.model, problem.guide, *problem.args, num_steps=800)
    gap = problem.log_prob - elbo(problem.model, guide, *problem.args, num_particles=20_000)
    assert gap.abs().max() < 0.02
    trace = poutine.trace(guide).get_trace(*problem.args)
    assert torch.equal(trace.nodes["z"]["value"], trace.nodes["a"]["value"] + 1.0)


def test_autoguides_are_refined():
    x = torch.randn(8)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model)
    guide(x)
    better = refined(model, guide, x, num_steps=500)
    assert (elbo(model, better, x) > elbo(model, guide, x)).all()
    score = importance_sampling(model, better, x, num_samples=2000)
    grid = torch.linspace(1e-3, 15, 20_000)
    density = dist.Gamma(2.0, 2.0).log_prob(grid) + dist.Normal(grid, 1.0).log_prob(x[:, None])
    expected = density.logsumexp(1) + math.log(grid[1] - grid[0])
    assert ((score.log_prob - expected).abs() < 5 * score.std_error + 1e-4).all()


def test_the_start_is_the_guide():
    """With no steps the densities are the guide's, for draws given and of its own."""
    problem = linear_gaussian(6, 2)
    x = problem.sample(10)
    for guide in (wrong_full(problem), wrong_normal(problem)):
        start = refined(problem.model, guide, x, num_steps=0)
        pyro.set_rng_seed(3)
        expected = compute_terms(problem.model, guide, x, num_particles=5)
        pyro.set_rng_seed(3)
        terms = compute_terms(problem.model, start, x, num_particles=5)
        assert torch.allclose(terms.samples["z"], expected.samples["z"])
        assert torch.allclose(terms.log_guide["z"], expected.log_guide["z"])
        given = {"z": torch.randn(4, 10, 2)}
        at_start, at_guide = (
            terms_at(problem.model, g, given, x, max_plate_nesting=1) for g in (start, guide)
        )
        assert torch.allclose(at_start.log_guide["z"], at_guide.log_guide["z"])


def test_density_at_given_values_is_the_refined_one():
    problem = linear_gaussian(6, 2)
    x = problem.sample(10)
    guide = refined(problem.model, wrong_full(problem), x, num_steps=20)
    values = torch.randn(4, 10, 2)
    terms = terms_at(problem.model, guide, {"z": values}, x, max_plate_nesting=1)
    assert torch.allclose(terms.log_guide["z"], fitted(guide, x).log_prob(values))
    far = fitted(wrong_full(problem), x).log_prob(values)
    assert (terms.log_guide["z"] - far).abs().mean() > 0.1


def test_importance_sampling_gains():
    problem = linear_gaussian(6, 3)
    x = problem.sample(40)
    guide = wrong_normal(problem)
    better = refined(problem.model, guide, x, num_steps=500)
    before, after = (
        importance_sampling(problem.model, g, x, num_samples=2000) for g in (guide, better)
    )
    assert ((after.log_prob - problem.log_prob(x)).abs() < 5 * after.std_error).all()
    assert after.ess.median() > 5 * before.ess.median()
    one_by_one = importance_sampling(problem.model, better, x, num_samples=50, chunk_size=1)
    assert one_by_one.log_prob.shape == (40,)


def test_refined_guide_goes_to_arviz():
    problem = linear_gaussian(4, 2)
    x = problem.sample(5)
    guide = refined(problem.model, wrong_full(problem), x, num_steps=300)
    idata = lvm.to_arviz(problem.model, guide, x, num_samples=400, num_weights=20)
    draws = torch.as_tensor(idata["posterior"]["z"].values)[0]
    loc, tril = problem.posterior(x)
    error = tril.norm(dim=-1) / math.sqrt(400)
    assert ((draws.mean(0) - loc).abs() < 6 * error + 0.05).all()


class Encoder(PyroModule):
    """Dropout and batch normalisation, a frozen parameter, and one of Pyro's."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.net[0].bias.requires_grad_(False)
        self.head = nn.Linear(4, 2)
        self.scale = PyroParam(torch.ones(2), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.head(self.net(x)), self.scale).to_event(1))


def test_no_trace_of_it_remains_in_the_pair():
    x = torch.randn(6, 3)
    guide = Encoder().train()

    def model(x):
        offset = pyro.param("offset", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = torch.cat([z, z[..., :1]], -1) + offset
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    compute_terms(model, guide, x)  # declares everything
    state = {k: v.clone() for k, v in guide.state_dict().items()}
    frozen = [p.requires_grad for p in guide.parameters()]
    better = refined(model, guide, x, num_steps=30)
    assert all(torch.equal(v, state[k]) for k, v in guide.state_dict().items())
    parameters = [*guide.parameters(), pyro.get_param_store()["offset"].unconstrained()]
    assert all(p.grad is None for p in parameters)
    assert [p.requires_grad for p in guide.parameters()] == frozen
    assert all(m.training for m in guide.modules())
    assert pyro.get_param_store()["offset"].abs().max() == 0
    guide.eval()
    assert fitted(better, x).mean.requires_grad  # of the guide's own parameters alone
    assert elbo(model, better, x).mean() > elbo(model, guide, x).mean() + 0.1


def test_other_data_are_refused():
    problem = linear_gaussian(6, 2)
    x = problem.sample(10)
    guide = refined(problem.model, wrong_full(problem), x, num_steps=2)
    with pytest.raises(ValueError, match=r"Expected the 10 data of plate 'data'.*got 4"):
        guide(x[:4])
    with pytest.raises(ValueError, match=r"batch_size=None"):
        importance_sampling(problem.model, guide, x, num_samples=5, batch_size=5)


def test_other_data_are_refused_in_a_plate_without_a_size():
    def model(x):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(0.1 * x, 1.0))

    better = refined(model, guide, torch.randn(5), num_steps=300)
    assert fitted(better, torch.randn(5)).scale == pytest.approx(math.sqrt(0.5), abs=0.1)
    with pytest.raises(ValueError, match=r"Expected the 5 data of plate 'data'.*got 3"):
        better(torch.randn(3))


def test_a_minibatch_must_be_held():
    problem = PROBLEMS["global_and_local"]()
    with pytest.raises(ValueError, match=r"minibatch that the guide was refined for.*'data'"):
        refined(problem.model, problem.guide, num_steps=2)
    model, held = hold_subsamples(problem.model, problem.guide)
    better = refined(model, held, num_steps=300)
    before, after = (compute_terms(model, g, num_particles=500) for g in (held, better))
    assert (after.log_likelihood - after.kl["z"]).mean() > 0.1 + (
        before.log_likelihood - before.kl["z"]
    ).mean()
    assert importance_sampling(model, better, num_samples=50).ess.min() > 1
    with pytest.raises(ValueError, match=r"got other rows.*hold_subsamples"):
        importance_sampling(problem.model, better, num_samples=50)


def flow(loc):
    base = dist.Normal(loc, 1.0)
    return dist.TransformedDistribution(base, [AffineTransform(0.0, 2.0)])


def guide_of(make):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", make(x))

    return guide


class Doubled(dist.Normal):
    """A normal that is not what its parameters say."""

    def __init__(self, loc, scale, validate_args=None):
        super().__init__(loc, 2 * scale, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Doubled, _instance))


@pytest.mark.parametrize(
    ("guide", "settings", "match"),
    [
        (guide_of(flow), {}, "TransformedDistribution at site 'z'.*no parameters of its own"),
        (guide_of(lambda x: dist.Delta(x)), {}, r"point masses at \['z'\].*AutoNormal"),
        (guide_of(lambda x: dist.Uniform(x - 9, x + 9)), {}, "Uniform at site 'z': its support"),
        (guide_of(lambda x: dist.VonMises(x, 1.0)), {}, "VonMises.*no pathwise gradient"),
        (guide_of(lambda x: dist.Bernoulli(logits=x)), {}, "Bernoulli.*'enumerate': 'parallel'"),
        (
            guide_of(lambda x: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=x)),
            {},
            "RelaxedBernoulliStraightThrough at site 'z': it can't be made anew",
        ),
        (guide_of(lambda x: Doubled(x, torch.ones(()))), {}, "Doubled at site 'z': it is another"),
        (guide_of(lambda x: dist.Normal(x, 1.0)), {"plate": "rows"}, "plate named 'rows'"),
        (guide_of(lambda x: dist.Normal(x, 1.0)), {"num_steps": -1}, "num_steps.*positive"),
        (guide_of(lambda x: dist.Normal(x, 1.0)), {"learning_rate": 0.0}, "learning_rate"),
        (guide_of(lambda x: dist.Normal(x, 1.0)), {"num_particles": 0}, "num_particles"),
    ],
)
def test_what_is_refused(guide, settings, match):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pyro.enable_validation(False)
    with pytest.raises(ValueError, match=match):
        refined(model, guide, torch.rand(NUM_DATA), **settings)


def test_guides_without_local_distributions_are_refused():
    problem = PROBLEMS["mixture"]()
    with pytest.raises(ValueError, match=r"draws local latents in plate 'data'.*got none"):
        refined(problem.model, problem.guide, *problem.args)
    problem = PROBLEMS["normal_normal"]()
    guide = AutoDiagonalNormal(problem.model)  # one global site, and point masses made of it
    guide(*problem.args)
    with pytest.raises(ValueError, match=r"point masses at \['z'\]"):
        refined(problem.model, guide, *problem.args)


# ------------------------------------------------------------------------------------------ gaps


def test_gaps_are_the_closed_forms():
    """Amortisation gap: KL(q) - KL(best normal); approximation gap: the latter."""
    problem = linear_gaussian(3, 2, seed=7)
    x = problem.sample(60)
    guide = wrong_normal(problem, scale=0.4, shift=0.2)
    gaps = inference_gaps(problem.model, guide, x, num_samples=2000, refine_steps=1000)
    q = fitted(guide, x)
    as_full = dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
    inference = kl_divergence(as_full, posterior_of(problem, x))
    best = mean_field_gap(problem)
    assert best > 0.05
    for found, expected in (
        (gaps.inference, inference),
        (gaps.approximation, best.expand(60)),
        (gaps.amortisation, inference - best),
    ):
        # to what the optimisation leaves beside the errors of sampling
        assert ((found.value - expected).abs() < 5 * found.std_error + 0.02).all()
        assert abs(found.mean.value - expected.mean()) < 5 * found.sampling_std_error + 0.005
    scores = (gaps.inference.value - inference) / gaps.inference.std_error
    assert 0.3 < scores.square().mean() < 2.5  # errors neither too short nor too long
    assert torch.allclose(gaps.inference.value, gaps.amortisation.value + gaps.approximation.value)
    assert ((gaps.elbo.value - (problem.log_prob(x) - inference)).abs() < 0.2).all()
    text = str(gaps)
    assert f"{gaps.amortisation.mean.value:.3f}" in text
    assert "over 60 data, in nats per datum" in text


def test_a_score_of_ones_own():
    problem = linear_gaussian(6, 2)
    x = problem.sample(20)
    score = importance_sampling(problem.model, problem.guide, x, num_samples=10)
    gaps = inference_gaps(
        problem.model, wrong_full(problem), x, score=score, refine_steps=600, num_samples=500
    )
    assert torch.allclose(gaps.log_prob.value, problem.log_prob(x))
    assert gaps.approximation.value.abs().max() < 0.1
    other = importance_sampling(problem.model, problem.guide, x + 1, num_samples=10)
    with pytest.raises(ValueError, match="score of the data that the pair is called with"):
        inference_gaps(problem.model, problem.guide, x, score=other, refine_steps=1)


def test_gaps_are_given_one_draw_of_global_latents():
    """log p(x | g) = N(g, 1.25), and the family has the posterior: no approximation gap."""
    problem = PROBLEMS["global_and_local"]()
    gaps = inference_gaps(problem.model, problem.guide, num_samples=500, refine_steps=600)
    assert gaps.approximation.value.abs().max() < 0.03
    assert gaps.amortisation.value.min() > 0.01
    with pytest.raises(ValueError, match=r"no score= where global latents.*\['mean'\]"):
        inference_gaps(problem.model, problem.guide, score=gaps.score)


def test_a_failed_refinement_is_told():
    """A single step of a rate that leads astray: the refined guide is worse."""
    problem = linear_gaussian(6, 2)
    x = problem.sample(20)
    gaps = inference_gaps(
        problem.model, problem.guide, x, refine_steps=1, learning_rate=2.0, num_samples=200
    )
    assert any("lower ELBO than the guide" in warning for warning in gaps.warnings())


def test_the_structure_is_that_of_the_guide():
    problem = linear_gaussian(6, 2)
    x = problem.sample(4)
    guide = refined(problem.model, wrong_full(problem), x, num_steps=1)
    before, after = (inspect_pair(problem.model, g, (x,)) for g in (wrong_full(problem), guide))
    assert before == after
