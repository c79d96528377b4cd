"""Annealed importance sampling against closed forms and quadrature, and the kernel by itself."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.nn import PyroModule
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.compiled import recorded
from pyro_lvm.datasets import linear_gaussian
from pyro_lvm.marginal import (
    HMC,
    AdaptiveTemperatures,
    LinearTemperatures,
    SigmoidTemperatures,
    annealed_importance_sampling,
    importance_sampling,
)
from pyro_lvm.marginal.annealing.chains import Kernels, anneal, anneal_back, pilot_run
from pyro_lvm.marginal.annealing.ends import ends_of
from pyro_lvm.marginal.annealing.hamiltonian import Point, transition
from pyro_lvm.marginal.annealing.path import Path

pytestmark = pytest.mark.usefixtures("float64")

FEW = HMC(num_steps=5, num_pilots=32)  # as many chains as are measured: one recording for both


def off_posterior(problem, shift=0.3, widen=1.3):
    """The exact posterior, moved and widened."""

    def guide(x):
        loc, scale_tril = problem._posterior(x)
        loc = loc + shift * scale_tril.sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=widen * scale_tril))

    return guide


def check_within_errors(score, exact):
    z_scores = (score.log_prob - exact) / score.std_error
    assert z_scores.abs().max() < 5
    if len(z_scores) >= 20:  # of a few data the mean is too much a matter of chance
        assert 0.2 < z_scores.square().mean() < 2.5  # errors are neither too short nor too long
    assert (score.acceptance - score.aim).abs().max() < 0.1


def by_quadrature(model, low=-12.0, high=12.0, size=4001):
    """log p(x) of a model with one latent "z" in the reals, ``N``."""
    grid = torch.linspace(low, high, size)
    trace = poutine.trace(poutine.condition(model, data={"z": grid[:, None]})).get_trace()
    trace.compute_log_prob()
    log_joint = sum(trace.nodes[name]["log_prob"] for name in ("z", "x"))
    return log_joint.logsumexp(0) + math.log(grid[1] - grid[0])


# closed forms


@pytest.mark.parametrize(
    ("num_latents", "start", "temperatures"),
    [
        (2, "prior", 150),
        (2, "guide", 30),
        (10, "prior", 400),
        (10, "guide", 60),
        (50, "guide", 100),
        pytest.param(50, "prior", 2500, marks=pytest.mark.slow),
    ],
)
def test_annealing_is_within_its_errors_of_the_closed_form(num_latents, start, temperatures):
    problem = linear_gaussian(num_latents + 2, num_latents, scale=1.0)
    x = problem.sample(30)
    score = annealed_importance_sampling(
        problem.model,
        off_posterior(problem),
        x,
        num_samples=48,
        temperatures=temperatures,
        start=start,
    )
    check_within_errors(score, problem.log_prob(x))


def test_an_exact_guide_leaves_nothing_to_anneal():
    """log f_1 / f_0 is log p(x) everywhere: no noise from chains, at any temperatures."""
    problem = linear_gaussian(6, 3)
    x = problem.sample(4)
    for temperatures in (1, 7):
        score = annealed_importance_sampling(
            problem.model, problem.guide, x, temperatures=temperatures, start="guide"
        )
        assert torch.allclose(score.log_prob, problem.log_prob(x), rtol=0, atol=1e-9)
        assert score.std_error.max() < 1e-7


def test_one_step_is_importance_sampling_from_the_prior():
    problem = linear_gaussian(3, 1, scale=2.0)
    x = problem.sample(10)
    score = annealed_importance_sampling(
        problem.model, None, x, temperatures=1, num_samples=4000, chunk_size=1500
    )
    z_scores = (score.log_prob - problem.log_prob(x)) / score.std_error
    assert z_scores.abs().max() < 5
    assert score.acceptance.isnan().all()
    assert "accepted" not in str(score)


def test_bias_and_error_fall_with_the_temperatures():
    problem = linear_gaussian(8, 6)
    x = problem.sample(20)
    bias, error = [], []
    for temperatures in (5, 25, 125):
        score = annealed_importance_sampling(
            problem.model, None, x, temperatures=temperatures, transition=HMC(num_steps=5)
        )
        bias.append(float((problem.log_prob(x) - score.log_prob).mean()))
        error.append(float(score.std_error.mean()))
    assert bias[0] > 5 * bias[1] > 0
    assert bias[1] > 3 * bias[2] > 0
    assert error[0] > error[1] > 1.3 * error[2]


def test_annealing_makes_up_for_a_bad_guide():
    """At the same number of evaluations, importance sampling under that guide is far off."""
    problem = linear_gaussian(8, 6)
    x = problem.sample(20)

    def bad_guide(x):
        loc, scale_tril = problem._posterior(x)
        scale = scale_tril.diagonal()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + 2 * scale, 0.3 * scale).to_event(1))

    annealed = annealed_importance_sampling(
        problem.model, bad_guide, x, temperatures=300, num_samples=16, start="guide"
    )
    # those of the measured chains and of the pilot run, one for each leapfrog step
    num_evaluations = (16 + 4) * 300 * 10
    plain = importance_sampling(problem.model, bad_guide, x, num_samples=num_evaluations)
    exact = problem.log_prob(x).mean()
    assert abs(annealed.mean - exact) < 3 * annealed.sampling_std_error
    assert abs(plain.mean - exact) > 3 * annealed.sampling_std_error
    assert plain.mean < exact


# all kinds of pairs


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("auxiliary", "prior"),
        ("modules", "guide"),
        ("mixture_prior", "guide"),
        ("mixture_prior", "prior"),
        ("semi_supervised", "prior"),
        ("topics", "prior"),
        ("two_under_a_sum", "guide"),
    ],
)
def test_any_pair(name, start):
    problem = PROBLEMS[name]()
    score = annealed_importance_sampling(
        problem.model,
        problem.guide,
        *problem.args,
        num_samples=32,
        temperatures=40,
        start=start,
        transition=FEW,
    )
    z_scores = (score.log_prob - problem.log_prob) / score.std_error
    assert z_scores.abs().max() < 5
    assert score.std_error.max() < 0.3


def test_two_modes():
    """x = z^2 + z / 2 + noise: two modes, of different height and width."""
    x = torch.tensor([-0.2, 0.6, 1.5, 4.0])

    def model():
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2 + 0.5 * z, 0.2), obs=x)

    score = annealed_importance_sampling(model, None, num_samples=200, temperatures=100)
    z_scores = (score.log_prob - by_quadrature(model)) / score.std_error
    assert z_scores.abs().max() < 5
    assert score.std_error.max() < 0.15


def gamma_poisson(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.Gamma(2.5, 1.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def gamma_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("rate", dist.Gamma(2.0 + 0.8 * x, 2.0))


def log_gamma_poisson(x):
    """The negative binomial distribution."""
    return dist.GammaPoisson(2.5, 1.5).log_prob(x)


def beta_binomial(x):
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Beta(0.7, 2.0))
        pyro.sample("x", dist.Binomial(8, p), obs=x)


def dirichlet_multinomial(x):
    with pyro.plate("data", len(x)):
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([0.7, 2.0, 1.2])))
        pyro.sample("x", dist.Multinomial(6, p, validate_args=False), obs=x)


def in_a_range(x, upper):
    """z ~ U(0, upper_i), a range of each datum's own."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Uniform(0.0, upper))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def angle(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.VonMises(2.0, 1.5))
        pyro.sample("x", dist.Normal(z, 0.8), obs=x)


def log_angle(x):
    grid = torch.linspace(-math.pi, math.pi, 2001)[:-1, None]
    log_joint = dist.VonMises(2.0, 1.5).log_prob(grid) + dist.Normal(grid, 0.8).log_prob(x)
    return log_joint.logsumexp(0) + math.log(2 * math.pi / 2000)


def log_in_a_range(x, upper):
    noise = dist.Normal(x, 0.5)
    return ((noise.cdf(upper) - noise.cdf(torch.zeros(()))) / upper).log()


COUNTS = torch.tensor([0.0, 1.0, 4.0, 7.0])
TABLE = torch.tensor([[6.0, 0.0, 0.0], [1.0, 2.0, 3.0], [0.0, 5.0, 1.0]])
RANGES = torch.tensor([0.3, 1.0, -0.4]), torch.tensor([0.5, 3.0, 1.0])


@pytest.mark.parametrize(
    ("model", "guide", "args", "exact"),
    [
        (gamma_poisson, None, (COUNTS,), log_gamma_poisson),
        (gamma_poisson, gamma_guide, (COUNTS,), log_gamma_poisson),
        (
            beta_binomial,
            None,
            (COUNTS,),
            lambda x: dist.BetaBinomial(0.7, 2.0, 8).log_prob(x),
        ),
        (
            dirichlet_multinomial,
            None,
            (TABLE,),
            lambda x: dist.DirichletMultinomial(torch.tensor([0.7, 2.0, 1.2]), 6).log_prob(x),
        ),
        (in_a_range, None, RANGES, log_in_a_range),
        (angle, None, (torch.tensor([1.0, 3.0, -2.5]),), log_angle),
    ],
)
def test_constrained_latents(model, guide, args, exact):
    args = tuple(a.double() for a in args)
    score = annealed_importance_sampling(
        model,
        guide,
        *args,
        num_samples=32,
        temperatures=100,
        transition=FEW,
        start="prior" if guide is None else "guide",
    )
    z_scores = (score.log_prob - exact(*args)) / score.std_error
    assert z_scores.abs().max() < 5
    assert score.std_error.max() < 0.2


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_nested_plates_masks_and_scales(start):
    """x_j | z ~ N(z_0 + z_1, 3 I + 2) with N(x; m, 1)^0.5 = N(x; m, 2) (4 pi)^0.5 / (2 pi)^0.25."""
    problem = PROBLEMS["nested_masked"]()
    (x,) = problem.args
    exact = []
    for i in range(NUM_DATA):
        seen = x[:, i] if i % 2 else x[:3, i]
        covariance = 3 * torch.eye(len(seen)) + 2 * torch.ones(len(seen), len(seen))
        log_normal = dist.MultivariateNormal(torch.zeros(len(seen)), covariance).log_prob(seen)
        constant = 0.5 * math.log(4 * math.pi) - 0.25 * math.log(2 * math.pi)
        exact.append(log_normal + len(seen) * constant)
    score = annealed_importance_sampling(
        problem.model,
        problem.guide,
        x,
        num_samples=32,
        temperatures=300 if start == "guide" else 100,
        start=start,
        transition=FEW,
    )
    z_scores = (score.log_prob - torch.stack(exact)) / score.std_error
    assert z_scores.abs().max() < 5


def with_a_global_mean(x, *, shift):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z + shift, 0.5), obs=x)


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_global_latents_are_averaged_over(start):
    """In a plate of another name, and with a keyword argument."""
    x, shift = torch.randn(5), torch.linspace(-1, 1, 5)

    def guide(x, *, shift):
        pyro.sample("mean", dist.Normal(0.5, 0.7))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.5 * (x - shift), 0.8))

    score = annealed_importance_sampling(
        with_a_global_mean,
        guide,
        x,
        shift=shift,
        plate="rows",
        start=start,
        num_samples=96,
        chunk_size=32,
        temperatures=50,
        transition=FEW,
    )
    exact = dist.Normal(0.5 + shift, math.sqrt(0.7**2 + 1 + 0.25)).log_prob(x)
    check_within_errors(score, exact)


def test_point_estimates_of_global_latents_are_conditioned_on():
    x, shift = torch.randn(4), torch.zeros(4)

    def init(site):
        return torch.full(site["fn"].shape(), 0.4)

    guide = AutoDelta(with_a_global_mean, init_loc_fn=init)
    score = annealed_importance_sampling(
        with_a_global_mean,
        guide,
        x,
        shift=shift,
        plate="rows",
        num_samples=32,
        temperatures=50,
        transition=FEW,
    )
    check_within_errors(score, dist.Normal(0.4, math.sqrt(1.25)).log_prob(x))


def test_a_minibatch_that_the_pair_draws_is_held():
    """x_i = 10 i is known by its density: mixed up data would be far from every closed form."""
    x = 10 * torch.arange(30.0)
    plates = []

    def model():
        with pyro.plate("data", 30, subsample_size=4) as index:
            plates.append(index)
            z = pyro.sample("z", dist.Normal(x[index], 1.0))
            pyro.sample("x", dist.Normal(z, 1.0 + 0.1 * index), obs=x[index])

    score = annealed_importance_sampling(
        model, None, temperatures=50, num_samples=32, transition=FEW
    )
    scale = (1 + (1 + 0.1 * plates[-1]) ** 2).sqrt()
    check_within_errors(score, dist.Normal(0.0, scale).log_prob(torch.zeros(4)))


def test_minibatches_and_chunks():
    problem = linear_gaussian(4, 2, scale=1.0)
    x = problem.sample(10)
    score = annealed_importance_sampling(
        problem.model, None, x, num_samples=24, chunk_size=10, batch_size=4, temperatures=40
    )
    assert score.num_samples == 24
    assert score.acceptance.shape == (10,)
    assert ((score.log_prob - problem.log_prob(x)).abs() < 5 * score.std_error).all()
    whole = importance_sampling(problem.model, problem.guide, x, num_samples=1)
    assert score.observations.same_data(whole.observations)


# the kernel by itself


def gamma_in_logs(position):
    """u = log x with x ~ Gamma(3, 2), at every beta: 3 u - 2 exp(u), skewed to the left."""
    log_density = (3 * position - 2 * position.exp()).sum(-1)
    zeros = torch.zeros_like(log_density)
    return Point(position, log_density, zeros, 3 - 2 * position.exp(), torch.zeros_like(position))


def test_kernel_leaves_a_skewed_target_as_it_is():
    start = dist.Gamma(3.0, 2.0).sample((400, 50, 1)).log()
    beta, step = torch.ones(50), torch.full((50,), 1.0)
    point, rates = gamma_in_logs(start), []
    for _ in range(25):
        before = point.position
        point, accepted = transition(gamma_in_logs, point, beta, step, HMC(num_steps=3))
        moved = (point.position != before).double()[..., 0]
        rates.append(torch.stack([accepted.mean(), moved.mean(), moved.std() / 400 / 50**0.5]))
    x = point.position.exp().flatten()
    for power, expected in ((1, 1.5), (2, 3.0), (3, 7.5), (-1, 1.0)):
        error = (x**power).std() / len(x) ** 0.5
        assert abs((x**power).mean() - expected) < 5 * error
    probability, frequency, _ = torch.stack(rates).mean(0)
    assert 0.4 < probability < 0.9  # or the test would not see a correction that is missing
    assert abs(probability - frequency) < 0.005  # of half a million draws


def test_kernel_mixes_along_the_path():
    """Started from f_0 it reaches f_0^(1 - beta) f_1^beta: normals of other scales."""
    beta = torch.tensor([0.25, 0.7])

    def densities(u):
        log_start, log_end = -0.5 * u.square().sum(-1), -2.0 * (u - 1).square().sum(-1)
        force_start, force_end = -u, -4.0 * (u - 1)
        return Point(u, log_start, log_end - log_start, force_start, force_end - force_start)

    point = densities(torch.randn(5000, 2, 3))
    for _ in range(20):
        point, _ = transition(densities, point, beta, torch.full((2,), 0.5), HMC(num_steps=4))
    precision = 1 - beta + 4 * beta
    mean = point.position.mean((0, 2))
    variance = point.position.var(0).mean(-1)
    assert ((mean - 4 * beta / precision).abs() < 5 / (15_000 * precision).sqrt()).all()
    assert ((variance * precision - 1).abs() < 5 * math.sqrt(2 / 15_000)).all()


def test_what_is_not_finite_is_rejected():
    """A target that ends at 0: chains stay on their side, and one without density never moves."""

    def densities(u):
        inside = u[..., 0] > 0
        log_start = torch.where(inside, -u[..., 0], -torch.inf)
        force = torch.where(inside[..., None], -1.0, torch.nan)
        return Point(u, log_start, torch.zeros_like(log_start), force, torch.zeros_like(u))

    u = torch.ones(500, 2, 1)
    u[:, 1] = -1.0
    point = densities(u)
    for _ in range(10):
        point, accepted = transition(
            densities, point, torch.ones(2), torch.full((2,), 0.7), HMC(num_steps=2)
        )
    assert (point.position[:, 0] > 0).all()
    assert len(point.position[:, 0].unique()) > 400
    assert (point.position[:, 1] == -1).all()
    assert accepted[:, 1].isnan().all()


def test_chains_that_do_not_move_have_the_ratio_of_the_ends():
    """The increments of the temperature add up to 1, there and back."""

    def densities(u):
        return Point(u, torch.zeros(4, 3), u[..., 0].sin(), torch.zeros_like(u), u[..., :1].cos())

    point = densities(torch.randn(4, 3, 1))
    temperatures = [torch.full((3,), b) for b in (0.0, 0.2, 0.3, 0.9, 1.0)]
    kernels = Kernels(temperatures, [torch.zeros(3)] * 3)
    for run in (anneal, anneal_back):
        chains = run(densities, point, kernels, HMC())
        assert torch.allclose(chains.log_weight, point.log_ratio)
    assert kernels.num_steps == 4


# step sizes and temperatures


def test_measured_chains_accept_at_the_rate_of_the_pilot_run():
    """Data whose posteriors differ in scale by a factor of 300, from any first step size."""
    scale = torch.logspace(-2, 0.5, 6)
    x = scale * torch.randn(6)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), scale), obs=x)

    for step_size, acceptance in ((1e-4, 0.5), (0.1, 0.65), (100.0, 0.8)):
        hmc = HMC(num_steps=5, acceptance=acceptance, step_size=step_size)
        score = annealed_importance_sampling(model, None, x, temperatures=150, transition=hmc)
        assert (score.acceptance - acceptance).abs().max() < 0.1
        assert not any("accepted" in text for text in score.warnings())


def test_kernels_are_fixed_before_chains_are_measured():
    """The pilot run's kernels, and nothing of the measured chains, move these."""
    problem = linear_gaussian(4, 2)
    x = problem.sample(3)
    path = Path(ends_of(problem.model, None, (x,), {}, plate="data", start="prior"), (x,), {})
    with torch.no_grad():
        u = torch.randn(8, 3, 2)
        densities = path.densities(u, {})
        kernels = pilot_run(densities, densities(u), SigmoidTemperatures(20), HMC())
        assert len(kernels.step_sizes) == 19
        assert all(step.shape == (3,) for step in kernels.step_sizes)
        before = [t.clone() for t in (*kernels.temperatures, *kernels.step_sizes)]
        anneal(densities, densities(u), kernels, HMC())
        after = [*kernels.temperatures, *kernels.step_sizes]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_schedules():
    linear, sigmoid = LinearTemperatures(10).table(), SigmoidTemperatures(10, 4.0).table()
    assert torch.allclose(linear, torch.arange(11) / 10)
    for table in (linear, sigmoid):
        assert table[0] == 0
        assert table[-1] == 1
        assert (table.diff() > 0).all()
    assert torch.allclose(sigmoid + sigmoid.flip(0), torch.ones(11))  # alike at both ends
    steps = sigmoid.diff()
    b = torch.sigmoid(4 * (2 * torch.arange(11) / 10 - 1))
    assert torch.allclose(steps, b.diff() / (b[-1] - b[0]))
    assert steps[0] < steps[4] / 3


def test_adaptive_temperatures_have_the_conditional_ess_that_was_asked_for():
    """For log-ratios r ~ N(0, s^2) it is exp(-(s d)^2) K in large samples: d = 0.1 / s."""
    log_ratio = torch.randn(20_000, 3) * torch.tensor([5.0, 1.0, 0.01])
    schedule = AdaptiveTemperatures(math.exp(-0.01))
    beta = torch.zeros(3)
    following = schedule.after(beta, log_ratio, torch.zeros_like(log_ratio), 0)
    assert torch.allclose(following[:2], torch.tensor([0.02, 0.1]), rtol=0.05)
    assert following[2] == 1
    weight = (0.3 * log_ratio).softmax(0)  # as they would be at a temperature of 0.3
    later = schedule.after(beta + 0.3, log_ratio, 0.3 * log_ratio, 5)
    v = ((later - 0.3) * log_ratio).exp()
    ratio = (weight * v).sum(0).square() / (weight * v.square()).sum(0)
    assert torch.allclose(ratio[:2], torch.full((2,), math.exp(-0.01)))


def test_adaptive_temperatures_anneal():
    """A datum in the tail of the prior predictive has more temperatures than others need."""
    problem = linear_gaussian(4, 2, scale=1.0)
    x = problem.sample(6)
    score = annealed_importance_sampling(
        problem.model,
        None,
        x,
        num_samples=32,
        temperatures=AdaptiveTemperatures(0.98),
        transition=FEW,
    )
    check_within_errors(score, problem.log_prob(x))
    coarse = annealed_importance_sampling(
        problem.model, None, x, temperatures=AdaptiveTemperatures(0.6), transition=FEW
    )
    assert 3 * coarse.num_temperatures < score.num_temperatures
    with pytest.raises(ValueError, match="at most 5 temperatures"):
        annealed_importance_sampling(
            problem.model, None, x, temperatures=AdaptiveTemperatures(0.98, most=5)
        )


# precision, recordings, and what is left behind


def small_vae(num_features=6):
    encoder = lvm.nn.MLP(num_features, [5], head=lvm.nn.NormalHead(2))
    decoder = lvm.nn.MLP(2, [5], head=lvm.nn.NormalHead(num_features))
    return lvm.VAE(encoder, decoder)


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_double_precision_is_that_of_a_pair_in_double_precision(start, device):
    torch.set_default_dtype(torch.float32)
    vae, x = small_vae().to(device), torch.randn(4, 6, device=device)
    settings = {"temperatures": 8, "num_samples": 4, "start": start}
    before = {name: (p, p.data_ptr()) for name, p in vae.named_parameters()}
    torch.manual_seed(1)
    score = annealed_importance_sampling(vae.model, vae.guide, x, dtype=torch.float64, **settings)
    after = {name: (p, p.data_ptr()) for name, p in vae.named_parameters()}
    assert all(before[n][0] is p and before[n][1] == at for n, (p, at) in after.items())
    assert all(p.dtype == torch.float32 and p.grad is None for p in vae.parameters())
    assert torch.get_default_dtype() == torch.float32
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    double = annealed_importance_sampling(vae.double().model, vae.guide, x.double(), **settings)
    assert torch.allclose(score.log_prob, double.log_prob, rtol=0, atol=1e-10)
    assert score.log_prob.dtype == torch.float64
    assert score.log_prob.device.type == device


def test_double_precision_of_functions_and_their_store():
    torch.set_default_dtype(torch.float32)
    x = torch.randn(4)

    def model(x):
        shift = pyro.param("shift", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def exact_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - pyro.param("shift")) / 2, math.sqrt(0.5)))

    model(x)
    leaf = pyro.get_param_store()._params["shift"]
    score = annealed_importance_sampling(
        model, exact_guide, x, dtype=torch.float64, temperatures=3, start="guide"
    )
    shift = torch.tensor(0.3).double()
    exact = dist.Normal(shift, math.sqrt(2)).log_prob(x.double())
    assert torch.allclose(score.log_prob, exact, rtol=0, atol=1e-13)
    assert pyro.get_param_store()._params["shift"] is leaf
    assert leaf.dtype == torch.float32


def test_a_pair_is_put_back_after_an_error():
    torch.set_default_dtype(torch.float32)
    vae, x = small_vae(), torch.randn(4, 6)
    weight = torch.randn(2, 2)  # stays in single precision

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", vae.decoder(z @ weight), obs=x)

    with pytest.raises(ValueError, match=r"runs in torch.float64; got: .*parameters, buffers"):
        annealed_importance_sampling(model, vae.guide, x, dtype=torch.float64)
    assert torch.get_default_dtype() == torch.float32
    assert all(p.dtype == torch.float32 for p in vae.parameters())


def test_a_pair_that_cant_be_recorded_runs_in_python():
    """The same numbers under the same seed, and a warning that says why."""
    problem = linear_gaussian(4, 2)
    x = problem.sample(3)

    def looks(x):
        if float(x.sum()) == math.pi:
            raise ValueError
        problem.model(x)

    def looks_at_latents(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z @ problem.W.T + problem.loc
            if float(loc.sum()) == math.pi:
                raise ValueError
            pyro.sample("x", dist.Normal(loc, problem.scale).to_event(1), obs=x)

    scores = []
    for model in (problem.model, looks, looks_at_latents):
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hmc = HMC(num_steps=2)
            scores.append(
                annealed_importance_sampling(model, None, x, temperatures=6, transition=hmc)
            )
        texts = [str(w.message) for w in caught if "not recorded" in str(w.message)]
        assert len(texts) == (0 if model == problem.model else 1)
        assert all("looks at the value of a tensor" in text for text in texts)
    for other in scores[1:]:
        assert torch.allclose(scores[0].log_prob, other.log_prob, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_what_is_called_often_is_compiled(monkeypatch):
    vae, x = small_vae().double(), torch.randn(4, 6)
    compiled, compile_graph = [], recorded.compile_graph

    def counted(*args):
        compiled.append(compile_graph(*args))
        return compiled[-1]

    monkeypatch.setattr(recorded, "compile_graph", counted)
    path = Path(ends_of(vae.model, None, (x,), {}, plate="data", start="prior"), (x,), {})
    u, settings = torch.randn(4, 4, 2), {"temperatures": 5, "num_samples": 4}
    points = []
    for threshold, count in ((math.inf, 0), (0.0, 1)):
        monkeypatch.setattr(recorded, "_WORTH_COMPILING", threshold)
        with torch.no_grad():
            points.append(path.densities(u, {})(u + 1))
        annealed_importance_sampling(vae.model, None, x, **settings)
        assert len(compiled) == 2 * count  # of the path, and of pilot and measured chains alike
    for one, other in zip(*points, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


class Normalised(PyroModule):
    """A decoder with batch normalisation, and dropout if asked for."""

    def __init__(self, dropout):
        super().__init__()
        layer = nn.Dropout(0.5) if dropout else nn.BatchNorm1d(3)
        self.layers = nn.Sequential(nn.Linear(2, 3), layer)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.layers(z.flatten(0, -2)).unflatten(0, z.shape[:-1])
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("dropout", [False, True])
def test_modules_in_training_mode(dropout):
    model, x = Normalised(dropout), torch.randn(5, 3)
    before = [b.clone() for b in model.buffers()]
    with pytest.raises(ValueError, match=r"evaluation mode by \.eval"):
        annealed_importance_sampling(model, None, x, temperatures=5)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    score = annealed_importance_sampling(model.eval(), None, x, temperatures=5)
    assert score.log_prob.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_what_is_printed():
    problem = linear_gaussian(4, 2, scale=1.0)
    x = problem.sample(5)
    score = annealed_importance_sampling(problem.model, None, x, temperatures=50)
    text = str(score)
    assert "(annealed importance sampling, 16 samples; sampling error" in text
    assert f"50 temperatures; {float(score.acceptance.mean()):.2f} of proposals accepted" in text
    for shift, match in ((-0.3, "have hardly moved at 5 of 5 data"), (0.3, "shorter than")):
        off = lvm.marginal.AnnealedLogMarginal(
            **{**vars(score), "acceptance": score.acceptance + shift}
        )
        assert match in str(off)
    few = annealed_importance_sampling(
        problem.model, None, x, temperatures=2, num_samples=12, transition=HMC(num_steps=1)
    )
    assert "Take more temperatures, more leapfrog steps" in str(few)


# what is refused


def poisson_latent(x):
    with pyro.plate("data", len(x)):
        n = pyro.sample("n", dist.Poisson(2.0))
        z = pyro.sample("z", dist.Normal(n, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def poisson_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("n", dist.Poisson(2.0))
        pyro.sample("z", dist.Normal(x, 1.0))


def range_of_another(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Gamma(2.0, 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, top))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def on_a_sphere(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.ProjectedNormal(torch.tensor([1.0, 0.0, 2.0])))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def scaled_latent(x):
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def positive(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def real_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(-1.0, 0.1))


NORMAL = PROBLEMS["normal_normal"]()


@pytest.mark.parametrize(
    ("model", "guide", "settings", "match"),
    [
        (NORMAL.model, NORMAL.guide, {"num_samples": 0}, "num_samples.*positive integer; got 0"),
        (NORMAL.model, NORMAL.guide, {"chunk_size": 0}, "chunk_size.*positive integer; got 0"),
        (NORMAL.model, NORMAL.guide, {"batch_size": 0}, "batch_size.*positive integer; got 0"),
        (NORMAL.model, NORMAL.guide, {"temperatures": 0}, "temperatures.*positive integer; got 0"),
        (NORMAL.model, NORMAL.guide, {"temperatures": 0.5}, "number of steps.*got 0.5"),
        (NORMAL.model, NORMAL.guide, {"transition": 3}, r"an HMC\(...\); got 3"),
        (NORMAL.model, NORMAL.guide, {"start": "data"}, "start in .*; got 'data'"),
        (NORMAL.model, NORMAL.guide, {"dtype": torch.float16}, "torch.float64.*got torch.float16"),
        (NORMAL.model, NORMAL.guide, {"plate": "rows"}, "plate named 'rows'"),
        (NORMAL.model, None, {"start": "guide"}, "got None. Use start='prior'"),
        (poisson_latent, poisson_guide, {}, "finitely many values.*Poisson at site 'n'"),
        (range_of_another, None, {}, r"support of site 'z'.*Uniform\(0, 1\)"),
        (on_a_sphere, None, {}, "map to the reals.*at site 'z'"),
        (scaled_latent, None, {}, "not scaled.*at site 'z'"),
        (NORMAL.model, AutoNormal(NORMAL.model), {"start": "guide"}, "auxiliary sites.*'prior'"),
        (NORMAL.model, AutoDelta(NORMAL.model), {"start": "guide"}, r"masses, \['z'\].*'prior'"),
    ],
)
def test_what_is_refused(model, guide, settings, match):
    with pytest.raises(ValueError, match=match):
        annealed_importance_sampling(model, guide, NORMAL.args[0].double(), **settings)


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("mixture", {}, r"continuous latent.*discrete ones alone, \['z'\].*exact"),
        ("semi_supervised", {"start": "guide"}, r"discrete sites, \['y'\].*start='prior'"),
        ("auxiliary", {"start": "guide"}, r"auxiliary sites, \['a'\].*start='prior'"),
        ("global_and_local", {"batch_size": 2}, "subsamples plate 'data'"),
    ],
)
def test_pairs_that_are_refused(name, settings, match):
    problem = PROBLEMS[name]()
    with pytest.raises(ValueError, match=match):
        annealed_importance_sampling(problem.model, problem.guide, *problem.args, **settings)


def test_guides_outside_of_the_support_are_refused_without_validation_too():
    message = "within the support of site 'z'; got 24 outside"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        annealed_importance_sampling(positive, real_guide, torch.randn(6), start="guide")


def test_global_latents_need_a_guide():
    x = torch.randn(3)
    with pytest.raises(ValueError, match=r"outside of plate 'rows'; got None with \['mean'\]"):
        annealed_importance_sampling(with_a_global_mean, None, x, shift=0.0, plate="rows")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: HMC(num_steps=0), "num_steps.*positive integer"),
        (lambda: HMC(acceptance=1.0), "acceptance between 0 and 1; got 1.0"),
        (lambda: HMC(step_size=0.0), "step_size.*positive"),
        (lambda: HMC(jitter=1.0), "jitter from 0 to below 1"),
        (lambda: HMC(num_pilots=0), "num_pilots.*positive integer"),
        (lambda: LinearTemperatures(0), "num_steps.*positive integer"),
        (lambda: SigmoidTemperatures(10, 0.0), "sharpness.*positive"),
        (lambda: AdaptiveTemperatures(1.0), "conditional_ess between 0 and 1; got 1.0"),
        (lambda: AdaptiveTemperatures(num_chains=1), "num_chains >= 2"),
        (lambda: AdaptiveTemperatures(most=0), "most.*positive integer"),
    ],
)
def test_settings_that_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
