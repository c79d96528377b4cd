"""Stein: direction and discrepancy pair by pair, learned priors, and where particles end."""

import math
import re

import pytest
import torch
from test_divergences import draws, log_standard_normal, svgd_direction
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_lvm.divergences import IMQ, MMD, RBF, Stein, kernel_mean

KERNELS = {
    "imq": lambda: IMQ((1.0,)),
    "imq_many": IMQ,
    "rbf": RBF,
    "function": lambda: lambda d, dim: (1 + d).pow(-0.5),
}
each_kernel = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS.keys())


class Mixture(nn.Module):
    """A mixture of two normals of one width per component; everything can be learned."""

    def __init__(self, locs=((-1.5, 0.0), (1.0, 1.0)), scales=(0.6, 0.9), weights=(0.3, 0.7)):
        super().__init__()
        self.locs = nn.Parameter(torch.tensor(locs))
        self.log_scales = nn.Parameter(torch.tensor(scales).log())
        self.logits = nn.Parameter(torch.tensor(weights).log())

    def forward(self, z):
        squares = (z[:, None] - self.locs).square().sum(-1) / self.log_scales.exp().square()
        normalisers = z.shape[1] * (self.log_scales + math.log(2 * math.pi) / 2)
        return torch.logsumexp(self.logits.log_softmax(0) - squares / 2 - normalisers, -1)


def score_of(log_prob, z):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(log_prob(z).sum(), z)[0]


def discrepancy_by_loops(kernel, z, score):
    """KSD^2, pair by pair; the derivatives of the kernel by autograd."""

    def k(a, b):
        return kernel((a - b).square().sum(), z.shape[1])

    total = 0.0
    for i in range(len(z)):
        for j in range(len(z)):
            by_i = torch.func.grad(k, 0)(z[i], z[j])
            by_j = torch.func.grad(k, 1)(z[i], z[j])
            mixed = torch.func.jacrev(torch.func.grad(k, 0), 1)(z[i], z[j])
            total += score[i] @ score[j] * k(z[i], z[j]) + score[i] @ by_j + score[j] @ by_i
            total += mixed.trace()
    return total / len(z) ** 2


# --- the definitions


@each_kernel
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("prior", [log_standard_normal, Mixture], ids=["normal", "mixture"])
def test_direction_and_discrepancy_are_the_double_loops(make, rows, prior, monkeypatch, device):
    monkeypatch.setattr(kernel_mean, "BLOCK_ROWS", {})
    monkeypatch.setattr(kernel_mean, "OTHER_BLOCK_ROWS", rows)
    log_prob = Mixture().to(device) if prior is Mixture else prior
    stein, z = Stein(make()), draws(7, 1, dim=2, device=device)[0].requires_grad_()
    score = score_of(log_prob, z)
    value = stein(z, log_prob)
    value.backward()
    expected = discrepancy_by_loops(stein.kernel, z.detach(), score)
    phi = svgd_direction(stein.kernel, z.detach(), score)
    torch.testing.assert_close(value.detach(), expected)
    torch.testing.assert_close(z.grad, -phi / 7)


@pytest.mark.usefixtures("float64")
def test_a_known_score_gives_the_same():
    stein, z, mixture = Stein(), draws(9, 1, dim=2)[0].requires_grad_(), Mixture()
    value = stein(z, mixture)
    known = stein.from_score(z, score_of(mixture, z))
    torch.testing.assert_close(known, value)
    torch.testing.assert_close(torch.autograd.grad(known, z), torch.autograd.grad(value, z))


@pytest.mark.usefixtures("float64")
def test_gradient_is_not_the_derivative_of_the_value():
    z = draws(6, 1, dim=2)[0].requires_grad_()
    score = -z.detach()
    (ours,) = torch.autograd.grad(Stein().from_score(z, score), z)
    moved = [discrepancy_by_loops(IMQ((1.0,)), z.detach() + e * ours, -(z.detach() + e * ours))
             for e in (0.0, 1e-6)]  # fmt: skip
    derivative = (moved[1] - moved[0]) / 1e-6
    assert abs(derivative - ours.square().sum()) > 0.1 * ours.square().sum()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dim", [1, 3])
def test_direction_vanishes_on_average_where_q_is_p(dim):
    """Stein's identity: E[k(z, y) s(z) + grad_z k(z, y)] = 0 for z ~ p and every y."""
    z, y = torch.randn(20_000, dim), torch.full((1, dim), 0.7)
    k = IMQ((1.0,))((z - y).square().sum(-1), dim)
    slope = -k.square() / (2 * dim) * 2  # of c / (c + r^2), times z - y
    terms = -k[:, None] * z + slope[:, None] * (z - y)
    assert (terms.mean(0).abs() < 5 * terms.std(0) / math.sqrt(20_000)).all()


@pytest.mark.usefixtures("float64")
def test_discrepancy_is_small_at_p_and_never_negative():
    same = torch.stack([Stein()(torch.randn(100, 2), log_standard_normal) for _ in range(20)])
    apart = Stein()(torch.randn(100, 2) + 1, log_standard_normal)
    assert same.min() > 0
    assert same.max() < 0.1 * apart


@pytest.mark.usefixtures("float64")
def test_discrepancy_is_the_rate_at_which_kl_falls():
    """KL(N(m, s^2) || N(0, 1)) along z + e phi(z), with phi by many draws: d KL / d e = -KSD^2."""
    z = (0.8 + 0.7 * torch.randn(3000, 1)).requires_grad_()
    value = Stein()(z, log_standard_normal)
    phi = -len(z) * torch.autograd.grad(value, z)[0]
    # of the law of z with z: dKL = -E[s(z) . phi(z) + div phi(z)] e, s that of p;
    # by parts, div phi against q is -grad log q . phi
    z = z.detach()
    rate = ((-z + (z - 0.8) / 0.49) * phi).sum(-1)
    error = rate.std() / math.sqrt(len(z))
    assert abs(rate.mean() - value) < 5 * error
    assert value > 10 * error


# --- a learned prior


@pytest.mark.usefixtures("float64")
def test_parameters_of_the_prior_get_the_gradient_of_its_likelihood():
    mixture, (z, _) = Mixture(), draws(40, 1, dim=2)
    parameters = list(mixture.parameters())
    ours = torch.autograd.grad(Stein()(z.requires_grad_(), mixture), parameters)
    expected = torch.autograd.grad(-mixture(z.detach()).mean(), parameters)
    torch.testing.assert_close(ours, expected)


@pytest.mark.usefixtures("float64")
def test_a_learned_prior_does_not_change_the_direction():
    frozen, learned = Mixture().requires_grad_(False), Mixture()
    z = draws(10, 1, dim=2)[0].requires_grad_()
    by_frozen, by_learned = (torch.autograd.grad(Stein()(z, p), z) for p in (frozen, learned))
    torch.testing.assert_close(by_frozen, by_learned)


@pytest.mark.usefixtures("float64")
def test_a_recording_has_the_gradient_of_a_learned_prior():
    mixture, z = Mixture(), draws(6, 1, dim=2)[0].requires_grad_()
    leaves = [z, *mixture.parameters()]
    graph = make_fx(lambda z: Stein()(z, mixture))(draws(6, 1, dim=2)[0].requires_grad_())
    torch.testing.assert_close(graph(z), Stein()(z, mixture))
    torch.testing.assert_close(
        torch.autograd.grad(graph(z), leaves), torch.autograd.grad(Stein()(z, mixture), leaves)
    )


def test_without_gradients_there_is_a_value():
    mixture, z = Mixture(), draws(6, 1, dim=2)[0].requires_grad_()
    with torch.no_grad():
        value = Stein()(z, mixture)
    assert not value.requires_grad
    torch.testing.assert_close(value, Stein()(z, mixture).detach())
    assert z.grad is None


# --- where particles end


def descend(z, log_prob, *, steps, rate):
    """Stein variational gradient descent by torch's optimisers."""
    z = z.clone().requires_grad_()
    optimizer = torch.optim.SGD([z], lr=rate * len(z))  # the gradient is phi / n
    for _ in range(steps):
        optimizer.zero_grad()
        Stein()(z, log_prob).backward()
        optimizer.step()
    return z.detach()


@pytest.mark.usefixtures("float64")
def test_particles_from_afar_end_at_the_moments_of_a_normal():
    scale, loc = torch.tensor([1.5, 0.7]), torch.tensor([1.0, -2.0])

    def log_prob(z):
        return -((z - loc) / scale).square().sum(-1) / 2

    z = descend(6 + 0.1 * torch.randn(100, 2), log_prob, steps=600, rate=0.3)
    torch.testing.assert_close(z.mean(0), loc, rtol=0.0, atol=0.05)
    torch.testing.assert_close(z.std(0), scale, rtol=0.1, atol=0.0)


@pytest.mark.usefixtures("float64")
def test_particles_from_afar_end_at_the_moments_of_a_mixture():
    mixture = Mixture(locs=((-1.0,), (1.5,)), scales=(0.6, 0.8), weights=(0.4, 0.6))
    mixture.requires_grad_(False)
    z = descend(5 + torch.randn(100, 1), mixture, steps=1000, rate=0.5)
    mean = 0.4 * -1.0 + 0.6 * 1.5
    variance = 0.4 * (0.36 + 1.0) + 0.6 * (0.64 + 2.25) - mean**2
    assert z.mean().item() == pytest.approx(mean, abs=0.05)
    assert z.var().item() == pytest.approx(variance, rel=0.1)
    assert 0.3 < (z < 0.1).double().mean() < 0.5  # both components have their share


# --- the rest


def test_says_what_it_is_against():
    assert Stein.against == "density"
    assert getattr(MMD(), "against", "samples") == "samples"


def test_never_holds_all_pairs():
    """Memory grows with the draws: no tensor is larger than a block of pairs."""
    from test_mmd import Largest

    z = torch.randn(2000, 2, requires_grad=True)
    with Largest() as largest:
        Stein()(z, log_standard_normal).backward()
    assert largest.size <= 512**2


def test_half_precision_is_raised():
    z = draws(20, 1)[0].bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = Stein().from_score(z, -z)
    torch.testing.assert_close(value, Stein().from_score(z.float(), -z.float()))
    value.backward()
    assert z.grad.dtype == torch.bfloat16


four = torch.zeros(4, 3)
ERRORS = {
    "kernel": (lambda: Stein("rbf"), TypeError, "got 'rbf'. Try lvm.divergences.IMQ()"),
    "samples": (lambda: Stein()(four, four), TypeError, "got Tensor. Stein needs the density of p"),
    "scalar": (lambda: Stein()(four, torch.sum), ValueError, "of shape (4,); got (). Sum over"),
    "per_feature": (lambda: Stein()(four, torch.sin), ValueError, "(4,); got (4, 3). Sum over"),
    "number": (lambda: Stein()(four, lambda z: 1.0), ValueError, "of shape (4,); got float"),
    "constant": (lambda: Stein()(four, lambda z: four[:, 0]), ValueError, "got a constant."),
    "constant_with_parameters": (
        lambda: Stein()(four, lambda z: torch.zeros(4, requires_grad=True)),
        ValueError,
        "got a constant. Compute it with torch",
    ),
    "score_shape": (
        lambda: Stein().from_score(four, four[:, :2]),
        ValueError,
        "score of the shape of q_samples, (4, 3); got (4, 2)",
    ),
    "score_type": (lambda: Stein().from_score(four, four.long()), TypeError, "Expected score"),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, error, match):
    with pytest.raises(error, match=re.escape(match)):
        call()


def test_repr_names_the_kernel():
    assert repr(Stein()) == "Stein(kernel=IMQ(scales=(1.0,)))"
