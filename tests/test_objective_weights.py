"""KL weights per site, free bits, schedules and enumeration under them, for any pair."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS, Problem
from pyro.infer import Trace_ELBO

from pyro_lvm import MMD
from pyro_lvm.divergences import Adversarial
from pyro_lvm.infer import CyclicSchedule, LinearSchedule, TraceInfo_ELBO
from pyro_lvm.pair import parameters_of
from pyro_lvm.terms import compute_terms

pytestmark = pytest.mark.usefixtures("float64")


def value_and_gradient(elbo, problem, seed=1):
    parameters = parameters_of(problem.model, problem.guide, problem.args)
    pyro.set_rng_seed(seed)
    loss, parts = elbo.loss_and_parts(problem.model, problem.guide, *problem.args)
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), [torch.zeros(()) if g is None else g for g in gradient], parts


def from_terms(problem, weights, *, alpha=0.0, seed=1):
    """The weighted loss and its gradient by the terms, and the terms."""
    pyro.set_rng_seed(seed)
    nesting = {"max_plate_nesting": 2 if problem is not None and "nested" in str(problem) else None}
    terms = compute_terms(problem.model, problem.guide, *problem.args, **nesting)
    kl = sum((1 - alpha) * weights.get(name, 1.0) * value for name, value in terms.kl.items())
    loss = terms.global_kl.mean() - terms.plate_scale * (terms.log_likelihood - kl).sum()
    parameters = parameters_of(problem.model, problem.guide, problem.args)
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), [torch.zeros(()) if g is None else g for g in gradient], terms


def assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-10)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, other.expand_as(mine), rtol=1e-9, atol=1e-9)


# --- KL weights


def test_kl_weight_is_beta():
    problem = PROBLEMS["normal_normal"]()
    beta = value_and_gradient(TraceInfo_ELBO(alpha=-3.0, lambda_=4.0), problem)
    assert_same(value_and_gradient(TraceInfo_ELBO(kl_weight=4.0), problem), beta)
    assert_same(value_and_gradient(TraceInfo_ELBO(kl_weight={"z": 4.0}), problem), beta)
    assert_same(value_and_gradient(TraceInfo_ELBO(kl_weight=torch.tensor(4.0)), problem), beta)


def test_kl_weights_are_per_site_and_beside_alpha():
    problem = PROBLEMS["two_under_a_sum"]()
    elbo = TraceInfo_ELBO(alpha=0.2, lambda_=0.8, kl_weight={"b": 3.0}, max_plate_nesting=1)
    elbo.loss(problem.model, problem.guide, *problem.args)
    assert_same(value_and_gradient(elbo, problem), from_terms(problem, {"b": 3.0}, alpha=0.2))


@pytest.mark.parametrize("name", ["mixture_prior", "two_under_a_sum"])
def test_alpha_beside_a_site_that_the_model_enumerates_weighs_the_marginal_prior(name):
    """log p(z) = log sum_y p(y) p(z | y): no host of Pyro's has it, and it is not refused."""
    problem = PROBLEMS[name]()
    elbo = TraceInfo_ELBO(alpha=0.4, lambda_=0.6, max_plate_nesting=1)
    elbo.loss(problem.model, problem.guide, *problem.args)
    assert_same(value_and_gradient(elbo, problem), from_terms(problem, {}, alpha=0.4))
    assert_same(value_and_gradient(elbo, problem), from_terms(problem, {}, alpha=0.4))


def test_the_marginal_prior_of_a_mixture_by_hand():
    problem = PROBLEMS["mixture_prior"]()
    (x,) = problem.args
    elbo = TraceInfo_ELBO(alpha=0.4, lambda_=0.6, max_plate_nesting=1)
    elbo.loss(problem.model, problem.guide, x)
    _, _, parts = value_and_gradient(elbo, problem)
    pyro.set_rng_seed(1)
    z = 0.8 * x + 0.5 * torch.randn(NUM_DATA)
    prior = dist.Normal(torch.tensor([-2.0, 1.0]), 1.0).log_prob(z[:, None])
    log_prior = (prior + torch.tensor([0.25, 0.75]).log()).logsumexp(-1)
    kl = dist.Normal(0.8 * x, 0.5).log_prob(z) - log_prior
    likelihood = dist.Normal(z, 0.5).log_prob(x)
    torch.testing.assert_close(parts["kl[z]"], kl.mean())
    torch.testing.assert_close(parts["loss"], (0.6 * kl - likelihood).mean())


def test_a_global_latent_beside_a_weighted_marginal_prior_keeps_its_plain_kl():
    x = torch.randn(NUM_DATA)

    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 3 * NUM_DATA, subsample=torch.arange(NUM_DATA)):
            y = pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(shift + torch.tensor([-1.0, 1.0])[y], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("shift", dist.Normal(pyro.param("loc", torch.tensor(0.4)), 0.5))
        with pyro.plate("data", 3 * NUM_DATA, subsample=torch.arange(NUM_DATA)):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.6)) * x, 0.5))

    problem = Problem(model, guide, (x,))
    elbo = TraceInfo_ELBO(alpha=0.4, lambda_=0.6, max_plate_nesting=1)
    elbo.loss(model, guide, x)
    ours = value_and_gradient(elbo, problem)
    assert_same(ours, from_terms(problem, {}, alpha=0.4))
    parts = ours[2]
    total = 0.6 * parts["kl[z]"] + parts["kl[global]"] - parts["reconstruction"]
    assert ours[0] == pytest.approx(3 * NUM_DATA * total.item())
    kl = dist.Normal(0.4, 0.5), dist.Normal(0.0, 2.0)
    pyro.set_rng_seed(1)
    shift = kl[0].sample()
    expected = kl[0].log_prob(shift) - kl[1].log_prob(shift)
    assert parts["kl[global]"].item() == pytest.approx(expected.item() / (3 * NUM_DATA))


def test_weights_of_enumerated_and_sampled_sites_of_the_guide():
    """y enumerated in the guide, z | y, x sampled there: each KL with its own weight, exactly."""
    problem = PROBLEMS["semi_supervised"]()
    weights = {"y": 0.5, "z": 3.0}
    elbo = TraceInfo_ELBO(kl_weight=weights, max_plate_nesting=1)
    elbo.loss(problem.model, problem.guide, *problem.args)
    loss, _, parts = value_and_gradient(elbo, problem)
    expected = 0.5 * parts["kl[y]"] + 3.0 * parts["kl[z]"] - parts["reconstruction"]
    assert loss / NUM_DATA == pytest.approx(expected.item())
    assert_same((loss, []), (from_terms(problem, weights)[0], []))


def test_weights_where_a_sum_and_a_score_function_meet_are_refused():
    x = torch.randn(NUM_DATA)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * y))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=pyro.param("slope", torch.tensor(0.3)) * x))

    TraceInfo_ELBO().loss(model, guide, x)
    with pytest.raises(ValueError, match=r"reparameterised latents.*\['y'\].*beside \['b'\]"):
        TraceInfo_ELBO(kl_weight=0.5).loss(model, guide, x)


# --- free bits


@pytest.mark.parametrize("name", ["normal_normal", "nested_masked", "auxiliary", "semi_supervised"])
def test_free_bits_take_the_larger_of_the_bound_and_the_kl(name):
    problem = PROBLEMS[name]()
    plain = value_and_gradient(TraceInfo_ELBO(max_plate_nesting=2), problem)
    kl = {k[3:-1]: v.item() for k, v in plain[2].items() if k.startswith("kl[")}
    for factor in (0.5, 2.0):
        free = {site: factor * value for site, value in kl.items() if value > 0}
        elbo = TraceInfo_ELBO(free_bits=free, max_plate_nesting=2)
        loss, _, parts = value_and_gradient(elbo, problem)
        extra = sum(max(0.0, free[site] - kl[site]) for site in free)
        assert parts["free_bits"].item() == pytest.approx(extra, abs=1e-12)
        assert loss == pytest.approx(plain[0] + NUM_DATA * extra)


def test_free_bits_leave_no_gradient_of_a_kl_below_them():
    """What remains is the gradient of the reconstruction, whatever the host."""
    problem = PROBLEMS["normal_normal"]()
    for host in (None, Trace_ELBO):
        free = value_and_gradient(TraceInfo_ELBO(free_bits=100.0, host=host), problem)
        without = value_and_gradient(TraceInfo_ELBO(kl_weight=0.0, host=host), problem)
        for mine, other in zip(free[1], without[1], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


def test_free_bits_carry_the_weight_of_the_kl():
    problem = PROBLEMS["normal_normal"]()
    losses = [
        value_and_gradient(TraceInfo_ELBO(free_bits=100.0, kl_weight=w), problem)[0]
        for w in (0.0, 0.5)
    ]
    assert losses[1] == pytest.approx(losses[0] + 0.5 * 100.0 * NUM_DATA)


# --- schedules


def test_schedules_are_in_force_and_among_the_parts():
    problem = PROBLEMS["normal_normal"]()
    warm_up = LinearSchedule(0.0, 1.0, steps=4)
    elbo = TraceInfo_ELBO(kl_weight=warm_up)
    assert elbo.schedules == {"kl_weight": warm_up}
    for step in range(6):
        warm_up.update(step=step, epoch=0)
        ours = value_and_gradient(elbo, problem)
        weight = min(1.0, step / 4)
        assert_same(ours, value_and_gradient(TraceInfo_ELBO(kl_weight=weight), problem))
        assert ours[2]["kl_weight"].item() == weight


def test_schedules_of_all_weights_have_names():
    alpha, lambda_ = LinearSchedule(0.0, 1.0, steps=5), CyclicSchedule(1.0, 2.0, steps=8)
    weight = LinearSchedule(0.0, 1.0, epochs=2)
    elbo = TraceInfo_ELBO(
        alpha=alpha, lambda_=lambda_, kl_weight={"z": weight, "w": 1.0}, divergence=MMD()
    )
    expected = {"alpha": alpha, "lambda": lambda_, "kl_weight[z]": weight}
    assert elbo.schedules == expected
    problem = PROBLEMS["normal_normal"]()
    elbo = TraceInfo_ELBO(alpha=alpha, lambda_=lambda_, kl_weight={"z": weight}, divergence=MMD())
    _, _, parts = value_and_gradient(elbo, problem)
    assert expected.keys() <= parts.keys()
    assert "kl_weight" not in value_and_gradient(TraceInfo_ELBO(), problem)[2]


# --- players


class Features(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, z):
        return self.linear(torch.cat([z, z**2], -1))


@pytest.mark.parametrize("weight", [torch.tensor(0.0), torch.tensor(0.1), torch.tensor(2.0)])
def test_the_discriminator_learns_by_its_own_loss_whatever_the_divergence_weighs(weight):
    problem = PROBLEMS["normal_normal"]()
    (x,) = problem.args
    adversarial = Adversarial(Features())
    elbo = TraceInfo_ELBO(alpha=0.0, lambda_=1.0 + weight, divergence=adversarial)
    loss, _, parts = value_and_gradient(elbo, problem)
    plain = value_and_gradient(TraceInfo_ELBO(), problem)
    expected = plain[0] + NUM_DATA * weight.item() * parts["divergence"].item()
    assert loss == pytest.approx(expected)
    pyro.set_rng_seed(1)
    loss = elbo.differentiable_loss(problem.model, problem.guide, x)
    ours = torch.autograd.grad(loss, list(adversarial.parameters()))
    pyro.set_rng_seed(1)
    q = 0.4 * x + 0.8 * torch.randn(NUM_DATA)
    p = torch.randn(NUM_DATA)
    player = adversarial.players(q[:, None], p[:, None])[1]
    assert parts["discriminator"].item() == pytest.approx(player.item())
    for mine, other in zip(
        ours, torch.autograd.grad(player, list(adversarial.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, NUM_DATA * other)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kl_weight": -0.1}, "kl_weight >= 0; got -0.1"),
        ({"kl_weight": {"z": math.nan}}, r"kl_weight\[z\].*finite"),
        ({"kl_weight": LinearSchedule(-1.0, 1.0, steps=3)}, "kl_weight >= 0; got -1"),
        ({"free_bits": -1.0}, "free_bits >= 0"),
        ({"alpha": LinearSchedule(0.0, -1.0, steps=3)}, "at the end.*a weight of -1"),
        ({"alpha": LinearSchedule(0.0, 1.0, steps=3)}, "expected a divergence.*1 at the end"),
    ],
)
def test_settings_that_are_refused(settings, match):
    with pytest.raises(ValueError, match=f"(?i){match}"):
        TraceInfo_ELBO(**settings)


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("normal_normal", {"kl_weight": {"w": 0.5}}, r"kl_weight of local latents.*\['w'\]"),
        ("global_and_local", {"kl_weight": {"mean": 0.5}}, r"\['mean'\].*has \['z'\]"),
        ("normal_normal", {"free_bits": {"w": 0.5}}, r"free_bits of local latents.*\['w'\]"),
        ("score_function", {"free_bits": 0.5}, r"reparameterised or enumerated.*\['y'\]"),
    ],
)
def test_what_is_refused(name, settings, match):
    problem = PROBLEMS[name]()
    with pytest.raises(ValueError, match=match):
        TraceInfo_ELBO(**settings).loss(problem.model, problem.guide, *problem.args)
