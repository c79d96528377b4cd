"""Mixtures of equal weights, and the prior that is one of posteriors."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.distributions import EqualMixture
from pyro_lvm.models import VAE
from pyro_lvm.nn import MLP, NormalHead, VampPrior

NUM_DATA, FEATURES, LATENTS, COMPONENTS = 8, 4, 2, 3

pytestmark = pytest.mark.usefixtures("float64")

# name -> components with batch shape K
KINDS = {
    "vectors of normals": lambda k: dist.Normal(
        2 * torch.randn(k, 3), 0.5 + torch.rand(k, 3)
    ).to_event(1),
    "normals": lambda k: dist.Normal(2 * torch.randn(k), 0.5 + torch.rand(k)),
    "matrices of Laplace": lambda k: dist.Laplace(torch.randn(k, 2, 2), 1.0).to_event(2),
    "correlated": lambda k: dist.MultivariateNormal(
        torch.randn(k, 3), scale_tril=torch.eye(3) + torch.ones(3, 3).tril(-1)
    ),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


def of(components, k):
    """One component, built anew."""
    if isinstance(components, torch.distributions.Independent):
        dims = components.reinterpreted_batch_ndims
        return of(components.base_dist, k).to_event(dims)
    if isinstance(components, torch.distributions.MultivariateNormal):
        return dist.MultivariateNormal(components.loc[k], scale_tril=components.scale_tril[k])
    return type(components)(components.loc[k], components.scale[k])


@every_kind
def test_log_prob_is_the_mean_over_components(make):
    components = make(COMPONENTS)
    mixture = EqualMixture(components)
    value = torch.randn((5, 7, *mixture.event_shape))
    parts = [of(components, k).log_prob(value).exp() for k in range(COMPONENTS)]
    assert torch.allclose(mixture.log_prob(value), (sum(parts) / COMPONENTS).log(), rtol=1e-9)
    wide = mixture.expand([7])
    assert wide.batch_shape == (7,)
    assert torch.allclose(wide.log_prob(value), mixture.log_prob(value))
    single = torch.randn(mixture.event_shape)
    assert torch.allclose(wide.log_prob(single), mixture.log_prob(single).expand(7))


@every_kind
@pytest.mark.parametrize("method", ["sample", "rsample"])
def test_draws_have_its_mean_and_variance(make, method):
    mixture, n = EqualMixture(make(COMPONENTS)), 30_000
    for draws in (
        getattr(mixture, method)((n,)),
        getattr(mixture.expand([n]), method)(),
        getattr(mixture.expand([2]), method)((n // 2,)).reshape((n, *mixture.event_shape)),
    ):
        assert draws.shape == (n, *mixture.event_shape)
        assert ((draws.mean(0) - mixture.mean).abs() < 5 * draws.std(0) / math.sqrt(n)).all()
        squares = (draws - mixture.mean).square()
        error = (squares.mean(0) - mixture.variance).abs()
        assert (error < 5 * squares.std(0) / math.sqrt(n)).all()


def test_a_batch_of_mixtures():
    components = dist.Normal(2 * torch.randn(4, COMPONENTS, 3), 0.5).to_event(1)
    mixture, n = EqualMixture(components), 20_000
    assert mixture.batch_shape == (4,)
    value = torch.randn(4, 3)
    expected = components.log_prob(value.unsqueeze(1)).logsumexp(-1) - math.log(COMPONENTS)
    assert torch.allclose(mixture.log_prob(value), expected, rtol=1e-9)
    draws = mixture.sample((n,))
    error = (draws.mean(0) - components.mean.mean(1)).abs()
    assert (error < 5 * draws.std(0) / math.sqrt(n)).all()


@every_kind
def test_draws_are_reparameterised(make):
    """The gradient of E[sum z] by a shift of all components is that of a shift of z."""
    components = make(COMPONENTS)
    base = components.base_dist if hasattr(components, "base_dist") else components
    shift = torch.zeros((), requires_grad=True)
    arguments = {"scale_tril": base.scale_tril} if hasattr(base, "scale_tril") else {}
    if not arguments:
        arguments = {"scale": base.scale}
    moved = type(base)(base.loc + shift, **arguments)
    moved = moved.to_event(components.event_dim - base.event_dim)
    mixture = EqualMixture(moved)
    assert mixture.has_rsample
    (gradient,) = torch.autograd.grad(mixture.rsample((6,)).sum(), shift)
    assert float(gradient) == 6 * mixture.event_shape.numel()
    assert not mixture.sample((6,)).requires_grad


def test_discrete_components_are_not_reparameterised():
    mixture = EqualMixture(dist.Bernoulli(torch.tensor([0.1, 0.9])))
    assert not mixture.has_rsample
    assert mixture.support is dist.constraints.boolean
    x = torch.tensor([0.0, 1.0])
    assert torch.allclose(mixture.log_prob(x), torch.tensor(0.5).log().expand(2))
    assert set(mixture.sample((50,)).tolist()) == {0.0, 1.0}
    with pytest.raises(ValueError, match="batch shape"):
        EqualMixture(dist.Bernoulli(torch.tensor(0.1)))


def test_it_validates_values():
    mixture = EqualMixture(dist.Bernoulli(torch.tensor([0.1, 0.9])), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        mixture.log_prob(torch.tensor(0.5))


# -------------------------------------------------------------------------------- VampPrior


def networks():
    encoder = MLP(FEATURES, [6], head=NormalHead(LATENTS))
    return encoder, MLP(LATENTS, [6], head=NormalHead(FEATURES))


def vamp_vae(**settings):
    encoder, decoder = networks()
    return VAE(encoder, decoder, prior=VampPrior(encoder, COMPONENTS, FEATURES, **settings))


def data(device="cpu"):
    return torch.randn(NUM_DATA, FEATURES, device=device)


def loss_by_hand(vae, x):
    """- sum_i log p(x | z) - log q(z | x) + log mean_k q(z | u_k), by loops."""
    q = vae.encoder(x)
    z = q.rsample()
    log_prior = torch.stack(
        [vae.encoder(u).log_prob(z) for u in vae.prior.pseudo_inputs]
    ).logsumexp(0) - math.log(COMPONENTS)
    return (q.log_prob(z) - log_prior - vae.decoder(z).log_prob(x)).sum()


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("make", [Trace_ELBO, lvm.TraceInfo_ELBO])
def test_bound_and_gradient(make, bounds, device):
    """Of shared parameters the gradient is the sum of both uses."""
    vae, x = vamp_vae(bounds=bounds).to(device), data(device)
    parameters = list(vae.parameters())
    assert len(parameters) == len({id(p) for p in parameters}) == 4 + 4 + 1
    pyro.set_rng_seed(3)
    loss = make(max_plate_nesting=1).differentiable_loss(vae.model, vae.guide, x)
    gradient = torch.autograd.grad(loss, parameters)
    pyro.set_rng_seed(3)
    expected = loss_by_hand(vae, x)
    assert torch.allclose(loss, expected, rtol=1e-10)
    for ours, theirs in zip(gradient, torch.autograd.grad(expected, parameters), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_step_of_svi_is_one_step_of_shared_parameters():
    vae, x = vamp_vae(), data()
    parameters = list(vae.parameters())
    pyro.set_rng_seed(3)
    gradient = torch.autograd.grad(loss_by_hand(vae, x), parameters)
    expected = [p.detach() - 0.01 * g for p, g in zip(parameters, gradient, strict=True)]
    pyro.set_rng_seed(3)
    optimizer = pyro.optim.SGD({"lr": 0.01})
    SVI(vae.model, vae.guide, optimizer, Trace_ELBO(max_plate_nesting=1)).step(x)
    for found, value in zip(parameters, expected, strict=True):
        assert torch.allclose(found, value, rtol=1e-10)
    assert vae.encoder is vae.prior.encoder


def test_the_optimiser_sees_each_parameter_once():
    vae, x = vamp_vae(), data()
    found = lvm.pair.parameters_of(vae.model, vae.guide, (x,))
    assert len(found) == len({id(p) for p in found}) == 9
    seen = []

    def optimizer(parameters):
        seen.extend(parameters)
        return torch.optim.SGD(seen, lr=0.1)

    lvm.fit(vae.model, vae.guide, x, epochs=1, optimizer=optimizer)
    assert len(seen) == len({id(p) for p in seen}) == 9


def test_it_is_a_prior_without_batch_shape(device):
    vae = vamp_vae(bounds=(0.0, 1.0)).to(device)
    prior = vae.prior_distribution()
    assert isinstance(prior, EqualMixture)
    assert prior.batch_shape == ()
    assert vae.sample(5).shape == (5, FEATURES)
    assert vae.sample(5).device.type == device
    u = vae.prior.pseudo_inputs
    assert u.shape == (COMPONENTS, FEATURES)
    assert ((u >= 0) & (u <= 1)).all()
    assert "bounds=(0.0, 1.0)" in repr(vae.prior)


def test_pseudo_inputs_are_cut_off_and_start_at_data():
    vae, x = vamp_vae(bounds=(0.0, 1.0)), torch.rand(20, FEATURES)
    with torch.no_grad():
        vae.prior.raw_inputs.fill_(2.0)
    assert (vae.prior.pseudo_inputs == 1).all()
    prior = vae.prior.initialize(x)
    assert prior is vae.prior
    u = prior.pseudo_inputs
    assert all((x == row).all(-1).any() for row in u)
    assert len(torch.unique(u, dim=0)) == COMPONENTS
    for wrong in (x[:2], x[:, :3]):
        with pytest.raises(ValueError, match="at least 3 data of shape"):
            prior.initialize(wrong)


def test_saving_and_copying_keep_what_is_shared(tmp_path):
    vae, x = vamp_vae(bounds=(0.0, 1.0)), data()
    vae.prior.initialize(torch.rand(20, FEATURES))
    lvm.save(vae, tmp_path / "vae")
    built = VAE(*networks())
    built.prior = VampPrior(built.encoder, COMPONENTS, FEATURES, bounds=(0.0, 1.0))
    lvm.load(tmp_path / "vae", into=built)
    others = [lvm.load(tmp_path / "vae"), copy.deepcopy(vae), built]
    for other in others:
        assert other.prior.encoder is other.encoder
        assert other.encoder is not vae.encoder
        assert len(list(other.parameters())) == 9
        pyro.set_rng_seed(3)
        expected = loss_by_hand(vae, x)
        pyro.set_rng_seed(3)
        assert loss_by_hand(other, x) == expected
    lvm.fit(others[0].model, others[0].guide, x, epochs=2)
    assert others[0].prior.encoder is others[0].encoder


def test_divergences_learn_pseudo_inputs_by_draws():
    """The choice of a component has equal, not learned, weights: nothing is missing."""
    vae, x = vamp_vae(), data()
    elbo = lvm.TraceInfo_ELBO(alpha=0.5, lambda_=3.0, divergence=lvm.MMD())
    elbo.check_pair(vae.model, vae.guide, (x,))
    loss = elbo.differentiable_loss(vae.model, vae.guide, x)
    gradient = torch.autograd.grad(loss, list(vae.parameters()))
    assert all(g.isfinite().all() and (g != 0).any() for g in gradient)


def test_log_prob_and_arviz_have_it():
    vae, x = vamp_vae(), data()
    with torch.no_grad():
        vae.encoder.layers[-1].bias[LATENTS:] += 1.0  # wide enough to be a proposal
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, x, num_samples=20_000)
    z = vae.prior_distribution().sample((200_000,))
    naive = vae.decoder(z.unsqueeze(1)).log_prob(x).exp()  # S x N
    error = 5 * (score.std_error.square() + (naive.std(0) / naive.mean(0)).square() / len(z)).sqrt()
    assert ((score.log_prob - naive.mean(0).log()).abs() < error).all()
    assert "posterior" in lvm.to_arviz(vae.model, vae.guide, x, num_samples=5).groups()


@pytest.mark.parametrize(
    ("arguments", "settings", "match"),
    [
        ((0, FEATURES), {}, "num_components"),
        ((3, 0), {}, "in_shape"),
        ((3, FEATURES), {"bounds": (1.0, 1.0)}, "low < high"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, settings, match):
    with pytest.raises(ValueError, match=match):
        VampPrior(networks()[0], *arguments, **settings)


def test_images():
    encoder = MLP((2, 3), [6], head=NormalHead(LATENTS))
    vae = VAE(encoder, MLP(LATENTS, [6], head=NormalHead((2, 3))), prior=None)
    vae.prior = VampPrior(encoder, 5, (2, 3))
    assert nn.utils.parameters_to_vector(vae.prior.parameters()).numel() > 30
    assert vae.sample(4).shape == (4, 2, 3)
