"""The InfoVAE objective against Pyro's objectives, closed forms and hand-made sums."""

import copy
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyro_lvm.divergences import MMD
from pyro_lvm.infer import TraceInfo_ELBO
from pyro_lvm.infer.host import host_class
from pyro_lvm.infer.prior import sample_prior_sites
from pyro_lvm.pair import inspect_pair, parameters_of, plate_size
from pyro_lvm.terms import compute_terms

pytestmark = pytest.mark.usefixtures("float64")

HOSTS = {
    "normal_normal": TraceMeanField_ELBO,
    "modules": TraceMeanField_ELBO,
    "global_and_local": TraceMeanField_ELBO,
    "nested_masked": TraceMeanField_ELBO,
    "auxiliary": TraceMeanField_ELBO,
    "score_function": Trace_ELBO,
    "mixture": TraceEnum_ELBO,
    "topics": TraceEnum_ELBO,
    "mixture_prior": TraceEnum_ELBO,
    "semi_supervised": TraceEnum_ELBO,
    "guide_chain": TraceEnum_ELBO,
    "independent_guide": TraceEnum_ELBO,
    "two_under_a_sum": TraceEnum_ELBO,
    "masked_mixture": TraceEnum_ELBO,
}


def value_and_gradient(elbo, problem, seed=1):
    parameters = parameters_of(problem.model, problem.guide, problem.args)
    for p in parameters:
        p.grad = None
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(problem.model, problem.guide, *problem.args)
    return loss, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]


def assert_equal_gradients(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_host_is_chosen_by_the_pair(name):
    problem = PROBLEMS[name]()
    structure = inspect_pair(problem.model, problem.guide, problem.args)
    assert host_class(structure) is HOSTS[name]


def test_analytic_kl_is_left_where_only_the_model_is_annealed():
    problem = PROBLEMS["normal_normal"]()

    def annealed(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.3):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert host_class(inspect_pair(annealed, problem.guide, problem.args)) is Trace_ELBO


@pytest.mark.parametrize(("num_particles", "vectorize"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_zero_one_is_pyros_objective(name, num_particles, vectorize):
    problem = PROBLEMS[name]()
    settings = {"num_particles": num_particles, "vectorize_particles": vectorize}
    ours = value_and_gradient(TraceInfo_ELBO(**settings), problem)
    theirs = value_and_gradient(HOSTS[name](**settings), problem)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    assert_equal_gradients(ours[1], theirs[1])
    assert any(g.abs().sum() > 0 for g in ours[1])
    pyro.set_rng_seed(5)
    loss = TraceInfo_ELBO(**settings).loss(problem.model, problem.guide, *problem.args)
    pyro.set_rng_seed(5)
    reference = HOSTS[name](**settings).loss(problem.model, problem.guide, *problem.args)
    assert loss == pytest.approx(reference, rel=1e-12)


@pytest.mark.parametrize("host", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_host_can_be_forced(host):
    problem = PROBLEMS["normal_normal"]()
    if host is TraceGraph_ELBO:  # it has no differentiable_loss: only the value
        pyro.set_rng_seed(1)
        ours = TraceInfo_ELBO(host=host).loss(problem.model, problem.guide, *problem.args)
        pyro.set_rng_seed(1)
        assert ours == pytest.approx(host().loss(problem.model, problem.guide, *problem.args))
        return
    ours = value_and_gradient(TraceInfo_ELBO(host=host), problem)
    theirs = value_and_gradient(host(), problem)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    assert_equal_gradients(ours[1], theirs[1])


def mean_distance(q, p):
    """A divergence of a kind: linear, so that expected values are easy to write down."""
    return (q - p).mean() + 2.0


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("name", PROBLEMS)
def test_parts_add_up_to_the_loss(name, alpha):
    problem = PROBLEMS[name]()
    structure = inspect_pair(problem.model, problem.guide, problem.args)
    fit_for_divergence = set(structure.local_latents) - set(structure.not_reparameterised)
    names = sorted(fit_for_divergence - set(structure.masked))
    # latents that depend on enumerated ones can't be compared
    names = [n for n in names if n not in ("a", "b", "c", "y") and name != "semi_supervised"]
    weight = 0.7 if names else 0.0
    elbo = TraceInfo_ELBO(
        alpha=alpha,
        lambda_=1 - alpha + weight,
        divergence=mean_distance,
        sites=names,
        num_particles=2,
    )
    loss, parts = elbo.loss_and_parts(problem.model, problem.guide, *problem.args)
    kl = sum(v for k, v in parts.items() if k.startswith("kl[") and k != "kl[global]")
    total = -parts["reconstruction"] + (1 - alpha) * kl + parts.get("kl[global]", 0.0)
    total = total + weight * parts.get("divergence", 0.0)
    size = 30 if name == "global_and_local" else NUM_DATA
    assert torch.allclose(total, parts["loss"], rtol=1e-10)
    assert torch.allclose(loss.detach(), size * parts["loss"], rtol=1e-10)
    assert ("divergence" in parts) == bool(names)


@pytest.mark.parametrize("beta", [0.0, 0.5, 4.0])
def test_alpha_plus_lambda_one_is_beta_vae(beta):
    problem = PROBLEMS["normal_normal"]()
    elbo = TraceInfo_ELBO(alpha=1 - beta, lambda_=beta, host=Trace_ELBO)
    ours = value_and_gradient(elbo, problem)
    pyro.set_rng_seed(1)
    terms = compute_terms(problem.model, problem.guide, *problem.args, max_plate_nesting=1)
    kl = terms.log_guide["z"] - terms.log_prior["z"]
    expected = -(terms.log_likelihood - beta * kl).sum()
    gradient = torch.autograd.grad(
        expected, parameters_of(problem.model, problem.guide, problem.args)
    )
    assert ours[0] == pytest.approx(expected.item(), rel=1e-12)
    assert_equal_gradients(ours[1], gradient)


def test_alpha_weighs_score_function_latents_in_expectation():
    """d/d slope of the beta-weighted bound, by summing over y, against the mean of estimates."""
    problem, alpha = PROBLEMS["score_function"](), 0.6
    x, slope = problem.args[0], torch.tensor(0.5, requires_grad=True)
    q = torch.sigmoid(slope * x)
    log_x = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(x[:, None])
    kl = q * (q / 0.3).log() + (1 - q) * ((1 - q) / 0.7).log()
    exact = -(q * log_x[:, 1] + (1 - q) * log_x[:, 0] - (1 - alpha) * kl).sum()
    (expected,) = torch.autograd.grad(exact, slope)
    elbo = TraceInfo_ELBO(alpha=alpha, lambda_=1 - alpha)
    draws = [value_and_gradient(elbo, problem, seed=s) for s in range(400)]
    losses, gradients = torch.tensor([d[0] for d in draws]), torch.stack([d[1][0] for d in draws])
    for estimate, value in ((losses, exact), (gradients, expected)):
        assert (estimate.mean() - value).abs() < 5 * estimate.std() / math.sqrt(len(draws))


def test_alpha_weighs_guide_enumerated_latents_exactly():
    problem, alpha = PROBLEMS["guide_chain"](), 0.6
    terms = compute_terms(problem.model, problem.guide, *problem.args)
    kl = sum(terms.kl.values())
    expected = -(terms.log_likelihood - (1 - alpha) * kl).sum().item()
    elbo = TraceInfo_ELBO(alpha=alpha, lambda_=1 - alpha)
    assert elbo.loss(problem.model, problem.guide, *problem.args) == pytest.approx(expected)


def test_divergence_is_scaled_by_the_number_of_all_data():
    problem = PROBLEMS["global_and_local"]()  # 6 of 30 data
    plain = value_and_gradient(TraceInfo_ELBO(), problem)[0]
    elbo = TraceInfo_ELBO(alpha=0.0, lambda_=1.5, divergence=lambda q, p: torch.tensor(2.0))
    assert value_and_gradient(elbo, problem)[0] == pytest.approx(plain + 30 * 0.5 * 2.0)


def pair_statistic(q, p):
    """A U-statistic of q alone: mean over pairs of |z - z'|."""
    distance = (q[:, None] - q).abs().sum(-1)
    return distance.sum() / (len(q) * (len(q) - 1))


def test_minibatch_loss_is_the_full_loss_on_average():
    """Over all minibatches of 2, 3 and 4 out of 6, exactly, with a deterministic guide."""
    x = torch.randn(6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(1.3 * x))

    elbo = TraceInfo_ELBO(alpha=0.5, lambda_=10.0, divergence=pair_statistic)
    full = elbo.loss(model, guide, x)
    sized = plate_size(model, 6), plate_size(guide, 6)
    for batch in (2, 3, 4):
        losses = [elbo.loss(*sized, x[list(i)]) for i in itertools.combinations(range(6), batch)]
        assert sum(losses) / len(losses) == pytest.approx(full, rel=1e-12)


def test_lambda_means_the_same_at_every_batch_size():
    """With MMD and a random guide: means over repeated minibatches agree within their errors."""
    x = torch.randn(32) * 2

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.3))

    elbo = TraceInfo_ELBO(alpha=1.0, lambda_=5.0, divergence=MMD())
    means, errors = [], []
    for batch in (4, 16, 32):
        draws = []
        for _ in range(400):
            index = torch.randperm(32)[:batch]
            program = plate_size(model, 32), plate_size(guide, 32)
            parts = elbo.loss_and_parts(*program, x[index])[1]
            draws.append(parts["divergence"])
        draws = torch.stack(draws)
        means.append(draws.mean())
        errors.append(draws.std() / math.sqrt(len(draws)))
    for i, j in ((0, 1), (1, 2), (0, 2)):
        assert (means[i] - means[j]).abs() < 5 * (errors[i] ** 2 + errors[j] ** 2).sqrt()
    assert means[-1] > 5 * errors[-1]  # there is something to see: q(z) is wider than the prior


def test_prior_is_drawn_without_the_decoder_and_given_the_same_condition():
    calls = []

    def model(x, y):
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Normal(10.0 * y, 0.1))
            z = pyro.sample("z", dist.Normal(top, 0.1))
            calls.append("decoder")
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    y = torch.tensor([0.0, 1.0, 2.0])
    sites = sample_prior_sites(model, ["z", "top"], (torch.zeros(3), y), {}, given={})
    assert calls == []
    assert ((sites["z"]["value"] - 10 * y).abs() < 1).all()
    top = torch.tensor([5.0, 6.0, 7.0])
    sites = sample_prior_sites(model, ["z"], (torch.zeros(3), y), {}, given={"top": top})
    assert ((sites["z"]["value"] - top).abs() < 1).all()
    with pytest.raises(ValueError, match="'w'"):
        sample_prior_sites(model, ["w"], (torch.zeros(3), y), {}, given={})


def test_prior_shares_global_latents_and_indices_with_the_guide():
    """Under a guide that is the conditional prior itself, paired draws differ by their noise."""
    y = torch.arange(20.0)

    def conditional(offset):
        with pyro.plate("data", 20, subsample_size=5) as index:
            return pyro.sample("z", dist.Normal(y[index] * 100 + offset, 0.01)), index

    def model():
        offset = pyro.sample("offset", dist.Normal(0.0, 50.0))
        z, _ = conditional(offset)
        with pyro.plate("data", 20, subsample_size=5):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(5))

    def model_once():
        offset = pyro.sample("offset", dist.Normal(0.0, 50.0))
        with pyro.plate("data", 20, subsample_size=5) as index:
            z = pyro.sample("z", dist.Normal(y[index] * 100 + offset, 0.01))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(5))

    def guide():
        offset = pyro.sample("offset", dist.Normal(0.0, 50.0))
        conditional(offset)

    seen = []

    def divergence(q, p):
        seen.append((q - p).abs().max())
        return (q - p).mean()

    for settings in ({}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}):
        elbo = TraceInfo_ELBO(lambda_=2.0, divergence=divergence, **settings)
        elbo.loss(model_once, guide)
    assert len(seen) == 7
    assert max(seen) < 1.0


def test_divergence_sees_sites_jointly_and_with_gradients():
    widths = []

    def divergence(q, p):
        widths.append((q.shape, p.shape))
        return (q**2).mean()

    problem = PROBLEMS["nested_masked"]()  # z has an event of 2, w a nested plate of 4
    elbo = TraceInfo_ELBO(alpha=1.0, lambda_=1.0, divergence=divergence, num_particles=2)
    _, gradients = value_and_gradient(elbo, problem)
    assert widths == [((NUM_DATA, 6), (NUM_DATA, 6))] * 2
    elbo = TraceInfo_ELBO(lambda_=2.0, divergence=divergence, sites=["w"])
    elbo.loss(problem.model, problem.guide, *problem.args)
    assert widths[-1] == ((NUM_DATA, 4), (NUM_DATA, 4))
    without = value_and_gradient(TraceInfo_ELBO(alpha=1.0, lambda_=0.0, num_particles=2), problem)
    assert not torch.allclose(gradients[0], without[1][0])


def test_in_svi_and_as_a_module():
    problem = PROBLEMS["modules"]()
    elbo = TraceInfo_ELBO(alpha=0.5, lambda_=2.0, divergence=MMD())
    svi = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step(*problem.args) for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20])
    module = elbo(problem.model, problem.guide)
    names = {name for name, _ in module.named_parameters()}
    assert any("scale_unconstrained" in name for name in names)  # the bound method's owner
    module(*problem.args).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_without_a_data_plate_the_elbo_still_works():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))

    x = torch.randn(4)
    _, parts = TraceInfo_ELBO().loss_and_parts(model, guide, x)
    assert set(parts) == {"loss"}
    with pytest.raises(ValueError, match=r"plate named 'data'.*no plates at all"):
        TraceInfo_ELBO(alpha=0.5, lambda_=0.5).loss(model, guide, x)


def global_sum(x):
    y = pyro.sample("y", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    loc = pyro.param("loc", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc * y, 1.0), obs=x)


def sequential_model(x):
    loc = pyro.param("loc", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    y = pyro.sample("y", dist.Bernoulli(0.3))
    with pyro.plate("more", len(x)):
        pyro.sample("x", dist.Normal(loc * y + z, 1.0), obs=x)


def sequential_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.3)) * x, 1.0))
    pyro.sample("y", dist.Bernoulli(0.4), infer={"enumerate": "sequential"})


@pytest.mark.parametrize(
    ("model", "guide"), [(global_sum, lambda x: None), (sequential_model, sequential_guide)]
)
def test_what_has_no_parts_per_datum_has_pyros_loss(model, guide):
    x = torch.randn(NUM_DATA)
    results = []
    for elbo in (TraceInfo_ELBO(), TraceEnum_ELBO()):
        parameters = parameters_of(model, guide, (x,))
        pyro.set_rng_seed(1)
        loss = elbo.loss_and_grads(model, guide, x)
        results.append((loss, [p.grad.clone() for p in parameters]))
        for p in parameters:
            p.grad = None
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    assert_equal_gradients(results[0][1], results[1][1])
    loss, parts = TraceInfo_ELBO().loss_and_parts(model, guide, x)
    assert set(parts) == {"loss"}
    assert torch.allclose(parts["loss"], loss / NUM_DATA)


def test_divergence_refuses_sequential_enumeration():
    elbo = TraceInfo_ELBO(lambda_=2.0, divergence=MMD(), sites=["z"])
    with pytest.raises(ValueError, match=r"sequential enumeration in the guide at \['y'\]"):
        elbo.loss(sequential_model, sequential_guide, torch.randn(NUM_DATA))


def test_objective_is_copied_and_pickled_without_what_it_has_run():
    problem = PROBLEMS["normal_normal"]()
    elbo = TraceInfo_ELBO(alpha=0.5, lambda_=2.0, divergence=MMD())
    expected = value_and_gradient(elbo, problem)
    for twin in (copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
        loss, gradient = value_and_gradient(twin, problem)
        assert loss == expected[0]
        assert_equal_gradients(gradient, expected[1])


def test_no_trace_outlives_the_call():
    problem = PROBLEMS["modules"]()
    elbo = TraceInfo_ELBO(alpha=0.5, lambda_=2.0, divergence=MMD())
    elbo.loss(problem.model, problem.guide, *problem.args)
    loss = elbo.differentiable_loss(problem.model, problem.guide, *problem.args)
    assert all(not prepared.host.runs for prepared in elbo._prepared.values())
    loss.backward()


def test_random_state_is_that_of_pyro_after_the_first_call():
    problem = PROBLEMS["normal_normal"]()
    draws = []
    for elbo in (TraceInfo_ELBO(), TraceMeanField_ELBO()):
        pyro.set_rng_seed(3)
        elbo.loss(problem.model, problem.guide, *problem.args)
        draws.append(torch.rand(()))
    assert draws[0] == draws[1]


def masked_guide(x):
    with (
        pyro.plate("data", len(x)),
        poutine.mask(mask=torch.tensor([True] * (len(x) - 1) + [False])),
    ):
        pyro.sample("z", dist.Normal(x, 1.0))


def masked_model(x):
    with pyro.plate("data", len(x)):
        with poutine.mask(mask=torch.tensor([True] * (len(x) - 1) + [False])):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"alpha": 0.0, "lambda_": 1e-3, "divergence": MMD()}, "a weight of -0.999"),  # pythae's
        ({"alpha": 0.5, "lambda_": 10.0}, r"alpha \+ lambda_ - 1 = 9.5; got None"),
        ({"alpha": math.nan}, "finite"),
        ({"alpha": torch.tensor(math.nan)}, "finite"),
        ({"lambda_": torch.ones(2)}, r"lambda_.*without dimensions; got one of shape \(2,\)"),
        ({"alpha": torch.tensor(0.1)}, r"alpha \+ lambda_ - 1 = 0.1; got None"),
        ({"lambda_": torch.tensor(0.1), "divergence": MMD()}, "a weight of -0.9"),
    ],
)
def test_settings_that_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        TraceInfo_ELBO(**settings)


@pytest.mark.parametrize(
    ("problem", "settings", "match"),
    [
        ("score_function", {"lambda_": 2.0}, "'y', which is not reparameterised"),
        ("mixture", {"lambda_": 2.0}, "local latents that the guide samples"),
        ("normal_normal", {"lambda_": 2.0, "sites": ["w"]}, r"\['w'\].*has \['z'\]"),
        ("semi_supervised", {"lambda_": 2.0}, "'y'.*not reparameterised"),
        ("semi_supervised", {"lambda_": 2.0, "sites": ["z"]}, "'z', which depends on an enum"),
    ],
)
def test_what_is_refused(problem, settings, match):
    problem = PROBLEMS[problem]()
    elbo = TraceInfo_ELBO(divergence=MMD(), **settings)
    with pytest.raises(ValueError, match=match):
        elbo.loss(problem.model, problem.guide, *problem.args)


def test_masked_latents_and_a_single_datum_are_refused():
    elbo = TraceInfo_ELBO(lambda_=2.0, divergence=MMD())
    with pytest.raises(ValueError, match="'z', which is masked"):
        elbo.loss(masked_model, masked_guide, torch.randn(4))
    problem = PROBLEMS["normal_normal"]()
    with pytest.raises(ValueError, match=r"at least two data.*got 1.*larger batch"):
        elbo.loss(problem.model, problem.guide, problem.args[0][:1])


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_of_constrained_latents_keep_their_jacobian(autoguide):
    """They are point masses with a log-density, which an analytic KL would leave out."""
    throws = torch.tensor([0, 1, 1, 2, 5])

    def model(throws):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(6)))
        with pyro.plate("data", len(throws)):
            pyro.sample("throw", dist.Categorical(p), obs=throws)

    guide = autoguide(model)
    guide(throws)
    losses = []
    for elbo in (TraceInfo_ELBO(), Trace_ELBO()):
        pyro.set_rng_seed(1)
        losses.append(elbo.loss(model, guide, throws))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
