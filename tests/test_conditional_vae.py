"""The conditional VAE against a linear Gaussian story given y, and networks of several inputs."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.models import ConditionalVAE
from pyro_lvm.nn import MLP, BernoulliHead, Joined, NormalHead

SIZE, LATENTS, CONDITIONS, NOISE = 5, 2, 3, 0.6


class Linear(nn.Module):
    """x = W z + V y + b + NOISE e, z = A y + e', and the exact posterior of z given x and y."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = {"W": (SIZE, LATENTS), "V": (SIZE, CONDITIONS), "A": (LATENTS, CONDITIONS)}
        for name, shape in {**shapes, "b": (SIZE,)}.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))

    def log_prob(self, x, y):
        loc = y @ (self.W @ self.A + self.V).T + self.b
        covariance = self.W @ self.W.T + NOISE**2 * torch.eye(SIZE).to(x)
        return dist.MultivariateNormal(loc, covariance).log_prob(x)

    def posterior(self, x, y):
        precision = torch.eye(LATENTS).to(x) + self.W.T @ self.W / NOISE**2
        rest = x - y @ self.V.T - self.b
        loc = (y @ self.A.T + rest @ self.W / NOISE**2) @ torch.linalg.inv(precision)
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    def likelihood(self, z, y):
        loc = z @ self.W.T + y @ self.V.T + self.b
        return dist.Normal(loc, NOISE).to_event(1)

    def prior(self, y):
        return dist.Normal(y @ self.A.T, 1.0).to_event(1)


class Part(nn.Module):
    """One of a story's functions as a module of its own."""

    def __init__(self, story, name):
        super().__init__()
        self.story, self.name = story, name

    def forward(self, *inputs):
        return getattr(self.story, self.name)(*inputs)


class Widened(Part):
    """The exact posterior with twice its covariance."""

    def forward(self, *inputs):
        exact = super().forward(*inputs)
        return dist.MultivariateNormal(exact.loc, 2 * exact.covariance_matrix)


def linear(device="cpu", encoder=Part):
    story = Linear().to(device)
    parts = (encoder(story, "posterior"), Part(story, "likelihood"), Part(story, "prior"))
    return story, ConditionalVAE(*parts)


def data(num=30, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    draw = (torch.randn(num, size, generator=generator).double() for size in (SIZE, CONDITIONS))
    return tuple(t.to(device) for t in draw)


def networks(classes=4, learned_prior=False):
    torch.manual_seed(0)
    encoder = Joined(MLP(SIZE + classes, [8], head=NormalHead(LATENTS)), [SIZE, classes])
    decoder = Joined(MLP(LATENTS + classes, [8], head=BernoulliHead(SIZE)), [LATENTS, classes])
    prior = Joined(MLP(classes, [8], head=NormalHead(LATENTS)), [classes])
    return ConditionalVAE(encoder, decoder, prior if learned_prior else None)


def labelled(num=20, classes=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(2, (num, SIZE), generator=generator).float()
    return x, torch.randint(classes, (num,), generator=generator)


def test_weights_of_the_exact_posterior_are_log_p_of_x_given_y(device):
    story, vae = linear(device)
    x, y = data(device=device)
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, x, y, num_samples=3)
    torch.testing.assert_close(score.log_prob, story.log_prob(x, y))
    assert score.std_error.max() < 1e-6


def test_importance_sampling_reaches_the_closed_form(device):
    story, vae = linear(device, Widened)
    x, y = data(device=device)
    torch.manual_seed(0)
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, x, y, num_samples=2000)
    error = (score.log_prob - story.log_prob(x, y)).abs()
    assert (error < 5 * score.std_error).all()
    assert score.std_error.min() > 0


def test_elbo_and_its_gradient_are_exact_under_the_exact_posterior(device):
    story, vae = linear(device)
    x, y = data(device=device)
    loss = lvm.TraceInfo_ELBO().differentiable_loss(vae.model, vae.guide, x, y)
    torch.testing.assert_close(loss, -story.log_prob(x, y).sum())


def test_the_condition_reaches_prior_decoder_and_encoder():
    vae = networks(learned_prior=True)
    x, y = labelled()
    other = (y + 1) % 4
    assert not torch.equal(vae.prior_distribution(y).mean, vae.prior_distribution(other).mean)
    assert not torch.equal(vae.encode(x, y).mean, vae.encode(x, other).mean)
    z = torch.zeros(len(x), LATENTS)
    assert not torch.equal(vae.decode(z, y).mean, vae.decode(z, other).mean)


@pytest.mark.parametrize("learned_prior", [False, True])
def test_draws_follow_the_condition(learned_prior):
    """The mean of many draws is that of the story given y."""
    vae = networks(learned_prior=learned_prior)
    y = torch.arange(4).repeat_interleave(20_000)
    torch.manual_seed(1)
    draws = vae.sample(y).reshape(4, -1, SIZE)
    means = vae.sample(y, mean=True).reshape(4, -1, SIZE)
    error = ((draws.var(1) + means.var(1)) / draws.shape[1]).sqrt()
    assert ((draws.mean(1) - means.mean(1)).abs() < 5 * error).all()
    apart = (means.mean(1)[:, None] - means.mean(1)).abs().amax(-1)
    assert apart[~torch.eye(4, dtype=torch.bool)].min() > 0.005


@pytest.mark.parametrize("learned_prior", [False, True])
def test_is_a_plain_pair(learned_prior):
    vae = networks(learned_prior=learned_prior)
    x, y = labelled()
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=2))
    before = {n: p.detach().clone() for n, p in vae.named_parameters()}
    svi.step(x, y)
    assert all(not torch.equal(before[n], p) for n, p in vae.named_parameters())


def test_fits_and_scores_with_labels():
    """x is its label's pattern: y says all, and log p(x | y) comes near 0."""
    patterns = torch.tensor([[0.0, 0, 1, 1, 0], [1, 0, 0, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 0, 1]])
    y = torch.arange(4).repeat(50)
    x = patterns[y]
    vae = networks()
    adam = functools.partial(torch.optim.Adam, lr=3e-2)
    fit = lvm.fit(vae.model, vae.guide, (x, y), epochs=20, batch_size=20, seed=0, optimizer=adam)
    assert fit.history["loss"][-1] < 0.2
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, x, y, num_samples=50)
    assert -0.2 < score.mean < 0
    torch.testing.assert_close(vae.reconstruct(x, y).round(), x)
    wrong = lvm.marginal.importance_sampling(vae.model, vae.guide, x, (y + 1) % 4, num_samples=50)
    assert wrong.mean < score.mean - 5


def test_a_mask_that_hides_nothing_changes_nothing():
    vae = networks()
    x, y = labelled()
    elbo = lvm.TraceInfo_ELBO()
    losses = []
    for mask in (None, torch.ones(1, SIZE).bool(), torch.zeros(1, SIZE).bool()):
        torch.manual_seed(0)
        losses.append(elbo.loss(vae.model, vae.guide, x, y, mask=mask))
    assert losses[0] == losses[1] != losses[2]
    hidden = torch.zeros(1, SIZE).bool()
    score = lvm.marginal.naive_monte_carlo(vae.model, x, y, mask=hidden, num_samples=5)
    assert (score.log_prob == 0).all()


def test_a_prior_may_be_the_same_for_all_conditions():
    vae = networks()
    x, y = labelled()
    prior = dist.Normal(torch.tensor([1.0, -2.0]), 0.5).to_event(1)
    same = ConditionalVAE(vae.encoder, vae.decoder, prior)
    assert same.prior_distribution(y) is prior
    terms = lvm.compute_terms(same.model, same.guide, x, y)
    torch.testing.assert_close(terms.log_prior["z"], prior.log_prob(terms.samples["z"]))
    assert same.sample(y).shape == x.shape


def test_default_prior_is_found_without_a_head():
    vae = ConditionalVAE(
        Part(Linear(), "posterior"), Part(Linear(), "likelihood")
    )  # no head to ask
    x, y = data(4)
    with pytest.raises(ValueError, match="shape of z to be known"):
        vae.prior_distribution(y)
    vae.model(x, y)
    assert vae.prior_distribution(y).event_shape == (LATENTS,)


@pytest.mark.parametrize(
    ("name", "call", "match"),
    [
        ("lengths", lambda v: v.model(torch.zeros(3, SIZE), torch.zeros(2).long()), "3; got 2"),
        ("no data", lambda v: v.guide(torch.zeros(0, SIZE), torch.zeros(0).long()), "x"),
        ("no condition", lambda v: v.model(torch.zeros(3, SIZE), None), "y"),
        (
            "prior with a batch",
            lambda v: ConditionalVAE(v.encoder, v.decoder, dist.Normal(torch.zeros(2), 1.0)),
            "no batch shape",
        ),
        ("fill", lambda v: ConditionalVAE(v.encoder, v.decoder, fill=float("nan")), "fill"),
    ],
)
def test_refuses(name, call, match):
    with pytest.raises((ValueError, TypeError), match=match):
        call(networks())


# ------------------------------------------------------------------- networks of several inputs


def test_joined_is_the_network_on_the_inputs_side_by_side():
    network = MLP(3 + 4 + 2, [], head=NormalHead(2))
    joined = Joined(network, [3, (2, 2), 2])
    a, b, label = torch.randn(6, 3), torch.randn(6, 2, 2), torch.randint(2, (6,))
    one_hot = torch.stack([label == 0, label == 1], -1).float()
    expected = network(torch.cat([a, b.reshape(6, 4), one_hot], -1))
    found = joined(a, b, label)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.stddev, expected.stddev)
    assert joined.head is network.head


def test_joined_broadcasts_batches():
    joined = Joined(MLP(2 + 4, [], head=NormalHead(1)), [2, 4])
    z, y = torch.randn(7, 5, 2), torch.arange(4).reshape(4, 1, 1)
    found = joined(z, y)
    assert found.batch_shape == (4, 7, 5)
    torch.testing.assert_close(found.mean[2, 3, 1], joined(z[3, 1], torch.tensor(2)).mean)
    flipped = Joined(joined.network, [4, 2])
    assert flipped(y, z).batch_shape == (4, 7, 5)


def test_joined_is_as_precise_as_its_inputs():
    joined = Joined(MLP(2 + 4, [], head=NormalHead(1)), [2, 4]).double()
    assert joined(torch.zeros(2).double(), torch.tensor(1)).mean.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda net: Joined(net, []), "every input"),
        (lambda net: Joined(3, [2]), "nn.Module"),
        (lambda net: Joined(net, [2, 0]), "positive|>"),
        (lambda net: Joined(net, [2, 4])(torch.zeros(2)), "2 inputs"),
        (lambda net: Joined(net, [2, 4])(torch.zeros(3), torch.tensor(1)), "input 0"),
        (lambda net: Joined(net, [2, (2, 2)])(torch.zeros(2), torch.tensor(1)), "labels"),
        (lambda net: Joined(net, [2, 4])(torch.zeros(2), torch.zeros(4).bool()), "input 1"),
    ],
)
def test_joined_refuses(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make(MLP(6, [], head=NormalHead(1)))
