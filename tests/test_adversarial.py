"""Adversarial divergences: values by quadrature, gradients by hand, both players in one step."""

import copy
import math
import re

import pytest
import torch
from test_divergences import Quadratic, adversarial_surrogate, draws
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import spectral_norm

from pyro_lvm.divergences import Adversarial

KINDS = {
    "js": {},
    "js_minimax": {"generator": "minimax"},
    "kl": {"objective": "kl"},
}
each_kind = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())


def network(*layers, dim=3):
    return nn.Sequential(nn.Linear(dim, 8), *layers, nn.Tanh(), nn.Linear(8, 1))


def spectral(dim=3):
    return nn.Sequential(
        spectral_norm(nn.Linear(dim, 8)), nn.Tanh(), spectral_norm(nn.Linear(8, 1))
    )


def mean_and_error(values):
    return values.mean(), values.std() / math.sqrt(len(values))


# --- values by quadrature

Q_LOC, Q_SCALE = 0.8, 0.6


def densities():
    """A grid, and the log-densities of q = N(0.8, 0.6^2) and p = N(0, 1) on it."""
    z = torch.linspace(-12, 12, 200_001)
    q, p = torch.distributions.Normal(Q_LOC, Q_SCALE), torch.distributions.Normal(0.0, 1.0)
    return z, q.log_prob(z), p.log_prob(z)


def js_and_kl():
    z, log_q, log_p = densities()
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    q_part, p_part = log_q.exp() * (log_q - log_m), log_p.exp() * (log_p - log_m)
    js = (torch.trapezoid(q_part, z) + torch.trapezoid(p_part, z)) / 2
    return {"js": js, "kl": torch.trapezoid(log_q.exp() * (log_q - log_p), z)}


def two_normals(size):
    return Q_LOC + Q_SCALE * torch.randn(size, 1), torch.randn(size, 1)


@pytest.fixture(scope="module")
def trained():
    """A discriminator that holds log p/q, trained by fresh draws from zero on."""
    torch.manual_seed(0)
    adversarial = Adversarial(Quadratic(1, 0.0, 0.0, 0.0))
    optimizer = torch.optim.Adam(adversarial.own_parameters, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        adversarial(*two_normals(4000)).backward()
        optimizer.step()
        schedule.step()
    return adversarial.discriminator.double()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("objective", ["js", "kl"])
def test_trained_discriminator_gives_the_divergence(objective, trained):
    adversarial = Adversarial(copy.deepcopy(trained), objective=objective)
    values = torch.stack([adversarial(*two_normals(1000)).detach() for _ in range(50)])
    mean, error = mean_and_error(values)
    assert abs(mean - js_and_kl()[objective]) < 5 * error
    assert mean > 20 * error


@pytest.mark.usefixtures("float64")
def test_js_is_a_lower_bound_by_any_discriminator():
    z, log_q, log_p = densities()
    for scale in (0.3, 1.0, 3.0):
        t = scale * (log_p - log_q) + 0.1
        loss = log_p.exp() * softplus(-t) + log_q.exp() * softplus(t)
        bound = math.log(2) - torch.trapezoid(loss, z) / 2
        assert bound < js_and_kl()["js"]


def test_chance_is_two_log_two():
    adversarial = Adversarial(Quadratic(3, 0.0, 0.0, 0.0))
    divergence, loss = adversarial.players(*draws(6, 9))
    assert loss.item() == pytest.approx(2 * math.log(2))
    assert divergence.item() == pytest.approx(0.0, abs=1e-6)
    assert Adversarial(Quadratic(3, 0.0, 0.0, 0.0), objective="kl")(*draws(6, 9)).item() == 0.0


# --- gradients by hand


@each_kind
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("learned_prior", [True, False])
def test_players_by_hand(settings, learned_prior):
    adversarial, (q, p) = Adversarial(network(), **settings), draws(6, 9)
    q.requires_grad_()
    p.requires_grad_(learned_prior)
    t_q, t_p = adversarial.discriminator(q)[:, 0], adversarial.discriminator(p)[:, 0]
    by_hand = (1 + torch.exp(-t_p)).log().mean() + (1 + torch.exp(t_q)).log().mean()
    divergence, loss = adversarial.players(q, p)
    value = -t_q.mean() if "objective" in settings else math.log(2) - by_hand / 2
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(divergence, value)
    moving = [q, p] if learned_prior else [q]
    flat = copy.deepcopy(adversarial)
    flat.discriminator = nn.Sequential(adversarial.discriminator, nn.Flatten(0))
    expected = torch.autograd.grad(adversarial_surrogate(flat, q, p), moving)
    torch.testing.assert_close(torch.autograd.grad(divergence, moving), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("settings", "slope"),
    [
        ({}, lambda t: (-(1 / (1 + math.exp(t))) / 2, 1 / (1 + math.exp(-t)) / 2)),
        (
            {"generator": "minimax"},
            lambda t: (-(1 / (1 + math.exp(-t))) / 2, 1 / (1 + math.exp(t)) / 2),
        ),
        ({"objective": "kl"}, lambda t: (-1.0, math.exp(-t))),
    ],
    ids=KINDS.keys(),
)
@pytest.mark.parametrize("logit", [-1.3, 0.4])
def test_slope_by_the_logit(settings, slope, logit):
    """One draw each with T(z) = z: the derivative by the logit of a draw from q, and from p."""
    adversarial = Adversarial(nn.Flatten(0), **settings)
    q, p = (torch.tensor([[logit]], requires_grad=True) for _ in range(2))
    adversarial(q, p).backward()
    assert (q.grad.item(), p.grad.item()) == pytest.approx(slope(logit))


@each_kind
@pytest.mark.usefixtures("float64")
def test_forward_gives_each_player_its_own_gradient(settings):
    adversarial = Adversarial(network(), **settings)
    q, p = (x.requires_grad_() for x in draws(6, 9))
    divergence, loss = adversarial.players(q, p)
    parameters = adversarial.own_parameters
    assert all(g is None for g in torch.autograd.grad(loss, [q, p], allow_unused=True))
    assert all(g is None for g in gradients(divergence, parameters))
    value = adversarial(q, p)
    torch.testing.assert_close(value, divergence)
    torch.testing.assert_close(gradients(value, [q, p]), gradients(divergence, [q, p]))
    torch.testing.assert_close(gradients(value, parameters), gradients(loss, parameters))


def gradients(value, leaves):
    if not value.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)


def path_gradient(objective):
    """By quadrature: the derivative of JS or KL by a shift of q."""
    z, log_q, log_p = densities()
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    score = (z - Q_LOC) / Q_SCALE**2  # of the density of q by its shift
    integrand = log_q.exp() * score * (log_q - (log_m if objective == "js" else log_p))
    return torch.trapezoid(integrand, z) / (2 if objective == "js" else 1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "settings", [{"generator": "minimax"}, {"objective": "kl"}, {}], ids=["js", "kl", "pull"]
)
def test_gradient_at_the_optimum_is_that_of_the_divergence(settings):
    """By the shift of q, and minus that by the shift of p, as both move the same."""
    adversarial = Adversarial(Quadratic(1), **settings)
    adversarial.discriminator.set_optimum(Q_LOC, Q_SCALE)
    by_q, by_p = [], []
    for _ in range(100):
        q, p = (x.requires_grad_() for x in two_normals(1000))
        adversarial(q, p).backward()
        by_q.append(q.grad.sum())
        by_p.append(p.grad.sum())
    js, kl = path_gradient("js"), path_gradient("kl")
    non_saturating = settings == {}
    expected = kl if "objective" in settings else js
    mean, error = mean_and_error(torch.stack(by_q))
    assert abs(mean - (kl / 2 - js if non_saturating else expected)) < 5 * error
    assert mean > 5 * error  # a step against it moves q down to p
    mean, error = mean_and_error(torch.stack(by_p))
    assert mean < -5 * error
    assert non_saturating or abs(mean + expected) < 5 * error


# --- both players


@each_kind
@pytest.mark.usefixtures("float64")
def test_one_step_improves_both_players(settings):
    adversarial = Adversarial(Quadratic(2, 0.0, 0.1, -0.1), **settings)
    q, p = torch.randn(500, 2), torch.randn(500, 2)
    shift = torch.tensor([1.0, 0.5], requires_grad=True)
    adversarial.discriminator.set_optimum(torch.tensor([1.0, 0.5]), 1.0)
    with torch.no_grad():  # near the optimum, but with something left to learn
        adversarial.discriminator.b.mul_(0.5)
    before = shift.detach().norm()
    _, loss = adversarial.players(q + shift, p)
    optimizer = torch.optim.SGD([shift, *adversarial.own_parameters], lr=0.05)
    adversarial(q + shift, p).backward()
    fixed = copy.deepcopy(adversarial)
    optimizer.step()
    with torch.no_grad():
        assert shift.norm() < before
        # the discriminator, against the draws that it has seen; the draws, by the one they have
        assert adversarial.players(q + torch.tensor([1.0, 0.5]), p)[1] < loss
        surrogates = [adversarial_surrogate(fixed, q + s, p)
                      for s in (shift, torch.tensor([1.0, 0.5]))]  # fmt: skip
        assert surrogates[0] < surrogates[1]


@each_kind
def test_one_optimiser_for_both_players_finds_the_prior(settings):
    adversarial = Adversarial(Quadratic(1, 0.0, 0.0, 0.0), **settings, learning_rate=0.05)
    loc, log_scale = (torch.tensor(x, requires_grad=True) for x in (2.0, -1.0))
    optimizer = torch.optim.Adam(
        [
            {"params": [loc, log_scale], "lr": 0.005},
            {"params": adversarial.own_parameters, "lr": adversarial.learning_rate},
        ],
        betas=(0.5, 0.9),  # less momentum, with which two players would circle each other
    )
    path = []
    for _ in range(1500):
        optimizer.zero_grad()
        adversarial(loc + log_scale.exp() * torch.randn(200, 1), torch.randn(200, 1)).backward()
        optimizer.step()
        path.append((loc.item(), log_scale.item()))
    end = torch.tensor(path[-500:]).mean(0)
    assert end.abs().max() < 0.2


# --- any discriminator


DISCRIMINATORS = {
    "network": network,
    "spectral_norm": spectral,
    "batch_norm": lambda: network(nn.BatchNorm1d(8)),
    "one_logit": lambda: Quadratic(3),
    "no_parameters": lambda: nn.Sequential(nn.Flatten(), Mean()),
}
each_discriminator = pytest.mark.parametrize(
    "make", DISCRIMINATORS.values(), ids=DISCRIMINATORS.keys()
)


class Mean(nn.Module):
    def forward(self, z):
        return z.mean(-1)


@each_discriminator
@each_kind
def test_any_module_is_a_discriminator(make, settings, device):
    adversarial = Adversarial(make(), **settings).to(device)
    q, p = (x.requires_grad_() for x in draws(6, 9, device=device))
    adversarial(q, p).backward()
    for x in (q, p, *adversarial.own_parameters):
        assert torch.isfinite(x.grad).all()
    assert (q.grad != 0).any()
    adversarial.eval()
    with torch.no_grad():
        assert not adversarial(q, p).requires_grad


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["spectral_norm", "batch_norm"])
def test_buffers_move_with_the_discriminators_loss_alone(name):
    """The samples' pass neither moves them again nor leaves a gradient at the parameters."""
    ours = Adversarial(DISCRIMINATORS[name]())
    theirs = copy.deepcopy(ours.discriminator)
    q, p = (x.requires_grad_() for x in draws(6, 9))
    divergence, _ = ours.players(q, p)
    theirs(q)
    theirs(p)
    for mine, other in zip(ours.discriminator.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, other)
    divergence.backward()
    assert all(w.grad is None for w in ours.own_parameters)
    assert all(w.requires_grad for w in ours.own_parameters)


@pytest.mark.usefixtures("float64")
def test_spectral_norm_has_the_gradient_of_its_own_weights():
    """In evaluation nothing moves: the samples' gradient is that by the live discriminator."""
    adversarial = Adversarial(spectral()).eval()
    q, p = (x.requires_grad_() for x in draws(6, 9))
    expected = torch.autograd.grad(-torch.sigmoid(adversarial.discriminator(q)).log().mean() / 2, q)
    torch.testing.assert_close(torch.autograd.grad(adversarial(q, p), q), expected)


def test_frozen_parameters_stay_so():
    adversarial = Adversarial(network())
    first, *_, last = adversarial.own_parameters
    first.requires_grad_(False)
    q, p = (x.requires_grad_() for x in draws(6, 9))
    adversarial(q, p).backward()
    assert not first.requires_grad
    assert first.grad is None
    assert last.grad is not None


def test_a_fixed_prior_is_not_passed_twice():
    calls = []
    adversarial = Adversarial(network())
    adversarial.discriminator.register_forward_hook(lambda *_: calls.append(1))
    q, p = draws(6, 9)
    adversarial(q.requires_grad_(), p)
    assert len(calls) == 3
    adversarial(q, p.requires_grad_())
    assert len(calls) == 7


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["network", "spectral_norm", "batch_norm"])
@each_kind
def test_a_recording_has_the_gradients_of_both_players(name, settings):
    """While training too, where batch norm moves its buffers."""
    adversarial = Adversarial(DISCRIMINATORS[name](), **settings)
    adversarial.train(
        name != "spectral_norm"
    )  # whose iterations torch writes into buffers: refused

    def samples():
        return [x.requires_grad_() for x in draws(6, 9)]

    graph, (q, p) = make_fx(adversarial)(*samples()), samples()
    before = copy.deepcopy(adversarial.state_dict())
    ours = value_and_gradients(graph, q, p, adversarial)
    after = copy.deepcopy(adversarial.state_dict())
    adversarial.load_state_dict(before)
    torch.testing.assert_close(ours, value_and_gradients(adversarial, q, p, adversarial))
    torch.testing.assert_close(after, adversarial.state_dict())


def value_and_gradients(function, q, p, adversarial):
    value = function(q, p)
    return [value, *torch.autograd.grad(value, [q, p, *adversarial.own_parameters])]


def test_own_parameters_are_those_of_the_discriminator():
    adversarial = Adversarial(network(), learning_rate=1e-3)
    ours, theirs = adversarial.own_parameters, list(adversarial.discriminator.parameters())
    assert all(a is b for a, b in zip(ours, theirs, strict=True))
    assert adversarial.learning_rate == 1e-3
    assert Adversarial(network()).learning_rate is None


# --- every error

four = torch.zeros(4, 3)
ERRORS = {
    "function": (lambda: Adversarial(torch.sum), TypeError, "discriminator to be an nn.Module"),
    "objective": (
        lambda: Adversarial(network(), objective="tv"),
        ValueError,
        "objective to be 'js' or 'kl'; got 'tv'",
    ),
    "generator": (
        lambda: Adversarial(network(), generator="max"),
        ValueError,
        "generator to be 'non-saturating' or 'minimax'; got 'max'",
    ),
    "kl_minimax": (
        lambda: Adversarial(network(), objective="kl", generator="minimax"),
        ValueError,
        "Expected no generator for objective='kl', which has one gradient only; got 'minimax'",
    ),
    "learning_rate": (
        lambda: Adversarial(network(), learning_rate=0.0),
        ValueError,
        "learning_rate to be a positive number; got 0.0",
    ),
    "two_logits": (
        lambda: Adversarial(nn.Linear(3, 2))(four, four),
        ValueError,
        "one logit per row, of shape (4,) or (4, 1); got (4, 2). End it with",
    ),
    "one_for_all": (
        lambda: Adversarial(nn.Sequential(nn.Flatten(0), nn.Linear(12, 1)))(four, four),
        ValueError,
        "got (1,)",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, error, match):
    with pytest.raises(error, match=re.escape(match)):
        call()


def test_repr_names_the_settings():
    text = repr(Adversarial(Quadratic(), learning_rate=0.1))
    assert "objective='js', generator='non-saturating', learning_rate=0.1" in text
    assert "generator" not in repr(Adversarial(Quadratic(), objective="kl"))
