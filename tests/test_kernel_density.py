"""Stories without a density: kernels around their draws, and a stated noise."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from sklearn.neighbors import KernelDensity as SklearnKernelDensity

from pyro_lvm.distributions.kernel_density import KernelDensity
from pyro_lvm.marginal import kernel_density, naive_monte_carlo, with_gaussian_noise
from pyro_lvm.marginal.kernel_density import best_bandwidth
from pyro_lvm.terms import simulate

pytestmark = pytest.mark.usefixtures("float64")

LOADINGS = torch.tensor([[1.0, -1.0], [0.5, 0.3]], dtype=torch.float64)


def generator(x):
    """z ~ N(0, I), x = G(z): no density as it stands, N(0, W W') if G is linear."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Delta(z @ LOADINGS.to(x), event_dim=1), obs=x)


def exact(variance=0.0):
    covariance = LOADINGS.T @ LOADINGS + variance * torch.eye(2)
    return dist.MultivariateNormal(torch.zeros(2), covariance)


def test_density_is_the_mean_of_the_kernels(monkeypatch):
    monkeypatch.setattr("pyro_lvm.distributions.kernel_density._NUMBERS", 700)  # several chunks
    points, x = 100 + torch.randn(300, 4), 100 + torch.randn(50, 4)
    kernels = dist.Normal(points[:, None], 0.05).to_event(1).log_prob(x)
    expected = kernels.logsumexp(0) - math.log(300)
    assert torch.allclose(KernelDensity(points, 0.05).log_prob(x), expected, rtol=1e-9)


@pytest.mark.parametrize("bandwidth", [0.3, 2.0])  # its own are off for narrower ones
def test_density_is_scikit_learns(bandwidth, monkeypatch):
    monkeypatch.setattr("pyro_lvm.distributions.kernel_density._NUMBERS", 700)  # several chunks
    points, x = 100 + torch.randn(300, 4), 100 + torch.randn(50, 4)
    reference = SklearnKernelDensity(bandwidth=bandwidth, rtol=1e-12).fit(points.numpy())
    expected = torch.as_tensor(reference.score_samples(x.numpy()))
    density = KernelDensity(points, bandwidth)
    assert torch.allclose(density.log_prob(x), expected, rtol=1e-9, atol=1e-9)
    single = KernelDensity(points.float(), bandwidth).log_prob(x.float())
    reference.fit(points.float().numpy().astype(float))
    expected = torch.as_tensor(reference.score_samples(x.float().numpy().astype(float)))
    assert torch.allclose(single, expected.float(), rtol=1e-6)


def test_draws_have_the_variance_of_points_and_kernel():
    points = torch.randn(200, 3)
    draws = KernelDensity(points, 0.5).expand([2]).sample((20_000,))
    assert draws.shape == (20_000, 2, 3)
    expected = points.var(0, unbiased=False) + 0.25
    assert torch.allclose(draws.flatten(0, 1).var(0), expected, rtol=0.05)


def test_bandwidth_is_that_of_the_largest_likelihood():
    points, x = torch.randn(500, 2), torch.randn(400, 2)
    widths = [0.05, 0.1, 0.2, 0.3, 0.5, 1.0]
    means = [KernelDensity(points, h).log_prob(x).mean() for h in widths]
    best = int(torch.stack(means).argmax())
    assert best_bandwidth(points, x, widths) == widths[best]
    assert 0 < best < 5
    found = best_bandwidth(points, x)  # the grid reaches it
    assert KernelDensity(points, found).log_prob(x).mean() >= means[best] - 1e-3


def test_kernel_density_of_a_generator():
    """The density of x' + h e, which is known; the printed value says what it rests on."""
    x, validation = exact().sample((200,)), exact().sample((500,))
    score = kernel_density(
        generator, x, validation=validation, num_samples=20_000, bandwidths=[0.3]
    )
    expected = exact(0.09).log_prob(x)
    assert ((score.log_prob - expected).abs() < 5 * score.std_error).double().mean() > 0.99
    assert (score.log_prob - expected).square().mean() < 2 * score.std_error.square().mean()
    assert "a Gaussian kernel of width 0.3 around draws" in str(score)
    assert "chosen on 500 validation data" in str(score)
    chosen = kernel_density(generator, x, validation=validation, num_samples=20_000)
    assert (chosen.log_prob.mean() - exact().log_prob(x).mean()).abs() < 0.1


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: poutine.scale(model, 1.0)])
def test_gaussian_noise_gives_a_generator_a_density(wrap):
    x = exact(0.25).sample((10,))
    noisy = wrap(with_gaussian_noise(generator, 0.5))
    score = naive_monte_carlo(noisy, x, num_samples=5000)
    assert ((score.log_prob - exact(0.25).log_prob(x)).abs() < 5 * score.std_error).all()
    assert "assuming Gaussian observation noise of 0.5" in str(score)


def test_noise_around_the_mean_of_other_observations():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(torch.full((len(x), 3), 0.25)).to_event(1), obs=x)
            pyro.sample("other", dist.Normal(0.0, 1.0), obs=x[:, 0])

    x = torch.randn(5, 3)
    score = naive_monte_carlo(with_gaussian_noise(model, 0.5, sites=["x"]), x, num_samples=2)
    expected = dist.Normal(0.25, 0.5).log_prob(x).sum(1) + dist.Normal(0.0, 1.0).log_prob(x[:, 0])
    assert torch.allclose(score.log_prob, expected)


def test_simulation_keeps_conditions_and_latents():
    def model(x, y):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
            z = pyro.sample("z", dist.Normal(y, scale))
            pyro.sample("x", dist.Delta(torch.stack([z, y], -1), event_dim=1), obs=x)

    x, y = torch.zeros(7, 2), torch.randn(7)
    run = simulate(model, (x, y), sites=["x"])
    assert torch.equal(run.drawn["x"][:, 0], run.latents["z"])
    assert torch.equal(run.drawn["x"][:, 1], y)
    assert list(run.drawn) == ["x"]
    assert torch.equal(run.observed["x"], x)
    assert list(run.global_latents) == ["scale"]
    everything = simulate(model, (x, y))
    assert set(everything.drawn) == {"x", "y"}
    with pytest.raises(ValueError, match=r"got \['w'\]"):
        simulate(model, (x, y), sites=["w"])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"validation": torch.zeros(5, 3)}, "shape .2,. each"),
        ({"validation": torch.zeros(5, 2), "bandwidths": []}, "at least one bandwidth"),
        ({"validation": torch.zeros(5, 2), "bandwidths": [0.0]}, "positive"),
        ({"validation": torch.zeros(5, 2), "site": "y"}, r"got \['y'\]"),
        ({"validation": torch.full((5, 2), torch.nan)}, "finite values in validation"),
        ({"validation": torch.zeros(5, 2), "num_samples": 0}, "num_samples.*positive"),
    ],
)
def test_what_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        kernel_density(generator, torch.zeros(4, 2), **settings)
    with pytest.raises(ValueError, match=r"scale.*positive"):
        with_gaussian_noise(generator, 0.0)
