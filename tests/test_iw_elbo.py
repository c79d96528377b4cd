"""The importance weighted bound: values and gradients by hand, bounds, and what it must not do."""

import copy
import math
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS
from pyro import poutine
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from torch import nn
from torch.distributions import constraints

import pyro_lvm as lvm
from pyro_lvm import plate_size
from pyro_lvm.datasets import linear_gaussian
from pyro_lvm.infer import TraceInfo_ELBO, TraceIW_ELBO
from pyro_lvm.pair import inspect_pair, parameters_of
from pyro_lvm.terms import compute_terms

pytestmark = pytest.mark.usefixtures("float64")

GRADIENTS = ("reparameterized", "stl", "dreg")
each_gradient = pytest.mark.parametrize("gradient", GRADIENTS)


def suits(name):
    """Whether a problem's guide has nothing but reparameterised draws."""
    pyro.clear_param_store()
    problem = PROBLEMS[name]()
    structure = inspect_pair(problem.model, problem.guide, problem.args)
    return not structure.guide_enumerated and problem.reparameterised


SUITABLE = ("normal_normal", "modules", "global_and_local", "nested_masked", "auxiliary", "mixture")
SUITABLE += ("topics", "mixture_prior", "two_under_a_sum", "masked_mixture")
each_suitable = pytest.mark.parametrize("name", SUITABLE)


def value_and_gradient(elbo, problem, seed=1):
    parameters = parameters_of(problem.model, problem.guide, problem.args)
    pyro.set_rng_seed(seed)
    loss = elbo.loss_and_grads(problem.model, problem.guide, *problem.args)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return loss, gradients


def assert_equal_gradients(ours, theirs, **tolerances):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **{"rtol": 1e-9, "atol": 1e-9, **tolerances})


def test_list_of_problems_is_complete():
    assert sorted(SUITABLE) == sorted(name for name in PROBLEMS if suits(name))


# --- the value


@each_suitable
@pytest.mark.parametrize("k", [1, 5])
def test_value_is_made_of_the_terms(name, k):
    problem = PROBLEMS[name]()
    terms_of = {"num_particles": k, "shared_globals": True}
    elbo = TraceIW_ELBO(num_particles=k)
    pair = problem.model, problem.guide, *problem.args
    elbo.loss(*pair)  # looks at the pair
    pyro.set_rng_seed(1)
    loss = elbo.loss(*pair)
    pyro.set_rng_seed(1)
    nesting = inspect_pair(problem.model, problem.guide, problem.args).max_plate_nesting
    terms = compute_terms(*pair, max_plate_nesting=nesting, **terms_of)
    bound = terms.log_weight.logsumexp(0) - math.log(k)
    expected = terms.global_kl[0] - terms.plate_scale * bound.sum()
    assert loss == pytest.approx(expected.item(), rel=1e-12)


@each_gradient
@each_suitable
def test_one_particle_is_the_elbo(name, gradient):
    problem = PROBLEMS[name]()
    host = TraceEnum_ELBO if problem.enumerated else Trace_ELBO
    losses = []
    for elbo in (TraceIW_ELBO(num_particles=1, gradient=gradient), TraceInfo_ELBO(host=host)):
        elbo.loss(problem.model, problem.guide, *problem.args)  # looks at the pair
        pyro.set_rng_seed(3)
        losses.append(elbo.loss(problem.model, problem.guide, *problem.args))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@each_suitable
def test_parts_add_up_to_the_loss(name):
    problem = PROBLEMS[name]()
    for settings in ({}, {"chunk_size": 2}, {"gradient": "reparameterized"}):
        elbo = TraceIW_ELBO(num_particles=5, **settings)
        loss, parts = elbo.loss_and_parts(problem.model, problem.guide, *problem.args)
        kl = sum(v for k, v in parts.items() if k.startswith("kl["))
        total = -parts["reconstruction"] + kl - parts["weighting"]
        size = 30 if name == "global_and_local" else NUM_DATA
        torch.testing.assert_close(parts["loss"], torch.as_tensor(total))
        torch.testing.assert_close(loss.detach(), size * parts["loss"])


# --- defects of neighbours


def with_global_and_plate(size):
    """x ~ N(z, 1), z ~ N(mean, 1), mean ~ N(prior, 3); written for a minibatch of ``size`` data."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(pyro.param("prior", torch.tensor(0.0)), 3.0))
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.2))
        pyro.sample("mean", dist.Normal(loc, 0.3))
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.3)) * x, 1.1))

    return model, guide


def test_pyro_renyi_elbo_has_the_plate_scale_inside_the_logarithm_and_ours_outside():
    """Without globals, a minibatch counts as its share of all data: exactly N / B times as much."""
    problem = PROBLEMS["normal_normal"]()
    elbo = TraceIW_ELBO(num_particles=7)
    sized = [plate_size(program, 10 * NUM_DATA) for program in (problem.model, problem.guide)]
    losses = []
    for pair in ((problem.model, problem.guide), sized):
        elbo.loss(*pair, *problem.args)
        pyro.set_rng_seed(2)
        losses.append(elbo.loss(*pair, *problem.args))
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-12)
    renyi = RenyiELBO(alpha=0, num_particles=7, vectorize_particles=True, max_plate_nesting=1)
    theirs = []
    for pair in ((problem.model, problem.guide), sized):
        pyro.set_rng_seed(2)
        theirs.append(renyi.loss(*pair, *problem.args))
    assert abs(theirs[1] / theirs[0] - 10) > 0.1  # what the test would see


def test_pyro_renyi_elbo_pulls_the_data_into_one_logarithm_by_a_global_and_ours_does_not():
    """All particles share one draw of the global; each datum has a logarithm of its own."""
    x = torch.randn(5)
    model, guide = with_global_and_plate(5)
    elbo = TraceIW_ELBO(num_particles=4)
    elbo.loss(model, guide, x)
    pyro.set_rng_seed(3)
    loss = elbo.loss(model, guide, x)
    pyro.set_rng_seed(3)
    mean = 0.2 + 0.3 * torch.randn(())
    z = 0.3 * x + 1.1 * torch.randn(4, 5)
    log_w = dist.Normal(z, 1.0).log_prob(x) + dist.Normal(mean, 1.0).log_prob(z)
    log_w = log_w - dist.Normal(0.3 * x, 1.1).log_prob(z)
    kl = dist.Normal(0.2, 0.3).log_prob(mean) - dist.Normal(0.0, 3.0).log_prob(mean)
    expected = kl - (log_w.logsumexp(0) - math.log(4)).sum()
    assert loss == pytest.approx(expected.item(), rel=1e-12)


def test_pyro_renyi_elbo_has_no_differentiable_loss_and_ours_has():
    problem = PROBLEMS["modules"]()
    module = TraceIW_ELBO(num_particles=3)(problem.model, problem.guide)
    module(*problem.args).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_pythae_logs_another_value_than_the_bound_and_ours_reports_it():
    problem = PROBLEMS["normal_normal"]()
    elbo = TraceIW_ELBO(num_particles=2000)
    _, parts = elbo.loss_and_parts(problem.model, problem.guide, *problem.args)
    assert -parts["loss"].item() == pytest.approx(problem.log_prob.mean().item(), abs=0.05)
    assert parts["weighting"] > 0.02  # which the loss has and the reconstruction has not


# --- gradients


def by_hand(x, shift, slope, scale, noise, gradient):
    """The loss of `normal_normal` with its gradient, from the formulas alone."""
    loc = slope * x
    z = loc + scale * noise  # K x N

    def log_weight(z, loc, scale):
        joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z + shift, 1.0).log_prob(x)
        return joint - dist.Normal(loc, scale).log_prob(z)

    log_w = log_weight(z, loc, scale)
    bound = (log_w.logsumexp(0) - math.log(len(noise))).sum()
    by_model = torch.autograd.grad(-bound, [shift], retain_graph=True)
    if gradient == "reparameterized":
        return by_model + torch.autograd.grad(-bound, [slope, scale])
    v = torch.softmax(log_w.detach(), 0)
    stopped = log_weight(z, loc.detach(), scale.detach())
    factor = v**2 if gradient == "dreg" else v
    return by_model + torch.autograd.grad(-(factor * stopped).sum(), [slope, scale])


@each_gradient
@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradient_is_that_of_the_formulas(gradient, k, chunk_size):
    problem = PROBLEMS["normal_normal"]()
    (x,) = problem.args
    elbo = TraceIW_ELBO(num_particles=k, gradient=gradient, chunk_size=chunk_size)
    elbo.loss(problem.model, problem.guide, x)
    _, ours = value_and_gradient(elbo, problem)
    pyro.set_rng_seed(1)
    sizes = [k] if chunk_size is None else [2] * (k // 2) + [1] * (k % 2)
    noise = torch.cat([torch.randn(size, len(x)) for size in sizes])
    names = [pyro.get_param_store()._params[n] for n in ("slope", "scale", "shift")]
    slope, log_scale, shift = (p.detach().clone().requires_grad_() for p in names)
    shift_g, slope_g, scale_g = by_hand(x, shift, slope, log_scale.exp(), noise, gradient)
    theirs = dict(zip(names, (slope_g, None, shift_g), strict=True))
    scale = log_scale.detach().exp().requires_grad_()
    scale_g = by_hand(x, shift, slope, scale, noise, gradient)[2] * scale.detach()
    theirs[names[1]] = scale_g
    parameters = parameters_of(problem.model, problem.guide, problem.args)
    assert_equal_gradients(ours, [theirs[p] for p in parameters])


@each_suitable
def test_reparameterized_gradient_equals_finite_differences(name):
    problem = PROBLEMS[name]()
    elbo = TraceIW_ELBO(num_particles=3, gradient="reparameterized")
    elbo.loss(problem.model, problem.guide, *problem.args)
    check_finite_differences(elbo, problem, range(4))


@each_suitable
@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_gradient_by_the_model_equals_finite_differences(name, gradient):
    """Of parameters that the guide does not have, by each estimator."""
    problem = PROBLEMS[name]()
    elbo = TraceIW_ELBO(num_particles=3, gradient=gradient)
    elbo.loss(problem.model, problem.guide, *problem.args)
    with poutine.trace(param_only=True) as of_guide:
        problem.guide(*problem.args)
    guided = {id(s["value"].unconstrained()) for s in of_guide.trace.nodes.values()}
    guided |= {id(p) for p in getattr(problem.guide, "__self__", nn.Module()).parameters()}
    parameters = parameters_of(problem.model, problem.guide, problem.args)
    check_finite_differences(
        elbo, problem, [i for i, p in enumerate(parameters) if id(p) not in guided]
    )


def check_finite_differences(elbo, problem, which, step=1e-5):
    parameters = parameters_of(problem.model, problem.guide, problem.args)
    _, gradients = value_and_gradient(elbo, problem)
    for i in which:
        if i >= len(parameters):
            continue
        flat = parameters[i].data.view(-1)
        for j in range(min(len(flat), 2)):
            values = []
            for sign in (1, -1):
                flat[j] += sign * step
                pyro.set_rng_seed(1)
                values.append(elbo.loss(problem.model, problem.guide, *problem.args))
                flat[j] -= sign * step
            expected = (values[0] - values[1]) / (2 * step)
            found = gradients[i].reshape(-1)[j].item()
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "name", ["normal_normal", "global_and_local", "nested_masked", "auxiliary", "mixture_prior"]
)
def test_estimators_agree_in_expectation(name):
    """DReG has the mean of the pathwise gradient for any K, STL for K = 1 alone."""
    problem = PROBLEMS[name]()
    for k, gradient in ((3, "dreg"), (1, "stl")):
        means, errors = [], []
        for kind in ("reparameterized", gradient):
            elbo = TraceIW_ELBO(num_particles=k, gradient=kind)
            draws = []
            for seed in range(80):
                gradients = value_and_gradient(elbo, problem, seed)[1]
                draws.append(torch.cat([g.reshape(-1) for g in gradients]))
            draws = torch.stack(draws)
            means.append(draws.mean(0))
            errors.append(draws.std(0) / math.sqrt(len(draws)))
        error = (errors[0] ** 2 + errors[1] ** 2).sqrt()
        assert ((means[0] - means[1]).abs() <= 5 * error + 1e-9).all()


@each_gradient
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradient_by_global_latents_equals_finite_differences(gradient, chunk_size):
    """Of their prior, and of their guide where no local guide depends on them."""
    x = torch.randn(5)
    model, guide = with_global_and_plate(10)
    elbo = TraceIW_ELBO(num_particles=4, gradient=gradient, chunk_size=chunk_size)
    elbo.loss(model, guide, x)
    names, step = ("prior", "loc"), 1e-5
    store = pyro.get_param_store()._params

    def loss():
        pyro.set_rng_seed(1)
        return elbo.differentiable_loss(model, guide, x)

    gradients = torch.autograd.grad(loss(), [store[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        values = []
        for sign in (1, -1):
            store[name].data += sign * step
            values.append(loss().item())
            store[name].data -= sign * step
        assert gradient.item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def exact_pair():
    """`normal_normal` with the exact posterior N((x - 0.3) / 2, 1/2) as the guide."""
    problem = PROBLEMS["normal_normal"]()

    def guide(x):
        loc = pyro.param("loc", torch.tensor(-0.15))
        slope = pyro.param("slope", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.5).sqrt(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + slope * x, scale))

    return problem.model, guide, problem.args[0], problem.log_prob


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_gradient_by_the_guide_vanishes_at_the_exact_posterior(gradient, chunk_size):
    model, guide, x, _ = exact_pair()
    for kind, vanishes in ((gradient, True), ("reparameterized", False)):
        elbo = TraceIW_ELBO(num_particles=4, gradient=kind, chunk_size=chunk_size)
        elbo.loss_and_grads(model, guide, x)
        store = pyro.get_param_store()._params
        largest = max(store[n].grad.abs().max() for n in ("loc", "slope", "scale"))
        assert (largest < 1e-12) == vanishes
        assert store["shift"].grad.abs() > 1e-3
        for p in store.values():
            p.grad = None


def test_signal_to_noise_of_dreg_grows_with_k_where_the_pathwise_one_falls():
    """Rainforth et al. 2018, theorem 1, and Tucker et al. 2018: 1 / sqrt(K), sqrt(K)."""
    x = torch.randn(4) * 2

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x + loc, 0.9))

    ratios = {}
    for gradient in ("reparameterized", "dreg"):
        for k in (1, 64):
            elbo = TraceIW_ELBO(num_particles=k, gradient=gradient)
            draws = []
            for _ in range(600):
                elbo.loss_and_grads(model, guide, x)
                p = pyro.get_param_store()._params["loc"]
                draws.append(p.grad.clone())
                p.grad = None
            draws = torch.stack(draws)
            ratios[gradient, k] = (draws.mean().abs() / draws.std()).item()
    assert ratios["dreg", 64] > 3 * ratios["dreg", 1]  # sqrt(64) = 8 in the limit
    assert ratios["reparameterized", 64] < 0.5 * ratios["reparameterized", 1]


# --- bounds


@pytest.mark.parametrize("latents", [2, 10])
def test_bounds_grow_with_k_up_to_log_p(latents):
    problem = linear_gaussian(12, latents)
    x = problem.sample(8)
    exact = problem.log_prob(x).mean()

    def guide(x):
        loc, root = problem.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc + 0.1, scale_tril=1.2 * root))

    means, errors = [], []
    for k in (1, 5, 50):
        elbo = TraceIW_ELBO(num_particles=k)
        draws = torch.tensor([-elbo.loss(problem.model, guide, x) / len(x) for _ in range(100)])
        means.append(draws.mean())
        errors.append(draws.std() / math.sqrt(len(draws)))
    for i, j in ((0, 1), (1, 2)):
        assert means[j] - means[i] > -5 * (errors[i] ** 2 + errors[j] ** 2).sqrt()
    assert means[1] - means[0] > 5 * errors[0]  # there is something to gain
    assert means[2] - exact < 5 * errors[2]


@pytest.mark.parametrize("k", [1, 5, 50])
def test_bound_is_log_p_with_the_exact_posterior(k):
    model, guide, x, log_prob = exact_pair()
    loss = TraceIW_ELBO(num_particles=k).loss(model, guide, x)
    assert -loss == pytest.approx(log_prob.sum().item(), rel=1e-12)


# --- chunks


@each_gradient
@each_suitable
def test_chunks_agree_with_all_at_once_in_expectation_and_with_their_own_value(name, gradient):
    """Under a seed the loss and the value without gradient are the same; so are both gradients."""
    problem = PROBLEMS[name]()
    chunked = TraceIW_ELBO(num_particles=4, chunk_size=4, gradient=gradient)
    whole = TraceIW_ELBO(num_particles=4, gradient=gradient)
    ours, theirs = value_and_gradient(chunked, problem), value_and_gradient(whole, problem)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    assert_equal_gradients(ours[1], theirs[1])


@each_gradient
def test_a_run_in_chunks_leaves_the_random_state_of_one_pass(gradient):
    problem = PROBLEMS["normal_normal"]()
    elbo = TraceIW_ELBO(num_particles=6, chunk_size=2, gradient=gradient)
    states = []
    for run in (elbo.loss, elbo.loss_and_grads):
        pyro.set_rng_seed(4)
        run(problem.model, problem.guide, *problem.args)
        pyro.set_rng_seed(4)
        run(problem.model, problem.guide, *problem.args)
        states.append(torch.rand(3))
    assert torch.equal(*states)


@each_gradient
def test_memory_of_chunks_does_not_grow_with_k(gradient):
    decoder = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 3))
    x = torch.randn(16, 3)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    def peak(k, chunk_size):
        """The most numbers that are kept for a backward pass at a time."""
        elbo = TraceIW_ELBO(num_particles=k, chunk_size=chunk_size, gradient=gradient)
        elbo.loss(model, guide, x)
        kept, most = weakref.WeakSet(), 0

        def pack(tensor):
            nonlocal most
            box = Box(tensor)
            kept.add(box)
            most = max(most, sum(b.tensor.numel() for b in kept))
            return box

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            elbo.differentiable_loss(model, guide, x).backward()
        return most

    assert peak(64, 8) < 1.2 * peak(16, 8)
    assert peak(64, None) > 3 * peak(16, None)


class Box:
    def __init__(self, tensor):
        self.tensor = tensor.detach()  # which would hold the graph that holds it


# --- in use


def test_in_svi_and_as_a_value():
    problem = PROBLEMS["modules"]()
    elbo = TraceIW_ELBO(num_particles=5)
    svi = SVI(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step(*problem.args) for _ in range(200)]
    assert sum(losses[-20:]) < sum(losses[:20])
    # its two modules share the name "linear" in Pyro's store, so that SVI found one of them
    for p in parameters_of(problem.model, problem.guide, problem.args):
        p.grad = None
    expected = value_and_gradient(elbo, problem)
    for twin in (copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
        loss, gradient = value_and_gradient(twin, problem)
        assert loss == expected[0]
        assert_equal_gradients(gradient, expected[1])


def test_chunks_are_not_compiled_and_say_why():
    problem = PROBLEMS["normal_normal"]()
    elbo = TraceIW_ELBO(num_particles=4, chunk_size=2)
    module = lvm.compile(elbo, problem.model, problem.guide)
    with pytest.warns(UserWarning, match=r"chunk_size= keeps memory flat in Python only"):
        module.initialize(*problem.args)
    assert torch.isfinite(module(*problem.args))


def dropout_pair():
    encoder = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x[:, None]).squeeze(-1), 1.0))

    return model, guide, encoder


def test_a_guide_with_dropout_is_refused_for_gradients_that_run_it_twice():
    model, guide, encoder = dropout_pair()
    x = torch.randn(5)
    with pytest.raises(ValueError, match=r"same density.*'z', as by dropout.*reparameterized"):
        TraceIW_ELBO(num_particles=2).loss(model, guide, x)
    TraceIW_ELBO(num_particles=2, gradient="reparameterized").loss(model, guide, x)
    encoder.eval()
    TraceIW_ELBO(num_particles=2).loss(model, guide, x)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_particles": 0}, "num_particles to be a positive integer"),
        ({"num_particles": 2, "gradient": "path"}, "gradient to be one of.*'path'"),
        ({"num_particles": 2, "chunk_size": 0}, "chunk_size to be a positive integer"),
    ],
)
def test_settings_that_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        TraceIW_ELBO(**settings)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("score_function", r"reparameterised sites.*\['y'\]"),
        ("semi_supervised", r"without enumerated sites.*\['y'\].*in the model"),
        ("guide_chain", "without enumerated sites"),
    ],
)
def test_what_is_refused(name, match):
    problem = PROBLEMS[name]()
    with pytest.raises(ValueError, match=match):
        TraceIW_ELBO(num_particles=2).loss(problem.model, problem.guide, *problem.args)


def test_a_program_that_does_not_broadcast_is_told_of_chunks_of_one():
    x = torch.randn(NUM_DATA, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = torch.stack([z[:, 0], z[:, 1]], -1)  # of N x 2 alone
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"Shape mismatch|invalid|broadcast|match") as error:
        TraceIW_ELBO(num_particles=3).loss(model, guide, x)
    assert "chunk_size=1" in "".join(error.value.__notes__)
    assert math.isfinite(TraceIW_ELBO(num_particles=3, chunk_size=1).loss(model, guide, x))
