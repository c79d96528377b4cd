"""One table of objectives, and what all of them keep: gradients, compilation, names of parts."""

import copy
import shutil

import pyro
import pytest
import torch
from problems import NUM_DATA, PROBLEMS
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.func import functional_call

import pyro_lvm as lvm
from pyro_lvm.pair import parameters_of

pytestmark = pytest.mark.usefixtures("float64")


class Discriminator(nn.Module):
    """Smooth, and of any number of features up to 8."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 5), nn.Linear(5, 1)

    def forward(self, z):
        padded = nn.functional.pad(z, (0, 8 - z.shape[1]))
        return self.last(torch.tanh(self.first(padded)))


def info(divergence, **settings):
    return lvm.TraceInfo_ELBO(alpha=0.3, lambda_=2.0, divergence=divergence, **settings)


OBJECTIVES = {
    "elbo": lvm.TraceInfo_ELBO,
    "beta": lambda: lvm.TraceInfo_ELBO(kl_weight=2.5),
    "warm-up": lambda: lvm.TraceInfo_ELBO(kl_weight=lvm.LinearSchedule(0.5, 1.0, steps=7)),
    "free bits": lambda: lvm.TraceInfo_ELBO(free_bits=0.7),
    "mmd": lambda: info(lvm.MMD()),
    "mmd, rbf, v": lambda: info(lvm.MMD(lvm.divergences.RBF(), estimator="v")),
    "mmd, linear": lambda: info(lvm.MMD(estimator="linear")),
    "mmd, median": lambda: info(lvm.MMD(median_heuristic=True)),
    "sliced": lambda: info(lvm.SlicedWasserstein(7)),
    "adversarial": lambda: info(lvm.Adversarial(Discriminator())),
    "adversarial, minimax": lambda: info(lvm.Adversarial(Discriminator(), generator="minimax")),
    "adversarial, kl": lambda: info(lvm.Adversarial(Discriminator(), objective="kl")),
    "stein": lambda: info(lvm.Stein()),
    "stein, particles": lambda: info(lvm.Stein(), num_particles=2, vectorize_particles=True),
    "sliced, particles": lambda: info(lvm.SlicedWasserstein(3), num_particles=2),
    "iwae": lambda: lvm.TraceIW_ELBO(num_particles=4, gradient="reparameterized"),
    "iwae, stl": lambda: lvm.TraceIW_ELBO(num_particles=4, gradient="stl"),
    "iwae, dreg": lambda: lvm.TraceIW_ELBO(num_particles=4),
    "implicit, mmd": lambda: lvm.ImplicitDivergence(lvm.MMD()),
    "implicit, sliced": lambda: lvm.ImplicitDivergence(lvm.SlicedWasserstein(7)),
    "implicit, adversarial": lambda: lvm.ImplicitDivergence(lvm.Adversarial(Discriminator())),
    "implicit, penalty": lambda: lvm.ImplicitDivergence(
        lvm.Adversarial(Discriminator(), gradient_penalty=2.0)
    ),
}
# the gradient of these is that of their value, under fixed random numbers
EXACT = ("elbo", "beta", "warm-up", "free bits", "mmd", "mmd, rbf, v", "mmd, linear", "sliced")
EXACT += ("sliced, particles", "iwae", "implicit, mmd", "implicit, sliced")
WORDS = {"loss", "reconstruction", "divergence", "discriminator", "free_bits", "weighting"}
WORDS |= {"accuracy/draws", "accuracy/data", "penalty"}
WORDS |= {"alpha", "lambda", "kl_weight", "kl[z]", "kl[w]", "kl[global]", "kl[a]", "kl[logit]"}
SUITABLE = ("normal_normal", "modules", "global_and_local", "nested_masked", "mixture_prior")
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
each_suitable = pytest.mark.parametrize("name", SUITABLE)


def pair_and_objective(name, objective):
    problem, elbo = PROBLEMS[name](), OBJECTIVES[objective]()
    guide = None if isinstance(elbo, lvm.ImplicitDivergence) else problem.guide
    if guide is None and name in ("global_and_local", "nested_masked"):
        pytest.skip("a story without parameters")
    return problem.model, guide, problem.args, elbo


def warm(elbo, model, guide, args):
    """Pyro's objectives draw random numbers of their own in their first run."""
    elbo.loss(model, guide, *args)


@each_objective
@each_suitable
def test_compiled_loss_has_the_value_the_gradient_and_the_parts_of_python(name, objective):
    model, guide, args, elbo = pair_and_objective(name, objective)
    module = lvm.compile(elbo, model, guide, backend=lambda graph, _: graph).initialize(*args)
    if objective == "implicit, penalty":  # a derivative of a derivative: seen, and left to Python
        assert "gradient" in module.fallback_reason
    else:
        assert module.fallback_reason is None
    parameters = list(module.parameters())
    for seed in (1, 2):
        results = []
        for run in (module.loss_and_parts, lambda *a: elbo.loss_and_parts(model, guide, *a)):
            pyro.set_rng_seed(seed)
            loss, parts = run(*args)
            gradient = torch.autograd.grad(loss, trained(parameters), materialize_grads=True)
            results.append((loss.detach(), parts, gradient))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert any(g.abs().max() > 0 for g in gradient)


def trained(parameters):
    return [p for p in parameters if p.requires_grad]


@each_objective
@each_suitable
def test_parts_are_called_by_the_same_words_and_are_per_datum(name, objective):
    model, guide, args, elbo = pair_and_objective(name, objective)
    loss, parts = elbo.loss_and_parts(model, guide, *args)
    assert set(parts) <= WORDS
    size = 30 if name == "global_and_local" else NUM_DATA
    torch.testing.assert_close(loss.detach(), size * parts["loss"])
    assert not any(p.requires_grad for p in parts.values())
    weights = {"alpha", "lambda", "kl_weight"} & set(parts)
    assert weights == ({"kl_weight"} if objective == "warm-up" else set())


@pytest.mark.parametrize("objective", EXACT)
@each_suitable
def test_gradient_equals_finite_differences(name, objective):
    step = 1e-5
    model, guide, args, elbo = pair_and_objective(name, objective)
    warm(elbo, model, guide, args)

    def loss():
        pyro.set_rng_seed(1)
        return elbo.differentiable_loss(model, guide, *args)

    parameters = loss_parameters(model, guide, args)
    gradients = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    for p, gradient in zip(parameters, gradients, strict=True):
        flat = p.data.view(-1)
        for i in range(min(len(flat), 2)):
            values = []
            for sign in (1, -1):
                flat[i] += sign * step
                values.append(loss().item())
                flat[i] -= sign * step
            expected = (values[0] - values[1]) / (2 * step)
            found = gradient.reshape(-1)[i].item()
            assert found == pytest.approx(expected, rel=2e-5, abs=2e-5)


def loss_parameters(model, guide, args):
    if guide is not None:
        return parameters_of(model, guide, args)
    return parameters_of(model, lvm.ImplicitDivergence(lvm.MMD()).guide_of(model), args)


@pytest.mark.parametrize("kind", ["adversarial", "adversarial, minimax", "adversarial, kl"])
def test_gradient_of_an_adversarial_objective_by_hand(kind):
    """Of the surrogate at the discriminator as it is, by every parameter of the pair."""
    model, guide, args, elbo = pair_and_objective("normal_normal", kind)
    warm(elbo, model, guide, args)
    parameters = parameters_of(model, guide, args)
    pyro.set_rng_seed(1)
    loss = elbo.differentiable_loss(model, guide, *args)
    ours = torch.autograd.grad(loss, parameters)
    pyro.set_rng_seed(1)
    plain = lvm.TraceInfo_ELBO(alpha=0.3, lambda_=0.7)
    warm(plain, model, guide, args)
    pyro.set_rng_seed(1)
    theirs = torch.autograd.grad(plain.differentiable_loss(model, guide, *args), parameters)
    pyro.set_rng_seed(1)
    q = pyro.param("slope") * args[0] + pyro.param("scale") * torch.randn(NUM_DATA)
    frozen = {n: p.detach() for n, p in elbo.divergence.discriminator.named_parameters()}
    t = functional_call(elbo.divergence.discriminator, frozen, (q[:, None],)).squeeze(-1)
    surrogate = {
        "adversarial": -nn.functional.logsigmoid(t).mean() / 2,
        "adversarial, minimax": nn.functional.logsigmoid(-t).mean() / 2,
        "adversarial, kl": -t.mean(),
    }[kind]
    added = torch.autograd.grad(1.3 * NUM_DATA * surrogate, parameters, materialize_grads=True)
    for mine, other, more in zip(ours, theirs, added, strict=True):
        torch.testing.assert_close(mine, other + more)


@each_objective
def test_objective_is_copied_and_trains_in_svi(objective):
    model, guide, args, elbo = pair_and_objective("normal_normal", objective)
    twin = copy.deepcopy(elbo)
    svi = SVI(model, guide or (lambda x: None), pyro.optim.Adam({"lr": 0.05}), twin)
    before = [p.detach().clone() for p in loss_parameters(model, guide, args)]
    for _ in range(3):
        svi.step(*args)
    after = loss_parameters(model, guide, args)
    assert any((p != old).any() for p, old in zip(after, before, strict=True))
    assert all(p.isfinite().all() for p in after)


@pytest.mark.parametrize("objective", [n for n in OBJECTIVES if not n.startswith("implicit")])
def test_autoguides(objective):
    model, _, args, elbo = pair_and_objective("normal_normal", objective)
    guide = AutoNormal(model)
    guide(*args)
    loss = elbo.differentiable_loss(model, guide, *args)
    gradient = torch.autograd.grad(loss, list(guide.parameters()))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradient)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@each_objective
def test_objective_through_the_compiler(objective):
    """By Inductor, with two threads, whose code differs from that of one."""
    model, guide, args, elbo = pair_and_objective("normal_normal", objective)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        module = lvm.compile(elbo, model, guide).initialize(*args)
        assert module.fallback_reason is None
        step = lvm.CompiledStep(elbo, model, guide)
        assert step(*args).isfinite().all()
        assert step.fallback_reason is None
    finally:
        torch.set_num_threads(threads)
