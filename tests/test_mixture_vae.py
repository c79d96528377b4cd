"""The VAE with a mixture as its prior: against the prior as one distribution, and closed forms."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.models import VAE, GaussianMixture, MixtureVAE
from pyro_lvm.nn import MLP, NormalHead

NUM_DATA, FEATURES, LATENTS, COMPONENTS = 8, 4, 2, 3

pytestmark = pytest.mark.usefixtures("float64")


def networks():
    encoder = MLP(FEATURES, [6], head=NormalHead(LATENTS))
    decoder = MLP(LATENTS, [6], head=NormalHead(FEATURES))
    return encoder, decoder


def set_prior(vae):
    """A prior that no symmetry hides."""
    if vae.learn_weights:
        vae.weights = torch.tensor([0.5, 0.2, 0.3])
    else:
        vae.weights.copy_(torch.tensor([0.5, 0.2, 0.3]))
    vae.loc = 2 * torch.randn(COMPONENTS, LATENTS)
    vae.scale = 0.5 + torch.rand(COMPONENTS, LATENTS)
    return vae


def mixture_vae(**settings):
    return set_prior(MixtureVAE(*networks(), COMPONENTS, **settings))


def data(device="cpu"):
    return torch.randn(NUM_DATA, FEATURES, device=device)


class MixturePrior(nn.Module):
    """The same prior as one distribution, from the same parameters."""

    def __init__(self, vae):
        super().__init__()
        self.of = [vae]

    def forward(self):
        (vae,) = self.of
        components = dist.Normal(vae.loc, vae.scale).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(vae.weights), components)


def loss_and_gradient(elbo, program, guide, x, parameters):
    pyro.set_rng_seed(3)
    loss = elbo.differentiable_loss(program, guide, x)
    return loss.detach(), torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("make", [TraceEnum_ELBO, lvm.TraceInfo_ELBO])
def test_it_is_a_vae_with_a_mixture_as_its_prior(make, particles, device):
    vae, x = mixture_vae().to(device), data(device)
    other = VAE(vae.encoder, vae.decoder, MixturePrior(vae))
    settings = {"num_particles": particles, "vectorize_particles": True, "max_plate_nesting": 1}
    parameters = list(vae.parameters())
    found = loss_and_gradient(make(**settings), vae.model, vae.guide, x, parameters)
    host = Trace_ELBO if make is TraceEnum_ELBO else lvm.TraceInfo_ELBO
    expected = loss_and_gradient(host(**settings), other.model, other.guide, x, parameters)
    assert torch.allclose(found[0], expected[0], rtol=1e-10)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


def test_incomplete_data_as_in_a_vae():
    vae, x = mixture_vae(fill=0.5), data()
    mask = torch.rand(x.shape) < 0.6
    other = VAE(vae.encoder, vae.decoder, MixturePrior(vae), fill=0.5)
    x = torch.where(mask, x, torch.nan)
    pyro.set_rng_seed(3)
    found = lvm.compute_terms(vae.model, vae.guide, x, mask, max_plate_nesting=1)
    pyro.set_rng_seed(3)
    expected = lvm.compute_terms(other.model, other.guide, x, mask, max_plate_nesting=1)
    for name in ("log_weight", "log_likelihood"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-10)
    assert torch.allclose(found.log_prior["z"], expected.log_prior["z"], rtol=1e-10)


def test_responsibilities():
    vae, x = mixture_vae(), data()
    z = torch.randn(5, 7, LATENTS)
    joint = torch.stack(
        [
            math.log(w) + dist.Normal(m, s).log_prob(z).sum(-1)
            for w, m, s in zip([0.5, 0.2, 0.3], vae.loc, vae.scale, strict=True)
        ],
        -1,
    )
    assert torch.allclose(vae.label_probs(z), joint.softmax(-1), rtol=1e-9)
    assert torch.allclose(vae.prior_distribution().log_prob(z), joint.logsumexp(-1), rtol=1e-9)
    pyro.set_rng_seed(3)
    found = vae.responsibilities(x, num_samples=50)
    pyro.set_rng_seed(3)
    expected = vae.label_probs(vae.encoder(x).sample((50,))).mean(0)
    assert torch.allclose(found, expected)
    assert not found.requires_grad
    with pytest.raises(ValueError, match="num_samples"):
        vae.responsibilities(x, num_samples=0)


# -------------------------------------------------------------------------- a linear decoder


class LinearDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(FEATURES, LATENTS))

    def forward(self, z):
        return dist.Normal(z @ self.W.T, 0.7).to_event(1)


def linear():
    """The guide is the posterior under N(0, 4 I) as the prior, a rough one."""
    decoder, encoder = LinearDecoder(), MLP(FEATURES, [], head=NormalHead(LATENTS, scale=1.0))
    weight = decoder.W.detach()
    precision = torch.eye(LATENTS) / 4 + weight.T @ weight / 0.49
    with torch.no_grad():
        encoder.layers[0].weight.copy_(torch.linalg.solve(precision, weight.T / 0.49))
        encoder.layers[0].bias.zero_()
    encoder.head.scale = 2 * float(torch.linalg.inv(precision).diagonal().max()) ** 0.5
    return set_prior(MixtureVAE(encoder, decoder, COMPONENTS))


def test_log_prob_of_a_linear_decoder_is_that_of_a_mixture():
    vae, x = linear(), data()
    weight = vae.decoder.W.detach()
    covariances = weight @ vae.scale.square().diag_embed() @ weight.T + 0.49 * torch.eye(FEATURES)
    of_class = dist.MultivariateNormal(vae.loc @ weight.T, covariances).log_prob(x.unsqueeze(1))
    exact = (of_class + vae.weights.log()).logsumexp(-1).detach()
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, x, num_samples=20_000)
    assert ((score.log_prob - exact).abs() < 5 * score.std_error).all()


def test_draws_are_of_the_component_that_is_asked_for(device):
    vae, n = linear().to(device), 20_000
    weight = vae.decoder.W.detach()
    for c in range(COMPONENTS):
        for x in (vae.sample(n, c), vae.sample(n, torch.full((n,), c), mean=True)):
            assert x.device.type == device
            error = (x.mean(0) - weight @ vae.loc[c]).abs()
            assert (error < 5 * x.std(0) / math.sqrt(n)).all()
        means = vae.sample(n, c, mean=True)
        variance = (weight @ vae.scale[c].square().diag() @ weight.T).diagonal()
        squares = (means - weight @ vae.loc[c]).square()
        assert ((squares.mean(0) - variance).abs() < 5 * squares.std(0) / math.sqrt(n)).all()
    x = vae.sample(n)
    error = (x.mean(0) - weight @ (vae.weights @ vae.loc)).abs()
    assert (error < 5 * x.std(0) / math.sqrt(n)).all()


# -------------------------------------------------------------------- divergences, beginnings


def test_divergences_see_draws_of_the_mixture():
    """With weights that are not learned; their prior draws have a gradient."""
    vae, x = mixture_vae(learn_weights=False), torch.randn(400, FEATURES)
    elbo = lvm.TraceInfo_ELBO(alpha=1.0, lambda_=5.0, divergence=lvm.MMD())
    loss, parts = elbo.loss_and_parts(vae.model, vae.guide, x)
    assert "divergence" in parts
    names = [n for n, _ in vae.named_parameters()]
    gradient = torch.autograd.grad(loss, list(vae.parameters()), allow_unused=True)
    assert all(g is not None for n, g in zip(names, gradient, strict=True) if "loc" in n)
    z = vae.prior_distribution().sample((400,))
    draws = [lvm.infer.prior.sample_prior_sites(vae.model, ["z"], (x,), {}, given={})["z"]]
    assert lvm.MMD()(draws[0]["value"], z).abs() < 0.02
    assert lvm.MMD()(draws[0]["value"], torch.randn(400, LATENTS)).abs() > 0.02


def test_learned_weights_and_a_divergence_between_samples_are_refused():
    vae, x = mixture_vae(), data()
    elbo = lvm.TraceInfo_ELBO(alpha=1.0, lambda_=5.0, divergence=lvm.MMD())
    with pytest.raises(ValueError, match=r"\['y'\].*learned.*Stein"):
        elbo.check_pair(vae.model, vae.guide, (x,))
    by_density = lvm.TraceInfo_ELBO(alpha=1.0, lambda_=5.0, divergence=lvm.Stein())
    loss = by_density.differentiable_loss(vae.model, vae.guide, x)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(vae.parameters())))
    with pytest.raises(ValueError, match=r"\['y'\].*learned.*Stein"):
        lvm.fit(vae.model, vae.guide, x, elbo=elbo, epochs=1)  # looks at it without gradients


@pytest.mark.parametrize("learn_weights", [True, False])
def test_it_starts_at_the_clusters_of_encoded_data(learn_weights):
    encoder = MLP(LATENTS, [], head=NormalHead(LATENTS, scale=0.3))
    with torch.no_grad():
        encoder.layers[0].weight.copy_(torch.eye(LATENTS))
        encoder.layers[0].bias.zero_()
    centres = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, -4.0]])
    labels = torch.tensor([0] * 50 + [1] * 100 + [2] * 150)
    x = centres[labels] + torch.tensor([0.4, 0.8]) * torch.randn(300, LATENTS)
    vae = MixtureVAE(encoder, encoder, 3, learn_weights=learn_weights)
    assert vae.initialize(x) is vae
    order = torch.cdist(centres, vae.loc).argmin(-1)
    assert torch.allclose(vae.loc[order], centres, atol=0.4)
    expected = (torch.tensor([0.4, 0.8]).square() + 0.3**2).sqrt()
    assert torch.allclose(vae.scale[order], expected.expand(3, 2), rtol=0.25)
    shares = torch.tensor([1 / 6, 1 / 3, 1 / 2]) if learn_weights else torch.full((3,), 1 / 3)
    assert torch.allclose(vae.weights[order], shares, atol=0.01)
    found = vae.responsibilities(x).argmax(-1)
    assert (found == order[labels]).double().mean() > 0.98


def test_its_prior_is_trained():
    """SVI moves weights, means and scales, and improves the bound."""
    vae, x = mixture_vae(), 3 + torch.randn(60, FEATURES)
    before = {n: p.detach().clone() for n, p in vae.named_parameters()}
    fit = lvm.fit(
        vae.model, vae.guide, x, epochs=15, optimizer=lambda p: torch.optim.Adam(p, lr=0.05), seed=0
    )
    assert fit.history["loss"][-1] < fit.history["loss"][0]
    for name, value in vae.named_parameters():
        assert not torch.equal(value, before[name]), name
    assert float(vae.weights.detach().sum()) == pytest.approx(1.0)
    assert (vae.scale > 0).all()


@pytest.mark.parametrize("learn_weights", [True, False])
def test_it_is_saved_and_copied(tmp_path, learn_weights):
    vae, x = mixture_vae(learn_weights=learn_weights, plate="rows"), data()
    lvm.save(vae, tmp_path / "vae")
    for other in (lvm.load(tmp_path / "vae"), copy.deepcopy(vae)):
        assert torch.equal(
            other.prior_distribution().log_prob(torch.ones(LATENTS)),
            vae.prior_distribution().log_prob(torch.ones(LATENTS)),
        )
        assert torch.equal(other.reconstruct(x), vae.reconstruct(x))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda e, d: MixtureVAE(e, d, 0), "num_components"),
        (lambda e, d: MixtureVAE(lambda x: e(x), d, 3), r"size of z.*num_latents="),
        (lambda e, d: MixtureVAE(lambda x: e(x), d, 3, num_latents=0), "num_latents"),
        (
            lambda e, d: MixtureVAE(MLP(4, [], head=NormalHead((2, 3))), d, 3),
            r"vectors z.*\(2, 3\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build(*networks())


def test_functions_do_for_networks():
    encoder, decoder = networks()
    vae = MixtureVAE(lambda x: encoder(x), lambda z: decoder(z), 3, num_latents=LATENTS)
    assert vae.sample(5).shape == (5, FEATURES)
    assert isinstance(vae, VAE)
    assert not isinstance(vae, GaussianMixture)
