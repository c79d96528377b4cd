"""What Pyro and torch do in Python behind the operations is in the recordings too."""

import copy
import shutil
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import constraints
from torch.distributions.utils import _standard_normal

import pyro_lvm as lvm
from pyro_lvm.compiled.recordable import recordable
from pyro_lvm.compiled.tracing import trace


def as_recorded(graph, inputs):
    """A backend that runs what was recorded as it is."""
    return graph


def no_backend(graph, inputs):
    raise RuntimeError("no compiler here")


def losses_and_gradients(model, guide, x, elbo=None, seeds=(1, 2)):
    """Recorded, and by Python; with the reason if nothing was recorded."""
    elbo = elbo or Trace_ELBO()
    results, reasons = [], []
    for backend in (as_recorded, no_backend):
        module = lvm.compile(elbo, model, guide, backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.initialize(x)
        reasons.append(module.fallback_reason)
        found = []
        for seed in seeds:
            pyro.set_rng_seed(seed)
            loss = module(x)
            found.append((loss.detach(), torch.autograd.grad(loss, list(module.parameters()))))
        results.append(found)
    return results, reasons[0]


def positive(name, *values):
    return pyro.param(name, torch.tensor(values), constraint=constraints.positive)


# What the guide samples from, given a positive parameter; three values for those over a simplex.
LATENTS = {
    "Dirichlet": lambda: dist.Dirichlet(positive("s", 0.5, 1.5, 3.0)),
    "Beta": lambda: dist.Beta(positive("s", 0.7), positive("t", 2.0)),
    "Gamma": lambda: dist.Gamma(positive("s", 0.7), positive("t", 2.0)),
    "Laplace": lambda: dist.Laplace(0.1, positive("s", 0.7)),
    "StudentT": lambda: dist.StudentT(positive("d", 4.0), 0.1, positive("s", 0.7)),
    "LogNormal": lambda: dist.LogNormal(0.1, positive("s", 0.7)),
    "Kumaraswamy": lambda: dist.Kumaraswamy(positive("s", 0.7), positive("t", 2.0)),
    "MultivariateNormal": lambda: dist.MultivariateNormal(
        torch.zeros(2), scale_tril=positive("s", 0.7) * torch.eye(2)
    ),
    "Binomial": lambda: dist.Binomial(5, positive("s", 0.7) / (1 + positive("s", 0.7))),
    "Poisson": lambda: dist.Poisson(positive("s", 0.7)),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(
        torch.tensor(0.7), positive("s", 0.2, 0.3, 0.5)
    ),
}


@pytest.mark.parametrize("name", LATENTS)
def test_latents_of_many_kinds(float64, name):
    def guide(x):
        with pyro.plate("data", len(x)):
            latent = LATENTS[name]()
            shape = (len(x),) if latent.batch_shape in ((), (1,)) else latent.batch_shape
            return pyro.sample("z", latent.expand(shape))

    def model(x):
        with pyro.plate("data", len(x)):
            z = guide_sites_prior(x)
            loc = z if z.dim() == 1 else z.square().sum(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide_sites_prior(x):
        with pyro.poutine.block(hide_types=["param"]):
            latent = FIXED[name]()
        return pyro.sample("z", latent.expand((len(x),)))

    (recorded, python), reason = losses_and_gradients(model, guide, torch.randn(6))
    assert reason is None
    torch.testing.assert_close(recorded, python, rtol=1e-9, atol=1e-9)


# Priors with the supports of these guides.
FIXED = {
    "Dirichlet": lambda: dist.Dirichlet(torch.ones(3)),
    "Beta": lambda: dist.Beta(1.5, 1.5),
    "Gamma": lambda: dist.Gamma(1.5, 1.5),
    "Laplace": lambda: dist.Laplace(0.0, 1.0),
    "StudentT": lambda: dist.Normal(0.0, 1.0),
    "LogNormal": lambda: dist.Gamma(1.5, 1.5),
    "Kumaraswamy": lambda: dist.Beta(1.5, 1.5),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "Binomial": lambda: dist.Binomial(5, torch.tensor(0.3)),
    "Poisson": lambda: dist.Poisson(1.5),
    "RelaxedOneHotCategorical": lambda: dist.Dirichlet(torch.ones(3)),
}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_two_draws_of_one_distribution_are_two_when_compiled():
    def guide(x):
        latent = dist.Dirichlet(positive("s", 0.5, 1.5, 3.0))
        pyro.sample("a", latent)
        pyro.sample("b", latent)

    def model(x):
        a, b = (pyro.sample(name, dist.Dirichlet(torch.ones(3))) for name in "ab")
        pyro.factor("apart", (a - b).abs().sum().log())  # of equal draws it is not finite

    pyro.set_rng_seed(0)
    step = lvm.CompiledStep(Trace_ELBO(), model, guide)
    assert step(torch.zeros(1)).isfinite().all()
    assert step.fallback_reason is None


def test_what_stands_under_no_grad_is_a_constant(float64):
    class Scaled(nn.Module):
        """The scale of the data, followed in a buffer, and a baseline without a gradient."""

        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([[0.5, -0.3]]))
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            shift = self.loc * x  # with a gradient
            with torch.no_grad():
                assert self.loc.add_(0.0) is self.loc  # as in-place operations return it
                constant = self.loc.square()
                view = self.loc.mT  # an attribute
                self.mean.mul_(0.9).add_(0.1 * shift.mean())
                assert self.loc.requires_grad
            return shift + constant + view.squeeze(-1) + self.mean

    network = Scaled()

    def model(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            loc = network(x)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    x = torch.randn(5, 2)
    for backend in (as_recorded, no_backend):
        module = lvm.compile(Trace_ELBO(), model, None, backend=backend)
        twin = copy.deepcopy(network)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.initialize(x)
        assert (module.fallback_reason is None) == (backend is as_recorded)
        for _ in range(3):  # a buffer that kept a gradient would be an error in the second step
            network.loc.grad = None
            module(x).backward()
            loc = twin(x)
            loss = -dist.Normal(loc, 1.0).log_prob(x).sum()
            (gradient,) = torch.autograd.grad(loss, twin.loc)
            torch.testing.assert_close(network.loc.grad, gradient)
            torch.testing.assert_close(network.mean, twin.mean)
            assert not network.mean.requires_grad
        with torch.no_grad():
            network.mean.zero_()


def test_labels_as_one_hot_vectors(float64):
    def model(x, y):
        slope = pyro.param("slope", torch.tensor([0.5, -0.3, 0.2]))
        with pyro.plate("data", len(x)):
            loc = (F.one_hot(y, 3) * slope).sum(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x, y = torch.randn(5), torch.tensor([0, 2, 1, 2, 0])
    step = lvm.CompiledStep(
        Trace_ELBO(), model, None, lambda p: torch.optim.SGD(p, lr=0.0), backend=as_recorded
    )
    for labels in (y, y.flip(0), y.roll(1)):  # one recording for all
        slope = torch.tensor([0.5, -0.3, 0.2])[labels]
        torch.testing.assert_close(step(x, labels)[0], -dist.Normal(slope, 1.0).log_prob(x).sum())
    assert step.fallback_reason is None


def test_one_hot_vectors_without_a_number_of_classes_are_python_s():
    def model(x, y):
        slope = pyro.param("slope", torch.tensor([0.5, -0.3, 0.2]))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal((F.one_hot(y) * slope).sum(-1), 1.0), obs=x)

    step = lvm.CompiledStep(Trace_ELBO(), model, None, backend=as_recorded)
    with pytest.warns(UserWarning, match="looks at the value of a tensor"):
        step(torch.randn(3), torch.tensor([0, 2, 1]))


class Doubled(torch.autograd.Function):
    """A gradient that is not that of its forward pass."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Halved(torch.autograd.Function):
    """A gradient that is that of its forward pass, written by hand."""

    @staticmethod
    def forward(ctx, x):
        return x * 0.5

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


def test_gradients_by_hand(float64):
    def model(x):
        loc = Halved.apply(pyro.param("loc", torch.tensor(0.5)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    (recorded, python), reason = losses_and_gradients(model, None, torch.randn(4))
    assert reason is None
    torch.testing.assert_close(recorded, python)


def test_weights_in_tensors_on_enumerated_sites(float64):
    weight = torch.tensor(0.5)

    def model(x):
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=weight):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    module = lvm.compile(elbo, model, None, backend=as_recorded)
    x = torch.randn(5)
    for value in (0.5, 0.25):
        weight.fill_(value)
        expected = elbo.differentiable_loss(model, lambda x: None, x)
        torch.testing.assert_close(module(x), expected)
    assert module.fallback_reason is None


def test_gradients_that_python_alone_knows_are_python_s():
    def model(x):
        loc = Doubled.apply(pyro.param("loc", torch.tensor(0.5)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    (recorded, python), reason = losses_and_gradients(model, None, torch.randn(4))
    assert "a gradient () differs from Python's" in reason
    torch.testing.assert_close(recorded, python)


def test_operations_without_a_gradient_are_python_s():
    def model(x):
        scale = pyro.param("scale", torch.tensor(0.5)).expand(4)
        loc = torch._sample_dirichlet(scale)  # raises where a gradient goes through it
        loc = loc.detach() if not torch._C._get_tracing_state() else loc
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc + scale, 1.0), obs=x)

    (recorded, python), reason = losses_and_gradients(model, None, torch.randn(4))
    assert "_sample_dirichlet is not implemented" in reason
    torch.testing.assert_close(recorded, python)


def test_normal_draws_are_one_operation(float64):
    def draw(loc):
        return [loc + _normal((3,), loc), dist.Normal(loc, 1.0).rsample((2,))]

    def _normal(shape, like):
        with pyro.validation_enabled(False):
            return dist.Normal(torch.zeros(shape).to(like), 1.0).rsample()

    loc = torch.tensor(0.5)
    graph, constants = trace(draw, [], [loc])
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("randn" in name for name in names) == 2
    pyro.set_rng_seed(5)
    recorded = graph(*constants, loc)
    pyro.set_rng_seed(5)
    torch.testing.assert_close(recorded, draw(loc))


def test_a_logarithm_at_zero_has_a_finite_gradient(float64):
    from pyro.ops.special import safe_log

    x = torch.tensor([0.0, 0.3, 2.0], requires_grad=True)
    (expected,) = torch.autograd.grad(safe_log(x), x, torch.ones(3))
    assert expected.isfinite().all()
    with recordable():
        from pyro.ops import special

        value = special.safe_log(x)
    torch.testing.assert_close(value, x.log())
    (gradient,) = torch.autograd.grad(value, x, torch.ones(3))
    torch.testing.assert_close(gradient, expected)


def test_nothing_stays_behind():
    before = (
        torch._C._get_tracing_state,
        dist.Dirichlet.rsample,
        torch.autograd.Function.__dict__["apply"],
    )
    with pytest.raises(ZeroDivisionError), recordable():
        raise ZeroDivisionError
    assert before == (
        torch._C._get_tracing_state,
        dist.Dirichlet.rsample,
        torch.autograd.Function.__dict__["apply"],
    )
    pyro.set_rng_seed(0)
    first = _standard_normal((2,), torch.float32, "cpu")
    pyro.set_rng_seed(0)
    assert torch.equal(first, torch.empty(2).normal_())


def test_analytic_kl_of_a_dirichlet(float64):
    def guide(x):
        pyro.sample("z", dist.Dirichlet(positive("s", 0.5, 1.5, 3.0)))

    def model(x):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Categorical(z), obs=x)

    x = torch.tensor([0, 0, 1, 2])
    (recorded, python), reason = losses_and_gradients(model, guide, x, TraceMeanField_ELBO())
    assert reason is None
    torch.testing.assert_close(recorded, python, rtol=1e-9, atol=1e-9)
