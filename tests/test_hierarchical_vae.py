"""The VAE with layers of latents, against the closed form of a linear one."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.models import HierarchicalVAE
from pyro_lvm.nn import MLP, NormalHead

NUM_DATA, FEATURES, LOWER, UPPER = 8, 5, 3, 2

pytestmark = pytest.mark.usefixtures("float64")


def networks(**settings):
    encoders = [
        MLP(FEATURES, [6], head=NormalHead(LOWER)),
        MLP(LOWER, [6], head=NormalHead(UPPER)),
        MLP(UPPER, [6], head=NormalHead(1)),
    ]
    decoders = [
        MLP(LOWER, [6], head=NormalHead(FEATURES)),
        MLP(UPPER, [6], head=NormalHead(LOWER)),
        MLP(1, [6], head=NormalHead(UPPER)),
    ]
    return HierarchicalVAE(encoders, decoders, **settings)


def data(device="cpu"):
    return torch.randn(NUM_DATA, FEATURES, device=device)


class Linear(nn.Module):
    """N(A input + b, S), of vectors."""

    def __init__(self, weight, bias, covariance):
        super().__init__()
        self.weight, self.bias, self.covariance = weight, bias, covariance
        self.head = NormalHead(len(bias))

    def forward(self, x):
        return dist.MultivariateNormal(x @ self.weight.T + self.bias, self.covariance)


def linear(width):
    """z2 ~ N(0, I), z1 = A z2 + a + e, x = B z1 + b + d: all is Gaussian.

    The guide is the posterior, its standard deviations times ``width``.
    """
    upper = Linear(torch.randn(LOWER, UPPER), torch.randn(LOWER), 0.3 * torch.eye(LOWER))
    lower = Linear(torch.randn(FEATURES, LOWER), torch.randn(FEATURES), 0.5 * torch.eye(FEATURES))
    of_z1 = upper.weight @ upper.weight.T + upper.covariance
    of_x = lower.weight @ of_z1 @ lower.weight.T + lower.covariance
    loc_x = lower.weight @ upper.bias + lower.bias
    exact = dist.MultivariateNormal(loc_x, of_x)

    def posterior(layer, loc, prior, marginal):
        gain = prior @ layer.weight.T @ torch.linalg.inv(marginal)
        mean = layer.weight @ loc + layer.bias
        covariance = prior - gain @ layer.weight @ prior
        return Linear(gain, loc - gain @ mean, width**2 * (covariance + covariance.T) / 2)

    up = [
        posterior(lower, upper.bias, of_z1, of_x),
        posterior(upper, torch.zeros(UPPER), torch.eye(UPPER), of_z1),
    ]
    return HierarchicalVAE(up, [lower, upper]), exact


def test_the_exact_posterior_has_one_weight():
    (vae, exact), x = linear(1.0), data()
    terms = lvm.compute_terms(vae.model, vae.guide, x, num_particles=5)
    assert torch.allclose(terms.log_weight, exact.log_prob(x).expand(5, -1), rtol=1e-9)


def test_log_prob_by_importance_sampling():
    (vae, exact), x = linear(1.2), data()
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, x, num_samples=5000)
    assert (score.std_error > 0).all()
    assert ((score.log_prob - exact.log_prob(x)).abs() < 5 * score.std_error).all()


def test_draws_come_from_the_top():
    (vae, exact), n = linear(1.0), 20_000
    x = vae.sample(n)
    assert ((x.mean(0) - exact.mean).abs() < 5 * x.std(0) / math.sqrt(n)).all()
    centred = x - exact.mean
    products = torch.einsum("ni,nj->nij", centred, centred)
    error = (products.mean(0) - exact.covariance_matrix).abs()
    assert (error < 5 * products.std(0) / math.sqrt(n)).all()
    without_noise = vae.sample(n, mean=True) - exact.mean
    squares = without_noise.square()
    error = (squares.mean(0) - (exact.variance - 0.5)).abs()
    assert (error < 5 * squares.std(0) / math.sqrt(n)).all()


def bound_by_hand(vae, x):
    """Three layers, one draw of each."""
    q1 = vae.upwards[0](x)
    z1 = q1.rsample()
    q2 = vae.upwards[1](z1)
    z2 = q2.rsample()
    q3 = vae.upwards[2](z2)
    z3 = q3.rsample()
    kl = {
        "z1": q1.log_prob(z1) - vae.downwards[1](z2).log_prob(z1),
        "z2": q2.log_prob(z2) - vae.downwards[2](z3).log_prob(z2),
        "z3": q3.log_prob(z3) - dist.Normal(0.0, 1.0).log_prob(z3).sum(-1),
    }
    return vae.downwards[0](z1).log_prob(x), kl


@pytest.mark.parametrize("make", [Trace_ELBO, lvm.TraceInfo_ELBO])
def test_bound_by_hand(make, device):
    vae, x = networks().to(device), data(device)
    parameters = list(vae.parameters())
    pyro.set_rng_seed(3)
    loss = make(max_plate_nesting=1).differentiable_loss(vae.model, vae.guide, x)
    gradient = torch.autograd.grad(loss, parameters)
    pyro.set_rng_seed(3)
    log_likelihood, kl = bound_by_hand(vae, x)
    expected = (sum(kl.values()) - log_likelihood).sum()
    assert torch.allclose(loss, expected, rtol=1e-10)
    for ours, theirs in zip(gradient, torch.autograd.grad(expected, parameters), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


def test_each_layer_is_a_part():
    vae, x = networks(), data()
    elbo = lvm.TraceInfo_ELBO(max_plate_nesting=1)
    elbo.check_pair(vae.model, vae.guide, (x,))
    pyro.set_rng_seed(3)
    _, parts = elbo.loss_and_parts(vae.model, vae.guide, x)
    pyro.set_rng_seed(3)
    log_likelihood, kl = bound_by_hand(vae, x)
    assert torch.allclose(parts["reconstruction"], log_likelihood.mean(), rtol=1e-10)
    for name, value in kl.items():
        assert torch.allclose(parts[f"kl[{name}]"], value.mean(), rtol=1e-10)


@pytest.mark.parametrize("sites", [["z1"], ["z3"], ["z1", "z2", "z3"]])
def test_divergences_compare_the_layers_that_are_named(sites):
    vae, x = networks(), data()
    seen = []

    def divergence(q, p):
        seen.append((q.shape, p.shape))
        return (q.mean(0) - p.mean(0)).square().sum()

    elbo = lvm.TraceInfo_ELBO(alpha=0.5, lambda_=3.0, divergence=divergence, sites=sites)
    loss, parts = elbo.loss_and_parts(vae.model, vae.guide, x)
    sizes = {"z1": LOWER, "z2": UPPER, "z3": 1}
    shape = (NUM_DATA, sum(sizes[name] for name in sites))
    assert seen == [(shape, shape)]
    total = -parts["reconstruction"] + 2.5 * parts["divergence"]
    total = total + 0.5 * sum(parts[f"kl[z{layer}]"] for layer in (1, 2, 3))
    assert torch.allclose(loss.detach() / NUM_DATA, total, rtol=1e-9)


def test_missing_entries_do_not_count():
    vae, x = networks(), data()
    mask = torch.rand(x.shape) < 0.6
    pyro.set_rng_seed(3)
    terms = lvm.compute_terms(vae.model, vae.guide, x, mask, max_plate_nesting=1)
    pyro.set_rng_seed(3)
    z1 = vae.upwards[0](x).sample()
    likelihood = vae.downwards[0](z1).base_dist.log_prob(x)
    expected = (likelihood * mask).sum(-1)
    assert torch.allclose(terms.log_likelihood[0], expected, rtol=1e-10)


def test_shapes_and_reconstruction(device):
    vae, x = networks().to(device), data(device)
    assert vae.num_layers == 3
    expected = vae.downwards[0](vae.upwards[0](x).mean).mean
    assert torch.equal(vae.reconstruct(x), expected)
    for found in (vae.sample(4), vae.sample(4, mean=True)):
        assert found.shape == (4, FEATURES)
        assert found.device.type == device
        assert not found.requires_grad


def test_it_is_trained_saved_and_copied(tmp_path):
    vae, x = networks(plate="rows"), 2 + data()
    fit = lvm.fit(
        vae.model,
        vae.guide,
        x,
        plate="rows",
        epochs=15,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02),
        seed=0,
    )
    assert fit.history["loss"][-1] < fit.history["loss"][0]
    lvm.save(vae, tmp_path / "vae")
    for other in (lvm.load(tmp_path / "vae"), copy.deepcopy(vae)):
        assert torch.equal(other.reconstruct(x), vae.reconstruct(x))
        assert other.plate == "rows"


def test_the_prior_can_be_given_or_found():
    base = networks()
    up = [lambda v, e=e: e(v) for e in base.upwards]
    vae = HierarchicalVAE([Plain(f) for f in up], list(base.downwards))
    with pytest.raises(ValueError, match="shape of z"):
        vae.sample(3)
    vae.model(data())
    assert vae.prior_distribution().event_shape == (1,)
    prior = dist.Normal(torch.full((1,), 5.0), 0.1).to_event(1)
    far = networks(prior=prior)
    trace = pyro.poutine.trace(far.model).get_trace(data())
    assert (trace.nodes["z3"]["value"] > 4).all()


class Plain(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, v):
        return self.function(v)


@pytest.mark.parametrize(
    ("up", "down", "match"),
    [(1, 1, "at least two layers"), (2, 3, "got 2 and 3"), (0, 0, "got 0 and 0")],
)
def test_layers_that_do_not_fit_are_refused(up, down, match):
    network = MLP(2, [], head=NormalHead(2))
    with pytest.raises(ValueError, match=match):
        HierarchicalVAE([network] * up, [network] * down)


def test_data_and_priors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one datum"):
        networks().model(data()[:0])
    with pytest.raises(ValueError, match="batch shape"):
        networks(prior=dist.Normal(torch.zeros(2), 1.0))
