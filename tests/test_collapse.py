"""What latents know of the data: closed forms of active units, KL, information and covariance."""

import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback
from problems import NUM_DATA, PROBLEMS
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from torch import nn
from torch.distributions import kl_divergence

import pyro_lvm as lvm
from pyro_lvm.datasets import linear_gaussian
from pyro_lvm.diagnostics import collapse_report
from pyro_lvm.diagnostics.aggregate import discrepancy, log_det_covariance
from pyro_lvm.diagnostics.draws import draw
from pyro_lvm.diagnostics.held import hold
from pyro_lvm.diagnostics.information import information_of
from pyro_lvm.pair import inspect_pair
from pyro_lvm.plots import plot_collapse
from pyro_lvm.training import CollapseMetrics

pytestmark = pytest.mark.usefixtures("float64")


def near(estimate, expected, *, slack=1e-9):
    """Within five of its own standard errors."""
    return abs(estimate.value - float(expected)) <= 5 * estimate.std_error + slack


def shrunk(problem, a=0.7, b=0.3, scale=0.5):
    """q(z | x) = N(a m(x) + b, scale^2) with the posterior mean m: a normal aggregate."""

    def guide(x):
        loc, _ = problem.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * loc + b, scale).to_event(1))

    return guide


def aggregate_of(problem, a=0.7, b=0.3, scale=0.5):
    """Its aggregate over the population, N(b, a^2 Cov[m] + scale^2) with Cov[m] = 1 - C."""
    tril = problem.posterior(problem.loc.unsqueeze(0))[1]
    identity = torch.eye(len(tril), dtype=tril.dtype)
    covariance = a**2 * (identity - tril @ tril.T) + scale**2 * identity
    return dist.MultivariateNormal(torch.full((len(tril),), b, dtype=tril.dtype), covariance)


def standard_normal(size):
    return dist.MultivariateNormal(torch.zeros(size), torch.eye(size))


def test_exact_posterior_of_a_linear_gaussian(device):
    """q(z) over the population is the prior, and I = log det(1 + W' S W) / 2."""
    cpu = linear_gaussian(6, 2, scale=1.5)
    problem = cpu.to(device)
    x = problem.sample(2000)
    report = collapse_report(problem.model, problem.guide, x)
    loc, tril = problem.posterior(x)
    information = -2 * tril.diagonal().log().sum() / 2
    found, aggregate = report.information, report.aggregate
    assert near(found.lower, information)
    assert near(found.upper, information)
    assert found.lower.value < found.upper.value < found.lower.value + 0.05
    assert found.lower.std_error < 0.03
    assert near(found.kl_lower, 0.0)
    assert near(found.kl_upper, 0.0)
    assert found.kl_lower.std_error < 0.01  # the noise of log q is gone
    assert near(aggregate.log_det_covariance, 0.0)
    assert aggregate.prior_log_det_covariance == (0.0, 0.0)
    assert near(aggregate.mmd, 0.0)
    assert abs(aggregate.mmd.value) < 5 * aggregate.mmd_null_std_error
    # exact for these data
    prior = dist.MultivariateNormal(torch.zeros_like(loc[0]), torch.eye(2).to(loc))
    kl = kl_divergence(dist.MultivariateNormal(loc, scale_tril=tril), prior)
    assert report.kl.value == pytest.approx(float(kl.mean()), rel=1e-9)
    assert report.kl.std_error == pytest.approx(float(kl.std() / math.sqrt(2000)), rel=1e-9)
    (latent,) = report.latents
    marginal = dist.Normal(loc, tril.square().sum(-1).sqrt())
    by_dimension = kl_divergence(marginal, dist.Normal(torch.zeros_like(loc), 1.0)).mean(0)
    assert torch.allclose(latent.kl_of_dimensions, by_dimension)
    assert torch.allclose(latent.variance_of_mean, loc.var(0))
    assert report.num_active == report.num_units == 2
    assert "q(z) is not seen to differ from the prior" in report.findings[0]


def test_a_decoder_that_ignores_its_latents():
    """The guide is the prior: no unit is active, and nothing is known."""
    x = torch.randn(400, 3)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(1e-6 * x @ torch.ones(3, 5), 1.0).to_event(1))

    report = collapse_report(model, guide, x)
    assert report.num_active == 0
    assert report.num_units == 5
    for estimate in (report.kl, report.information.lower, report.information.upper):
        assert near(estimate, 0.0)
        assert abs(estimate.value) < 1e-4
    assert near(report.information.kl_upper, 0.0)
    assert near(report.aggregate.log_det_covariance, 0.0)
    assert abs(report.aggregate.mmd.value) < 5 * report.aggregate.mmd_null_std_error
    assert "0 of 5 units are active and I(x; z) is below 0.05 nats" in report.findings[0]
    assert "kl_weight=LinearSchedule" in str(report)


@pytest.mark.parametrize("settings", [{}, {"a": 0.2, "b": 0.0, "scale": 0.9}, {"b": -1.0}])
def test_normal_aggregates_have_closed_forms(settings):
    problem = linear_gaussian(6, 2, scale=1.5)
    x = problem.sample(1000)
    report = collapse_report(problem.model, shrunk(problem, **settings), x)
    aggregate = aggregate_of(problem, **settings)
    q = dist.Normal(torch.zeros(2), settings.get("scale", 0.5)).to_event(1)
    information = aggregate.entropy() - q.entropy()
    divergence = kl_divergence(aggregate, standard_normal(2))
    found = report.information
    assert near(found.lower, information)
    assert near(found.upper, information)
    assert near(found.kl_lower, divergence)
    assert near(found.kl_upper, divergence)
    assert near(report.aggregate.log_det_covariance, torch.logdet(aggregate.covariance_matrix))
    assert near(report.kl, information + divergence)
    assert found.lower.value + found.kl_upper.value == pytest.approx(report.kl.value)
    assert found.upper.value + found.kl_lower.value == pytest.approx(report.kl.value)
    assert max(e.std_error for e in (found.lower, found.upper, found.kl_lower)) < 0.06


def test_bounds_and_errors_over_many_data_sets():
    """Lower bounds are below, upper ones above, and errors are as long as they should be."""
    problem, settings = linear_gaussian(6, 2, scale=1.5), {"a": 1.0, "b": 0.3, "scale": 0.3}
    guide, aggregate = shrunk(problem, **settings), aggregate_of(problem, **settings)
    q = dist.Normal(torch.zeros(2), 0.3).to_event(1)
    information = float(aggregate.entropy() - q.entropy())
    divergence = float(kl_divergence(aggregate, standard_normal(2)))
    log_det = float(torch.logdet(aggregate.covariance_matrix))
    names = ("lower", "upper", "kl_lower", "kl_upper")
    rows, sizes = [], []
    for _ in range(60):
        report = collapse_report(problem.model, guide, problem.sample(60), num_samples=4)
        found = [getattr(report.information, n) for n in names]
        found.append(report.aggregate.log_det_covariance)
        rows.append([e.value for e in found])
        sizes.append([e.std_error for e in found])
    rows, sizes = torch.tensor(rows), torch.tensor(sizes)
    truth = torch.tensor([information, information, divergence, divergence, log_det])
    off = (rows.mean(0) - truth) / (rows.std(0) / math.sqrt(60))
    assert off[0] < -2
    assert off[1] > 2
    assert off[2] < -2
    assert off[3] > 2
    assert abs(off[4]) < 5
    ratio = rows.std(0) / sizes.mean(0)
    assert (ratio > 0.6).all()
    assert (ratio < 1.5).all()


def test_information_beyond_log_n_is_not_seen():
    problem = linear_gaussian(6, 2, scale=0.05)
    x = problem.sample(100)
    report = collapse_report(problem.model, problem.guide, x)
    tril = problem.posterior(x)[1]
    information = -tril.diagonal().log().sum()
    assert information > math.log(100) + 1
    assert report.information.lower.value < math.log(100) + 5 * report.information.lower.std_error
    assert report.information.upper.value > information
    assert any("near its largest value, log N = 4.61" in f for f in report.findings)


def test_chunks_and_subsets_of_the_table():
    problem = linear_gaussian(6, 2, scale=1.5)
    x = problem.sample(150)
    structure = inspect_pair(problem.model, problem.guide, (x,))
    pair = hold(problem.model, problem.guide, (x,), {}, structure)
    draws = draw(pair, 4, chunk_size=3)
    assert draws.latents["z"].values.shape == (4, 150, 2)
    whole, *parts = (
        information_of(pair, draws.samples, draws.kl, num_draws=1000, chunk_size=size)
        for size in (None, 7, 1)
    )
    for other in parts:
        for name in ("lower", "upper", "kl_lower", "kl_upper"):
            one, two = (tuple(getattr(found, name)) for found in (whole, other))
            assert one == pytest.approx(two, rel=1e-6)
    some = collapse_report(problem.model, problem.guide, x, num_draws=50)
    assert (some.information.num_draws, some.information.num_data) == (50, 150)
    assert some.aggregate.num_draws == 50
    information = -problem.posterior(x)[1].diagonal().log().sum()
    assert near(some.information.lower, information)
    assert some.information.kl_upper.std_error > whole.kl_upper.std_error


def chain(x):
    with pyro.plate("data", len(x)):
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
        pyro.sample("x", dist.Normal(z2, 1.0), obs=x)


def chain_guide(x):
    """The exact posterior of the chain, from its lower end."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(2 * x / 3, math.sqrt(2 / 3)))
        pyro.sample("z1", dist.Normal(0.5 * z2, math.sqrt(0.5)))


def test_hierarchies():
    """I(x; z1, z2) = I(x; z2) = log(3) / 2; E[z1 | x] = x / 3 from conditional means at draws."""
    x = math.sqrt(3.0) * torch.randn(1500)
    report = collapse_report(chain, chain_guide, x, num_samples=16)
    information = 0.5 * math.log(3.0)
    assert near(report.information.lower, information)
    assert near(report.information.upper, information)
    assert near(report.information.kl_upper, 0.0)
    assert near(report.kl, information)
    z2, z1 = report.latents
    assert (z2.site, z1.site) == ("z2", "z1")
    assert z2.variance_of_mean.item() == pytest.approx(float(4 * x.var() / 9), rel=1e-9)
    # each E[z1 | x] has an error of (1/2)^2 (2/3) / 16 by its draws, which is taken off
    bias = 0.25 * (2 / 3) / 16
    assert abs(z1.variance_of_mean.item() - float(x.var() / 9)) < bias
    covariance = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    assert near(report.aggregate.log_det_covariance, torch.logdet(covariance))
    assert near(report.aggregate.prior_log_det_covariance, torch.logdet(covariance))
    assert report.aggregate.prior_log_det_covariance.std_error > 0


def test_one_order_has_closed_forms():
    """With the guide in the model's order, KL(q(z2 | z1, x) || p(z2 | z1)) is that of normals."""

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x / 3, 0.8))
            pyro.sample("z2", dist.Normal(z1 + 0.3, 0.5))

    x = torch.randn(50)
    z1, z2 = collapse_report(chain, guide, x).latents
    expected = kl_divergence(dist.Normal(x / 3, 0.8), dist.Normal(0.0, 1.0)).mean()
    assert z1.kl.value == pytest.approx(float(expected))
    exact = kl_divergence(dist.Normal(torch.tensor(0.3), 0.5), dist.Normal(0.0, 1.0))
    assert z2.kl.value == pytest.approx(float(exact))
    assert z2.kl_of_dimensions.item() == pytest.approx(float(exact))


@pytest.mark.parametrize("infer", [{}, {"enumerate": "parallel"}])
def test_discrete_latents(infer):
    """I(x; y) = H(mean p) - mean H(p) for x = -1 or 1; no active units."""
    x = torch.tensor([-1.0, 1.0]).repeat(400)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3), infer=infer)
            pyro.sample("x", dist.Normal(2 * y - 1, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=1.5 * x), infer=infer)

    report = collapse_report(model, guide, x)
    p = torch.sigmoid(torch.tensor([-1.5, 1.5]))
    information = dist.Bernoulli(p.mean()).entropy() - dist.Bernoulli(p).entropy().mean()
    assert near(report.information.lower, information)
    assert near(report.information.upper, information)
    kl = kl_divergence(dist.Bernoulli(p), dist.Bernoulli(0.3)).mean()
    assert report.kl.value == pytest.approx(float(kl))
    divergence = kl_divergence(dist.Bernoulli(p.mean()), dist.Bernoulli(0.3))
    assert near(report.information.kl_upper, divergence)
    assert report.aggregate is None
    assert report.num_units == 0
    assert report.latents[0].variance_of_mean is None
    assert "log det" not in str(report)


def test_enumerated_and_sampled_latents_together():
    problem = PROBLEMS["semi_supervised"]()
    report = collapse_report(problem.model, problem.guide, *problem.args, num_samples=4000)
    y, z = report.latents
    assert (y.site, z.site) == ("y", "z")
    x = problem.args[0]
    q = dist.Categorical(logits=torch.stack([-0.8 * x, 0.8 * x], -1))
    kl_y = kl_divergence(q, dist.Categorical(torch.tensor([0.25, 0.75])).expand(x.shape))
    assert y.kl.value == pytest.approx(float(kl_y.mean()))
    centre = torch.tensor([-2.0, 1.0])
    loc = 0.8 * (x[:, None] - centre)
    kl_z = (q.probs * kl_divergence(dist.Normal(loc, 0.5), dist.Normal(0.0, 1.0))).sum(-1)
    assert z.kl.value == pytest.approx(float(kl_z.mean()), rel=0.02)
    mean = (q.probs * loc).sum(-1)
    assert z.variance_of_mean.item() == pytest.approx(float(mean.var()), abs=0.01)


def test_a_mixture_prior_is_summed_out():
    """Draws of one normal against 0.25 N(-2, 1) + 0.75 N(1, 1): KL by quadrature, I = 0."""
    problem = PROBLEMS["mixture_prior"]()
    x = torch.randn(500)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.1, 1.5))

    report = collapse_report(problem.model, guide, x)
    grid = torch.linspace(-12, 12, 8001)
    log_q = dist.Normal(0.1, 1.5).log_prob(grid)
    parts = dist.Normal(torch.tensor([-2.0, 1.0]), 1.0).log_prob(grid[:, None])
    log_p = (parts + torch.tensor([0.25, 0.75]).log()).logsumexp(-1)
    expected = torch.trapezoid(log_q.exp() * (log_q - log_p), grid)
    assert near(report.information.kl_upper, expected)
    assert near(report.kl, expected)
    assert report.kl.std_error < 0.02
    assert near(report.information.lower, 0.0)
    assert report.latents[0].kl_of_dimensions is None
    variance = 1 + 0.25 * 0.75 * 9
    assert near(report.aggregate.prior_log_det_covariance, math.log(variance))
    with pytest.raises(ValueError, match="KL is known dimension by dimension"):
        plot_collapse(report)


def test_a_prior_given_conditions_is_their_mixture():
    """p(z | y) = q(z | x, y) = N(y, 1/4): no KL, I(x; z) = log(5) / 2, and q(z) = p(z)."""
    x, y = torch.randn(1000), torch.randn(1000)

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(y, 0.5))

    report = collapse_report(model, guide, x, y=y)
    assert report.kl.value == pytest.approx(0.0, abs=1e-12)
    assert near(report.information.lower, 0.5 * math.log(5.0))
    assert report.information.lower.std_error > 0.005
    assert near(report.information.kl_upper, 0.0)
    assert near(report.aggregate.prior_log_det_covariance, math.log(1.25))
    assert near(report.aggregate.mmd, 0.0)


FAMILIES = {  # guide, prior and what is known of the KL of each dimension
    "Gamma": (lambda x: dist.Gamma(x.exp() + 1, 2.0), dist.Gamma(2.0, 1.0)),
    "LogNormal": (lambda x: dist.LogNormal(x, 0.5), dist.LogNormal(0.0, 1.0)),
    "Laplace": (lambda x: dist.Laplace(x, 0.5), dist.Laplace(torch.tensor(0.0), 1.0)),
    "Beta": (lambda x: dist.Beta(x.exp(), 2.0), dist.Beta(torch.tensor(1.0), 1.0)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    make, prior = FAMILIES[name]
    x = torch.randn(100)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", make(x))

    report = collapse_report(model, guide, x)
    q, (latent,) = make(x), report.latents
    expected = kl_divergence(q, prior.expand(q.batch_shape)).mean()
    assert latent.kl_of_dimensions.item() == pytest.approx(float(expected))
    assert report.kl.value == pytest.approx(float(expected))
    assert latent.variance_of_mean.item() == pytest.approx(float(q.mean.var()))
    assert report.aggregate.prior_log_det_covariance.value == pytest.approx(
        float(prior.variance.log())
    )


def test_a_dirichlet_has_beta_marginals():
    x = torch.tensor([[6.0, 0.0, 0.0], [2.0, 2.0, 2.0], [0.0, 1.0, 5.0]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Multinomial(6, probs=z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(x + 1))

    report = collapse_report(model, guide, x)
    expected = kl_divergence(dist.Beta(x + 1, 8 - x), dist.Beta(torch.tensor(1.0), 2.0)).mean(0)
    assert torch.allclose(report.latents[0].kl_of_dimensions, expected)
    log_det = report.aggregate.log_det_covariance  # its draws are on a plane
    assert log_det.value < -20


def flow(loc, scale):
    base = dist.Normal(loc, scale)
    return dist.TransformedDistribution(base, [dist.transforms.AffineTransform(1.0, 2.0)])


def test_what_has_no_closed_form_is_sampled():
    """A flow that is a normal in disguise, N(2 x + 1, 1): its mean and KL by draws."""
    x = torch.randn(400)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", flow(x, 0.5))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(1.0, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    report = collapse_report(model, guide, x, num_samples=200)
    (latent,) = report.latents
    # the noise of 400 means with a standard error of 1 / sqrt(200), their squares averaged
    assert latent.variance_of_mean.item() == pytest.approx(float(4 * x.var()), abs=0.05)
    expected = kl_divergence(dist.Normal(2 * x + 1, 1.0), dist.Normal(1.0, 2.0)).mean()
    assert latent.kl_of_dimensions.item() == pytest.approx(float(expected), abs=0.02)
    assert near(report.information.upper, 0.5 * math.log(5.0))


def test_nested_plates_are_flattened():
    """Words in documents, exact posteriors: a unit for each position."""
    x = math.sqrt(2.0) * torch.randn(3, 300)

    def model(x):
        with pyro.plate("data", 300, dim=-1), pyro.plate("words", 3, dim=-2):
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(w[..., 0], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 300, dim=-1), pyro.plate("words", 3, dim=-2):
            loc = torch.stack([x / 2, torch.zeros_like(x)], -1)
            scale = torch.tensor([math.sqrt(0.5), 1.0])
            pyro.sample("w", dist.Normal(loc, scale).to_event(1))

    report = collapse_report(model, guide, x)
    (latent,) = report.latents
    assert latent.shape == (3, 2)
    variance = latent.variance_of_mean.reshape(3, 2)
    assert torch.allclose(variance[:, 0], x.var(1) / 4)
    assert variance[:, 1].abs().max() < 1e-12
    assert latent.active.tolist() == [True, False] * 3
    assert latent.name_of(4) == "w[2, 0]"
    assert near(report.information.lower, 1.5 * math.log(2.0))
    assert near(report.kl, 1.5 * math.log(2.0))
    assert "3 of 6 units do not vary with the data" in str(report)


def test_masked_latents_have_no_aggregate():
    mask = torch.rand(3, 20) > 0.3
    mask[:, :3] = True
    x = torch.randn(3, 20)

    def model(x):
        with (
            pyro.plate("data", 20, dim=-1),
            pyro.plate("words", 3, dim=-2),
            poutine.mask(mask=mask),
        ):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        with (
            pyro.plate("data", 20, dim=-1),
            pyro.plate("words", 3, dim=-2),
            poutine.mask(mask=mask),
        ):
            pyro.sample("w", dist.Normal(x / 2, 0.7))

    report = collapse_report(model, guide, x)
    assert report.information is None
    assert report.aggregate is None
    assert "['w'] are under a mask" in str(report)
    kl = kl_divergence(dist.Normal(x / 2, 0.7), dist.Normal(0.0, 1.0)) * mask
    (latent,) = report.latents
    assert torch.allclose(latent.kl_of_dimensions, kl.mean(1))
    assert report.kl.value == pytest.approx(float(kl.sum(0).mean()))
    expected = torch.stack([(x[i][mask[i]] / 2).var() for i in range(3)])
    assert torch.allclose(latent.variance_of_mean, expected)


def test_a_users_scale_is_left_away():
    problem = linear_gaussian(6, 2, scale=1.5)
    x = problem.sample(50)

    def scaled(program):
        def run(x):
            with poutine.scale(scale=0.1):
                program(x)

        return run

    reports = []
    for wrap in (lambda program: program, scaled):
        pyro.set_rng_seed(2)
        reports.append(collapse_report(wrap(problem.model), wrap(problem.guide), x))
    assert str(reports[0]) == str(reports[1])


def test_auxiliary_sites():
    """z = a + 1: the same numbers as of a guide that draws z itself."""
    problem = PROBLEMS["auxiliary"]()
    (x,) = problem.args

    def direct(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.4 * x, 0.7))

    reports = []
    for guide in (problem.guide, direct):
        pyro.set_rng_seed(2)
        reports.append(collapse_report(problem.model, guide, x, num_samples=2000))
    one, two = reports
    assert one.kl.value == pytest.approx(two.kl.value, abs=0.05)
    assert one.latents[0].kl == one.kl
    assert near(one.information.lower, two.information.lower.value)
    assert one.information.upper.value == pytest.approx(two.information.upper.value, abs=0.1)
    assert one.latents[0].variance_of_mean == pytest.approx(
        two.latents[0].variance_of_mean, abs=0.02
    )


def test_what_each_datum_computes_in_its_own_way_has_no_density():
    x = torch.randn(20)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([20]), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(x + a))

    report = collapse_report(PROBLEMS["auxiliary"]().model, guide, x)
    assert report.information is None
    assert report.aggregate is not None
    assert "in another way for each datum" in str(report)


def test_one_draw_of_global_latents_is_held():
    """z ~ N(g, 1) around one g of the guide, far from where the prior of g draws."""
    problem = PROBLEMS["global_and_local"]()
    report = collapse_report(problem.model, problem.guide)
    assert report.num_data == NUM_DATA
    assert report.aggregate.prior_log_det_covariance == (0.0, 0.0)  # g is the same in all draws

    def far_model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 30.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def far_guide(x):
        mean = pyro.sample("mean", dist.Normal(100.0, 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean + 0.8 * x, math.sqrt(0.2)))

    x = math.sqrt(1.25) * torch.randn(500)
    report = collapse_report(far_model, far_guide, x)
    assert abs(report.aggregate.mmd.value) < 5 * report.aggregate.mmd_null_std_error
    assert near(report.information.kl_upper, 0.0)
    assert near(report.information.lower, 0.5 * math.log(5.0))


def test_one_minibatch_is_held():
    """Latents that are far apart: draws of one minibatch belong to no datum of another."""
    x = 10 * torch.arange(100.0)

    def program(observe):
        def run():
            with pyro.plate("data", 100, subsample_size=20) as index:
                if not observe:
                    pyro.sample("z", dist.Normal(x[index], 1.0))
                    return
                z = pyro.sample("z", dist.Normal(0.0, 1000.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])

        return run

    report = collapse_report(program(True), program(False), num_samples=4, chunk_size=2)
    assert report.information.lower.value == pytest.approx(math.log(20), abs=0.01)
    (latent,) = report.latents
    assert latent.variance_of_mean > 100


def test_point_estimates_of_global_latents():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    inner = AutoDelta(
        poutine.block(model, expose=["mean"]), init_loc_fn=lambda _: torch.tensor(0.7)
    )

    def guide(x):
        inner(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x + 0.14, math.sqrt(0.2)))

    x = 0.7 + math.sqrt(1.25) * torch.randn(1000)
    report = collapse_report(model, guide, x, plate="rows")
    expected = kl_divergence(dist.Normal(0.8 * x + 0.14, math.sqrt(0.2)), dist.Normal(0.7, 1.0))
    assert report.kl.value == pytest.approx(float(expected.mean()), rel=1e-6)
    assert near(report.information.kl_upper, 0.0)
    assert near(report.information.lower, 0.5 * math.log(5.0))


def test_inactive_units_and_a_shifted_aggregate_are_told():
    problem = linear_gaussian(6, 3, scale=0.5)
    x = problem.sample(300)

    def guide(x):
        loc, _ = problem.posterior(x)
        still = torch.tensor([1.0, 1.0, 0.0], dtype=loc.dtype)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc * still + 2 * (1 - still), 0.5).to_event(1))

    report = collapse_report(problem.model, guide, x)
    assert report.latents[0].active.tolist() == [True, True, False]
    assert report.num_active == 2
    expected = kl_divergence(dist.Normal(2.0, 0.5), dist.Normal(0.0, 1.0))
    text = str(report)
    assert "1 of 3 units do not vary with the data" in text
    assert f"Inactive units cost {expected:.2f} nats of KL" in text
    assert "KL(q(z) || p(z)) is above 0.5 nats and MMD^2 is above 5" in text
    table = [line.split() for line in text.splitlines() if line.startswith("z[")]
    assert [float(row[1]) for row in table] == sorted([float(r[1]) for r in table], reverse=True)
    everything = collapse_report(problem.model, guide, x, threshold=1e9)
    assert everything.num_active == 0


def test_amortisation_gap_on_request():
    problem = linear_gaussian(6, 2)
    x = problem.sample(50)
    report = collapse_report(problem.model, shrunk(problem), x)
    assert report.amortisation_gap is None
    report = collapse_report(problem.model, shrunk(problem, b=1.0), x, refine_steps=400)
    q = poutine.trace(shrunk(problem, b=1.0)).get_trace(x).nodes["z"]["fn"]
    loc, tril = problem.posterior(x)
    posterior = dist.MultivariateNormal(loc, scale_tril=tril)
    kl = kl_divergence(dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance)), posterior)
    precision = torch.cholesky_inverse(tril).diagonal()
    best = tril.diagonal().log().sum() + precision.log().sum() / 2
    assert report.amortisation_gap.value == pytest.approx(float(kl.mean() - best), rel=0.05)
    assert "The encoder loses" in str(report)


def test_nothing_is_left_in_the_pair():
    """Batch normalisation and dropout in both networks, one of them training and one not."""
    x = torch.randn(30, 4)

    def network(*sizes):
        first, middle, last = sizes
        layers = nn.Linear(first, middle), nn.BatchNorm1d(middle), nn.Dropout(0.5)
        return nn.Sequential(*layers, nn.Linear(middle, last))

    encoder, decoder = network(4, 8, 2), network(2, 8, 4)
    vae = lvm.VAE(
        lambda x: dist.Normal(encoder(x), 1.0).to_event(1),
        lambda z: dist.Normal(decoder(z), 1.0).to_event(1),
    )
    vae.networks = nn.ModuleList([encoder, decoder])
    vae.train()
    decoder.eval()
    state = {k: v.clone() for k, v in vae.state_dict().items()}
    collapse_report(vae.model, vae.guide, x, refine_steps=2, chunk_size=1)
    assert all(torch.equal(v, state[k]) for k, v in vae.state_dict().items())
    assert all(p.grad is None for p in vae.parameters())
    assert vae.training
    assert encoder.training
    assert not decoder.training


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("mixture", {}, r"samples local latents in plate 'data'; got none .*\['z'\]"),
        ("normal_normal", {"plate": "rows"}, "plate named 'rows'"),
        ("normal_normal", {"num_samples": 1}, "num_samples to be a number >= 2"),
        ("normal_normal", {"num_draws": 1}, "num_draws to be a number >= 2"),
        ("normal_normal", {"num_draws": 2.5}, "num_draws to be a positive integer"),
        ("normal_normal", {"chunk_size": 0}, "chunk_size to be a positive integer"),
        ("normal_normal", {"refine_steps": -1}, "refine_steps to be a positive integer"),
    ],
)
def test_what_is_refused(name, settings, match):
    problem = PROBLEMS[name]()
    with pytest.raises(ValueError, match=match):
        collapse_report(problem.model, problem.guide, *problem.args, **settings)


def test_a_single_datum_and_point_masses_are_refused():
    problem = PROBLEMS["normal_normal"]()
    with pytest.raises(ValueError, match=r"at least two data in plate 'data'.*got 1"):
        collapse_report(problem.model, problem.guide, problem.args[0][:1])
    guide = AutoDelta(problem.model)
    with pytest.raises(ValueError, match=r"point masses at \['z'\]"):
        collapse_report(problem.model, guide, *problem.args)


# ------------------------------------------------------------------------------------ aggregates


@pytest.mark.parametrize("num_particles", [1, 4])
def test_log_det_is_without_bias(num_particles):
    """Means with covariance 1/2 and draws with 1/2 around them: log det of 1 in 5 dimensions."""
    found = []
    for _ in range(300):
        means = math.sqrt(0.5) * torch.randn(40, 5)
        draws = means + math.sqrt(0.5) * torch.randn(num_particles, 40, 5)
        found.append(log_det_covariance(draws))
    values, errors = (torch.tensor([e[i] for e in found]) for i in range(2))
    # 0.17, terms of third order included; without the correction the mean is below -0.2
    assert values.mean().abs() < 5 * values.std() / math.sqrt(300) + 0.02
    assert values.std() == pytest.approx(float(errors.mean()), rel=0.2)


def test_draws_in_fewer_dimensions_have_no_volume():
    draws = torch.randn(1, 30, 1).expand(1, 30, 3)
    assert log_det_covariance(draws).value < -30
    assert log_det_covariance(torch.zeros(2, 10, 3)).value == -math.inf


def test_discrepancy_is_mmd_with_an_error():
    q, p = torch.randn(60, 3) + 0.5, torch.randn(60, 3)
    estimate, null = discrepancy(q, p)
    assert estimate.value == pytest.approx(float(lvm.MMD()(q, p)))
    assert estimate.value > 5 * null
    found = [discrepancy(torch.randn(50, 3), torch.randn(50, 3)) for _ in range(300)]
    values = torch.tensor([e.value for e, _ in found])
    nulls = torch.tensor([n for _, n in found])
    assert values.std() == pytest.approx(float(nulls.mean()), rel=0.2)
    apart = [discrepancy(torch.randn(50, 3) + 0.5, torch.randn(50, 3))[0] for _ in range(300)]
    values, errors = (torch.tensor([e[i] for e in apart]) for i in range(2))
    assert values.std() == pytest.approx(float(errors.mean()), rel=0.2)


# --------------------------------------------------------------------------------- while fitting


def vae_and_data():
    torch.manual_seed(0)
    x = torch.randn(96, 4)
    encoder = lvm.nn.MLP(4, [8], head=lvm.nn.NormalHead(3))
    decoder = lvm.nn.MLP(3, [8], head=lvm.nn.NormalHead(4))
    return lvm.VAE(encoder, decoder), x[:64], x[64:]


class Modes(Callback):
    """Whether modules were training when steps began."""

    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, module):
        self.seen.append(all(m.training for m in module.owners.modules()))


@pytest.mark.parametrize(
    "compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["python", "compiled"]
)
def test_metrics_leave_training_as_it_was(compile):
    runs = []
    for watched in (False, True):
        vae, x, held_out = vae_and_data()
        callbacks = [CollapseMetrics(held_out, every=2)] if watched else []
        modes = Modes()
        fit = lvm.fit(
            vae.model,
            vae.guide,
            x,
            epochs=5,
            batch_size=16,
            seed=1,
            compile=compile,
            callbacks=[*callbacks, modes],
        )
        assert modes.seen == [True] * 5
        runs.append((fit, [p.detach().clone() for p in vae.parameters()], torch.rand(3)))
    (plain, before, after_plain), (fit, after, after_watched) = runs
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(after_plain, after_watched)
    assert fit.history["loss"] == plain.history["loss"]
    new = {
        "latents/active_units",
        "latents/mutual_information",
        "latents/aggregate_kl",
        "latents/log_det_covariance",
    }
    assert fit.history.keys() - plain.history.keys() == new
    for name in new:
        values = fit.history[name]
        assert math.isnan(values[0])
        assert values[1] == values[2] != values[3] or name == "latents/active_units"
        assert values[3] == values[4]


def test_metrics_are_those_of_the_report():
    vae, x, held_out = vae_and_data()
    fit = lvm.fit(vae.model, vae.guide, x, epochs=3, seed=1, callbacks=[CollapseMetrics(held_out)])
    report = collapse_report(vae.model, vae.guide, held_out, num_samples=16, num_draws=500)
    assert fit.history["latents/active_units"][-1] == report.num_active
    found = report.information
    assert abs(fit.history["latents/mutual_information"][-1] - found.lower.value) < 0.3
    total = fit.history["latents/mutual_information"][-1] + fit.history["latents/aggregate_kl"][-1]
    assert total == pytest.approx(report.kl.value, rel=1e-5)
    log_det = report.aggregate.log_det_covariance
    assert (
        abs(fit.history["latents/log_det_covariance"][-1] - log_det.value) < 10 * log_det.std_error
    )
    last = fit.history["latents/active_units"][fit.best_epoch]
    nats, measured = str(fit).splitlines()[1:]
    assert "latents" not in nats
    assert measured.startswith(f"  measured: latents/active_units {last:.3f}, latents/mutual")
    ax = lvm.plots.plot_history(fit.history)
    assert {line.get_label() for line in ax.get_lines()} == {"loss", "reconstruction", "kl[z]"}
    lvm.plots.plot_history(fit.history, terms=["latents/mutual_information"])
    plt.close("all")


def test_metrics_go_on_from_a_checkpoint(tmp_path):
    histories = []
    for epochs in ((6,), (4, 6)):  # the fifth has the number of the fourth
        directory = tmp_path / str(len(epochs))
        for number in epochs:
            vae, x, held_out = vae_and_data()
            fit = lvm.fit(
                vae.model,
                vae.guide,
                x,
                epochs=number,
                batch_size=16,
                seed=1,
                checkpoint_dir=directory,
                resume=True,
                callbacks=[CollapseMetrics(held_out, every=2)],
            )
        histories.append(fit.history)
    assert histories[0].keys() == histories[1].keys()
    for name, values in histories[0].items():
        assert values[1:] == histories[1][name][1:]
    assert (
        histories[1]["latents/mutual_information"][3]
        == histories[1]["latents/mutual_information"][4]
    )


def test_metrics_refuse_before_training():
    vae, x, held_out = vae_and_data()
    before = [p.detach().clone() for p in vae.parameters()]
    with pytest.raises(ValueError, match="at least two data"):
        lvm.fit(vae.model, vae.guide, x, callbacks=[CollapseMetrics(held_out[:1])])
    assert all(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))
    with pytest.raises(ValueError, match="every to be a positive integer"):
        CollapseMetrics(held_out, every=0)


def test_metrics_of_discrete_latents():
    problem = PROBLEMS["score_function"]()
    fit = lvm.fit(
        problem.model,
        problem.guide,
        *problem.args,
        epochs=2,
        callbacks=[CollapseMetrics(*problem.args)],
    )
    assert {"latents/mutual_information", "latents/aggregate_kl"} <= fit.history.keys()
    assert not {"latents/active_units", "latents/log_det_covariance"} & fit.history.keys()


# -------------------------------------------------------------------------------------- pictures


def test_bars_are_the_kl_of_dimensions():
    problem = linear_gaussian(6, 3)
    report = collapse_report(problem.model, problem.guide, problem.sample(100))
    ax = plot_collapse(report)
    heights = sorted((bar.get_height() for bar in ax.patches), reverse=True)
    expected = report.latents[0].kl_of_dimensions.sort(descending=True).values
    assert heights == pytest.approx(expected.tolist())
    assert "3 of 3 units active" in ax.get_title()
    assert f"log N = {math.log(100):.2f}" in ax.get_title()
    names = [label.get_text() for label in ax.get_xticklabels()]
    largest = int(report.latents[0].kl_of_dimensions.argmax())
    assert names[0] == f"z[{largest}]"
    plt.close("all")


def test_active_and_inactive_bars_differ():
    x = torch.randn(3, 100)

    def model(x):
        with pyro.plate("data", 100, dim=-1):
            y = pyro.sample("y", dist.Bernoulli(0.5))
            with pyro.plate("words", 3, dim=-2):
                w = pyro.sample("w", dist.Normal(torch.zeros(20), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(w[..., 0] + y, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", 100, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=x[0]))
            with pyro.plate("words", 3, dim=-2):
                loc = x.unsqueeze(-1) * (torch.arange(20) < 5)
                pyro.sample("w", dist.Normal(loc, 0.5).to_event(1))

    report = collapse_report(model, guide, x)
    assert report.num_active == 15
    assert "more" in str(report)
    ax = plot_collapse(report)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["active (15)", "inactive (45)", "discrete (1)"]
    colors = {bar.get_facecolor() for bar in ax.patches}
    assert len(colors) == 3
    assert ax.get_xlabel() == "61 latent dimensions"
    plt.close("all")
