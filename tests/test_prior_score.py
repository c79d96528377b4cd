"""Divergences by the prior's density: the score comes from the program, whatever its prior."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS
from torch.distributions import constraints

from pyro_lvm.divergences import Stein
from pyro_lvm.infer import TraceInfo_ELBO
from pyro_lvm.pair import parameters_of
from pyro_lvm.terms import compute_terms

pytestmark = pytest.mark.usefixtures("float64")


def divergence_and_gradient(model, guide, args, parameters, **settings):
    """N D and its gradient: the loss at lambda = 2 minus that at lambda = 1, under one seed."""
    results = []
    for lambda_ in (2.0, 1.0):
        elbo = TraceInfo_ELBO(lambda_=lambda_, divergence=Stein(), max_plate_nesting=1, **settings)
        elbo.loss(model, guide, *args)
        pyro.set_rng_seed(1)
        loss = elbo.differentiable_loss(model, guide, *args)
        gradient = torch.autograd.grad(loss, parameters, materialize_grads=True)
        results.append((loss.detach(), *gradient))
    return [a - b for a, b in zip(*results, strict=True)]


def assert_divergence(model, guide, args, draw, log_prob, **settings):
    """The divergence of a pair against that of the tensors that it should compare."""
    parameters = parameters_of(model, guide, args)
    found = divergence_and_gradient(model, guide, args, parameters, **settings)
    pyro.set_rng_seed(1)
    expected = NUM_DATA * Stein()(draw(), log_prob)
    gradient = torch.autograd.grad(expected, parameters, materialize_grads=True)
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-8, atol=1e-8)
    for mine, other in zip(found[1:], gradient, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-8)
    assert any(g.abs().max() > 1e-6 for g in gradient)


def param(name):
    return pyro.param(name).clone()


def test_a_standard_normal():
    problem = PROBLEMS["normal_normal"]()
    (x,) = problem.args

    def draw():
        return (param("slope") * x + param("scale") * torch.randn(NUM_DATA))[:, None]

    def log_prob(z):
        return dist.Normal(0.0, 1.0).log_prob(z).sum(-1)

    assert_divergence(problem.model, problem.guide, (x,), draw, log_prob)


def test_a_mixture_that_the_model_enumerates_and_learns():
    """p(z) = sum_y p(y) p(z | y); its centres have the gradient of - E log p."""
    problem = PROBLEMS["mixture_prior"]()
    (x,) = problem.args

    def draw():
        return (param("slope") * x + 0.5 * torch.randn(NUM_DATA))[:, None]

    def log_prob(z):
        parts = dist.Normal(param("loc"), 1.0).log_prob(z) + torch.tensor([0.25, 0.75]).log()
        return parts.logsumexp(-1)

    assert_divergence(problem.model, problem.guide, (x,), draw, log_prob)


def hierarchy():
    """z2 ~ N(0, 1), z1 ~ N(w z2, s) with learned w, s; the guide draws z1 first."""
    x = torch.randn(NUM_DATA, 2)

    def model(x):
        w = pyro.param("w", torch.tensor(0.7))
        s = pyro.param("s", torch.tensor(0.6), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            loc = (w * z2)[..., None] * torch.ones(2)
            z1 = pyro.sample("z1", dist.Normal(loc, s).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)

    def guide(x):
        a = pyro.param("a", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(a * x, 0.4).to_event(1))
            pyro.sample("z2", dist.Normal(a * z1.sum(-1), 0.3))

    return model, guide, x


def test_a_hierarchy_is_compared_jointly():
    model, guide, x = hierarchy()

    def draw():
        z1 = param("a") * x + 0.4 * torch.randn(NUM_DATA, 2)
        z2 = param("a") * z1.sum(-1) + 0.3 * torch.randn(NUM_DATA)
        return torch.cat([z2[:, None], z1], -1)

    def log_prob(z):
        given = dist.Normal((param("w") * z[:, 0])[:, None], param("s"))
        return dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + given.log_prob(z[:, 1:]).sum(-1)

    assert_divergence(model, guide, (x,), draw, log_prob)


def test_the_top_of_a_hierarchy_alone():
    model, guide, x = hierarchy()

    def draw():
        z1 = param("a") * x + 0.4 * torch.randn(NUM_DATA, 2)
        return (param("a") * z1.sum(-1) + 0.3 * torch.randn(NUM_DATA))[:, None]

    def log_prob(z):
        return dist.Normal(0.0, 1.0).log_prob(z).sum(-1)

    assert_divergence(model, guide, (x,), draw, log_prob, sites=["z2"])


def test_the_bottom_of_a_hierarchy_alone_is_refused():
    model, guide, x = hierarchy()
    elbo = TraceInfo_ELBO(lambda_=2.0, divergence=Stein(), sites=["z1"])
    with pytest.raises(ValueError, match=r"up to 'z1'.*\['z1'\] without \['z2'\]"):
        elbo.loss(model, guide, x)


@pytest.mark.parametrize("vectorize", [False, True])
def test_globals_particles_and_subsampling(vectorize):
    """The score is that of the prior given each particle's own global and minibatch."""
    problem = PROBLEMS["global_and_local"]()
    seen = []

    class Spy(Stein):
        def from_score(self, q_samples, score):
            seen.append((q_samples, score))
            return q_samples.mean()

    elbo = TraceInfo_ELBO(
        lambda_=2.0, divergence=Spy(), num_particles=3, vectorize_particles=vectorize
    )
    elbo.loss(problem.model, problem.guide)
    assert len(seen) == 3
    means = [(q + s) for q, s in seen]  # of N(mean, 1) the score is mean - z
    for mean in means:
        assert mean.shape == (NUM_DATA, 1)
        torch.testing.assert_close(mean, mean[:1].expand_as(mean))
    assert len({float(m[0]) for m in means}) == 3


def test_a_conditional_story_has_the_score_given_its_own_condition():
    seen = []

    class Spy(Stein):
        def from_score(self, q_samples, score):
            seen.append(q_samples + score)
            return q_samples.mean()

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(10.0 * y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * x, 1.0))

    y = torch.tensor([0.0, 1.0, 2.0])
    TraceInfo_ELBO(lambda_=2.0, divergence=Spy()).loss(model, guide, torch.zeros(3), y)
    torch.testing.assert_close(seen[0][:, 0], 10 * y)


def test_the_decoder_is_not_run_again():
    calls = []

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            calls.append("decoder")
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * x, 1.0))

    x = torch.randn(4)
    counts = []
    for settings in ({"lambda_": 2.0, "divergence": Stein()}, {}):
        elbo = TraceInfo_ELBO(**settings)
        elbo.loss(model, guide, x)
        calls.clear()
        elbo.loss(model, guide, x)
        counts.append(len(calls))
    assert counts[0] == counts[1] == 1


def test_latents_with_bounds_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(pyro.param("slope", torch.tensor(0.5)) * x, 1.0))

    elbo = TraceInfo_ELBO(lambda_=2.0, divergence=Stein())
    with pytest.raises(ValueError, match=r"in the reals.*\['z'\].*such as MMD"):
        elbo.loss(model, guide, torch.randn(4))


def test_terms_and_score_agree_on_the_prior():
    """The log-density that is differentiated is that of the terms."""
    from pyro_lvm.infer.prior import prior_log_prob

    problem = PROBLEMS["two_under_a_sum"]()
    (x,) = problem.args
    guide_trace = pyro.poutine.trace(problem.guide).get_trace(x)
    guide_trace.compute_log_prob()
    guide_trace.pack_tensors()
    values = {n: guide_trace.nodes[n]["value"].detach() for n in ("a", "b")}
    log_prior = prior_log_prob(
        problem.model,
        values,
        (x,),
        {},
        given={},
        guide_trace=guide_trace,
        plate="data",
        max_plate_nesting=1,
    )
    replayed = pyro.poutine.replay(problem.guide, trace=guide_trace)
    terms = compute_terms(problem.model, replayed, x)
    torch.testing.assert_close(log_prior, sum(terms.log_prior.values()))
