"""Models without latents: exact densities against scikit-learn, SciPy and closed forms."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import SVI, Trace_ELBO
from scipy import stats
from sklearn.mixture import GaussianMixture as SklearnMixture
from sklearn.neighbors import KernelDensity as SklearnKernelDensity
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.distributions.bandwidth import best_bandwidth
from pyro_lvm.marginal import exact, importance_sampling, impute
from pyro_lvm.models import Density, Gaussian, KernelDensity

N, D = 60, 4
COVARIANCES = ["full", "diagonal", "spherical"]
SKLEARN = {"full": "full", "diagonal": "diag", "spherical": "spherical"}

float64 = pytest.mark.usefixtures("float64")


def correlated(num_data=N, seed=0):
    """Skewed data whose features differ in place, scale and company."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(num_data, D, generator=generator, dtype=torch.float64).to(torch.zeros(()))
    mixing = torch.tensor([[2.0, 0, 0, 0], [1.5, 0.7, 0, 0], [0, -1, 0.5, 0], [3, 1, 1, 0.1]])
    return 5 - (u.log() @ mixing.to(u).T) * torch.tensor([1.0, 10.0, 0.1, 1.0]).to(u)


def standardized(num_data):
    x = correlated(num_data)
    return (x - x.mean(0)) / x.std(0)


class Laplaces(nn.Module):
    """A module that returns a distribution: independent Laplaces of learned place and width."""

    def __init__(self):
        super().__init__()
        self.loc, self.raw = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))

    def forward(self):
        return dist.Laplace(self.loc, self.raw.exp()).to_event(1)


def gaussian(covariance="full"):
    """One that was not made by ``fit``, for it to be checked by itself."""
    model = Gaussian(D, covariance)
    model.loc = torch.arange(float(D))
    model.scale = torch.linspace(0.5, 2.0, len(model.scale))
    if covariance == "full":
        model.tril = torch.randn(D, D)
    return model


# name -> constructor, after which the model is ready
MODELS = {
    "density of a module": lambda: Density(Laplaces()),
    "density": lambda: Density(dist.Normal(torch.ones(D), 2.0).to_event(1)),
    **{f"{c} gaussian": lambda c=c: gaussian(c) for c in COVARIANCES},
    "kernel density": lambda: KernelDensity(D).fit(correlated(30, seed=1), bandwidths=[0.7]),
}
every_model = pytest.mark.parametrize("name", MODELS)


# ------------------------------------------------------------------------- what all of them do


@every_model
@float64
def test_log_prob_is_that_of_the_story(name):
    model, x = MODELS[name](), correlated()
    expected = model().log_prob(x)
    assert torch.allclose(model.log_prob(x), expected, rtol=1e-12)
    for guide in (model.guide, None):
        score = exact(model.model, guide, x)
        assert torch.allclose(score.log_prob, expected, rtol=1e-12)
        assert (score.std_error == 0).all()
    several = importance_sampling(model.model, model.guide, x, num_samples=3)
    assert torch.allclose(several.log_prob, expected, rtol=1e-12)
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    assert svi.evaluate_loss(x) == pytest.approx(-expected.sum().item(), rel=1e-12)


@every_model
@float64
def test_few_data_at_a_time_give_the_same(name, monkeypatch):
    model, x = MODELS[name](), correlated()
    mask = torch.rand(N, D) < 0.7
    expected = model.log_prob(x)
    partial = None if name == "kernel density" else model.log_prob(x, mask)
    monkeypatch.setattr("pyro_lvm.models.density_model._AT_ONCE", 7)
    monkeypatch.setattr("pyro_lvm.distributions.kernel_density._NUMBERS", 50)
    assert torch.allclose(model.log_prob(x), expected, rtol=1e-12)
    if partial is not None:
        assert torch.allclose(model.log_prob(x, mask), partial, rtol=1e-12)


@every_model
@float64
def test_draws_are_those_of_the_density(name):
    """Their moments, and E_p[q(x) / p(x)] = 1 for a narrower normal q."""
    model = MODELS[name]()
    draws = model.sample(40_000)
    assert draws.shape == (40_000, D)
    assert not draws.requires_grad
    if name == "kernel density":  # the tails of q would have to be narrower than its kernels
        mean, variance = model.points.mean(0), model.points.var(0, unbiased=False) + 0.7**2
    else:
        mean, variance = model().mean.detach(), model_variance(model)
        q = dist.MultivariateNormal(mean, 0.36 * variance)
        ratio = (q.log_prob(draws) - model.log_prob(draws)).exp()
        assert (ratio.mean() - 1).abs() < 5 * ratio.std() / 200
        variance = variance.diagonal()
    assert ((draws.mean(0) - mean).abs() < 5 * draws.std(0) / 200).all()
    squares = (draws - mean).square()
    assert ((squares.mean(0) - variance).abs() < 5 * squares.std(0) / 200).all()


def model_variance(model):
    """D x D."""
    if isinstance(model, Gaussian):
        return model.covariance_matrix().detach()
    return model().variance.detach().diag()


@every_model
def test_they_come_back_from_a_file(name, tmp_path):
    model, x = MODELS[name](), correlated()
    if name == "density of a module":
        with pytest.warns(UserWarning, match="Laplaces"):
            lvm.save(model, tmp_path / "model.pt")
        other = lvm.load(tmp_path / "model.pt", into=Density(Laplaces()))
    else:
        lvm.save(model, tmp_path / "model.pt")
        other = lvm.load(tmp_path / "model.pt")
    assert torch.equal(other.log_prob(x), model.log_prob(x))
    assert type(other) is type(model)


@every_model
def test_copies_and_devices(name, device):
    model, x = MODELS[name](), correlated()
    expected = model.log_prob(x)
    if name == "density":
        model.distribution = dist.Normal(torch.ones(D, device=device), 2.0).to_event(1)
    moved = copy.deepcopy(model).to(device)
    assert torch.allclose(moved.log_prob(x.to(device)).cpu(), expected, rtol=1e-4, atol=1e-4)
    assert moved.sample(3).device.type == device
    twice = lvm.compute_terms(moved.model, moved.guide, x.to(device), num_particles=2)
    assert twice.log_likelihood.shape == (2, N)
    assert torch.allclose(twice.log_likelihood[1].cpu(), expected, rtol=1e-4, atol=1e-4)


@every_model
def test_arviz_and_comparison(name):
    model, x = MODELS[name](), correlated()
    idata = lvm.to_arviz(model.model, model.guide, x, num_samples=3)
    marginal = torch.as_tensor(idata["log_likelihood"]["marginal"].values)
    assert torch.allclose(marginal, model.log_prob(x).detach().expand(1, 3, N), rtol=1e-5)
    best = Gaussian(D).fit(x)
    table = lvm.compare({"best": exact(best.model, None, x), name: exact(model.model, None, x)})
    assert table["mean"]["best"] == pytest.approx(float(best.log_prob(x).mean()), rel=1e-5)
    assert table["mean"][name] == pytest.approx(float(model.log_prob(x).mean()), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "kernel density"])
@float64
def test_masks_integrate_features_out(name):
    model, x = MODELS[name](), correlated()
    mask = torch.rand(N, D) < 0.6
    mask[0], mask[1] = False, True
    seen, expected = torch.where(mask, x, torch.nan), []
    for row, o in zip(x, mask, strict=True):
        if not o.any():
            part = torch.zeros(())
        elif "gaussian" in name:
            covariance = model.covariance_matrix()[o][:, o]
            part = dist.MultivariateNormal(model.loc[o], covariance).log_prob(row[o])
        else:
            part = model().base_dist.log_prob(row)[o].sum()
        expected.append(part)
    expected = torch.stack(expected)
    assert torch.allclose(model.log_prob(seen, mask), expected, atol=1e-10)
    score = exact(model.model, model.guide, seen, mask)
    assert torch.allclose(score.log_prob, expected, atol=1e-10)


# ------------------------------------------------------------------------------------- Density


@float64
def test_density_is_trained_like_every_pair():
    """To the median, the place of a Laplace with the greatest likelihood."""
    x = standardized(501)
    model = Density(Laplaces(), plate="rows")
    fit = lvm.fit(
        model.model,
        model.guide,
        x,
        epochs=100,
        batch_size=501,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
        plate="rows",
        device="cpu",
    )
    median = x.median(0).values
    width = (x - median).abs().mean(0)
    assert ((model.distribution.loc - median).abs() < 0.05 * width).all()
    assert torch.allclose(model.distribution.raw.exp(), width, rtol=0.02)
    assert fit.history["loss"][-1] == pytest.approx(-float(model.log_prob(x).mean()), abs=0.05)


def test_models_without_latents_are_learned_priors():
    """Called, they return p(x): so does what a VAE takes for a prior."""
    network = lvm.nn.MLP(3, [], head=lvm.nn.NormalHead(D))
    decoder = lvm.nn.MLP(D, [], head=lvm.nn.NormalHead(3))
    prior = gaussian()
    vae = lvm.VAE(network, decoder, prior)
    terms = lvm.compute_terms(vae.model, vae.guide, torch.randn(5, 3), num_particles=2)
    z = terms.samples["z"]
    expected = prior.log_prob(z.reshape(10, D)).reshape(2, 5)
    assert torch.allclose(terms.log_prior["z"], expected, rtol=1e-5)
    assert torch.equal(Density(prior).log_prob(z[0]), prior.log_prob(z[0]))


# ------------------------------------------------------------------------------------ Gaussian


@pytest.mark.parametrize("covariance", COVARIANCES)
@float64
def test_gaussian_is_scikit_learns_and_scipys(covariance):
    x, test = correlated(), correlated(20, seed=1)
    model = Gaussian(D, covariance).fit(x)
    reference = SklearnMixture(1, covariance_type=SKLEARN[covariance], reg_covar=0.0).fit(x.numpy())
    expected = torch.as_tensor(reference.score_samples(test.numpy()))
    assert torch.allclose(model.log_prob(test), expected, rtol=1e-8)
    centred = x - x.mean(0)
    covariances = centred.T @ centred / N
    if covariance != "full":
        variances = covariances.diagonal()
        covariances = (variances if covariance == "diagonal" else variances.mean().expand(D)).diag()
    assert torch.allclose(model.loc, x.mean(0), rtol=1e-12)
    assert torch.allclose(model.covariance_matrix(), covariances, rtol=1e-9, atol=1e-12)
    normal = stats.multivariate_normal(x.mean(0).numpy(), covariances.numpy())
    assert torch.allclose(model.log_prob(test), torch.as_tensor(normal.logpdf(test)), rtol=1e-8)


@pytest.mark.parametrize("covariance", COVARIANCES)
@float64
def test_gaussian_is_a_mixture_of_one(covariance):
    x, mask = correlated(), torch.rand(N, D) < 0.6
    model, mixture = Gaussian(D, covariance), lvm.GaussianMixture(1, D, covariance)
    model.fit(x)
    mixture.initialize(x).fit_em(x)
    assert torch.allclose(model.floor, mixture.floor.squeeze(0), rtol=1e-6)
    assert torch.allclose(model.log_prob(x), mixture.log_prob(x), rtol=1e-8)
    seen = torch.where(mask, x, torch.nan)
    assert torch.allclose(
        model.conditional_mean(seen, mask), mixture.conditional_mean(seen, mask), rtol=1e-8
    )


@float64
def test_gaussian_of_the_greatest_likelihood():
    """No step from it gains anything: the gradient is 0, all scales being above the floor."""
    x = correlated()
    model = Gaussian(D).fit(x)
    slopes = torch.autograd.grad(model.log_prob(x).mean(), list(model.parameters()))
    assert max(float(s.abs().max()) for s in slopes) < 1e-8
    start = Gaussian(D, floor=1e-3)
    assert start.log_prob(x).mean() < model.log_prob(x).mean() - 1


def test_gaussian_by_stochastic_steps():
    x = standardized(500)[:, :3]
    best, model = Gaussian(3).fit(x), Gaussian(3)
    svi = SVI(model.model, model.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step(x)
    assert model.log_prob(x).mean() > best.log_prob(x).mean() - 0.001


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_constant_features_stay_at_the_floor(covariance):
    """A thousandth of what others vary by, for a feature that does not vary at all."""
    x = correlated()
    x[:, 2] = 7.0
    model = Gaussian(D, covariance).fit(x)
    typical = x[:, [0, 1, 3]].var(0, unbiased=False).mean().sqrt()
    floor = model.floor[0 if covariance == "spherical" else 2]
    assert torch.allclose(floor, 1e-3 * typical, rtol=1e-4)
    if covariance == "diagonal":
        assert torch.allclose(model.floor[0], 1e-3 * x[:, 0].std(unbiased=False), rtol=1e-4)
    if covariance != "spherical":
        assert torch.allclose(model.scale[2], 1.001 * floor, rtol=1e-4)
    assert (model.scale > model.floor).all()
    assert model.log_prob(x).isfinite().all()
    slopes = torch.autograd.grad(model.log_prob(x).sum(), list(model.parameters()))
    assert all(s.isfinite().all() for s in slopes)


@float64
def test_a_floor_that_is_given_stays():
    x = correlated()
    model = Gaussian(D, "diagonal", floor=3.0).fit(x)
    deviations = x.std(0, unbiased=False)
    assert torch.allclose(model.scale, deviations.clamp(min=3.003))
    assert torch.equal(model.floor, torch.full((D,), 3.0))
    full = Gaussian(D, floor=3.0).fit(x)  # the regressions stay, the scales are raised
    free = Gaussian(D, floor=1e-9).fit(x)
    assert torch.allclose(full.scale, free.scale.clamp(min=3.003))

    def regressions(model):
        unit = torch.eye(D) + model.tril
        return model.scale.unsqueeze(-1) * unit / model.scale

    assert torch.allclose(regressions(full), regressions(free))


def test_gaussian_keeps_its_floor_in_a_file_and_in_double(tmp_path):
    x = correlated()
    x[:, 2] = 7.0
    model = Gaussian(D).fit(x)
    lvm.save(model, tmp_path / "gaussian.pt")
    other = lvm.load(tmp_path / "gaussian.pt")
    assert torch.equal(other.floor, model.floor)
    assert torch.equal(other.scale, model.scale)
    double = copy.deepcopy(other).double()
    assert (double.scale > double.floor).all()
    assert double._above_floor.lower_bound is double.floor
    assert torch.allclose(double.log_prob(x.double()).float(), model.log_prob(x), rtol=1e-3)


@pytest.mark.parametrize("covariance", COVARIANCES)
@float64
def test_gaussian_draws_what_is_missing(covariance):
    """Mean and covariance of the missing features given the others, by hand."""
    model = gaussian(covariance)
    x, mask = correlated(3), torch.tensor([[True, False, False, True]] * 3)
    o, m = [0, 3], [1, 2]
    s = model.covariance_matrix().detach()
    gain = s[m][:, o] @ torch.linalg.inv(s[o][:, o])
    mean = model.loc[m] + (x - model.loc)[:, o] @ gain.T
    covariance_given = s[m][:, m] - gain @ s[o][:, m]
    seen = torch.where(mask, x, torch.nan)
    found = model.conditional_mean(seen, mask)
    assert torch.allclose(found[:, m], mean)
    assert torch.equal(found[:, o], x[:, o])
    draws = model.impute(seen, mask, num_samples=20_000)
    assert draws.shape == (20_000, 3, D)
    assert torch.equal(draws[:, :, o], x[:, o].expand(20_000, -1, -1))
    error = covariance_given.diagonal().sqrt() / math.sqrt(20_000)
    assert ((draws[:, :, m].mean(0) - mean).abs() < 5 * error).all()
    centred = draws[:, 0, m] - mean[0]
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    error = products.std(0) / math.sqrt(20_000)
    assert ((products.mean(0) - covariance_given).abs() < 5 * error).all()
    generic = impute(model.model, model.guide, seen, mask, num_samples=2000)
    assert ((generic.mean()[:, m] - mean).abs() < 5 * generic.std_error()[:, m]).all()


# ------------------------------------------------------------------------------- KernelDensity


@pytest.mark.parametrize("bandwidth", [0.3, 2.0])
@float64
def test_kernel_density_is_scikit_learns(bandwidth):
    x, test = correlated(), correlated(20, seed=1)
    model = KernelDensity(D).fit(x, bandwidths=[bandwidth])
    reference = SklearnKernelDensity(bandwidth=bandwidth, rtol=1e-12).fit(x.numpy())
    expected = torch.as_tensor(reference.score_samples(test.numpy()))
    assert torch.allclose(model.log_prob(test), expected, rtol=1e-9)
    score = exact(model.model, None, test)
    assert torch.allclose(score.log_prob, expected, rtol=1e-9)
    assert model.bandwidth == bandwidth


@float64
def test_bandwidth_by_validation_is_that_of_a_grid():
    x = correlated(80)
    validation = x[:50] + 0.3 * torch.randn(50, D)  # nearer than the points are to each other
    grid = np.geomspace(0.1, 10.0, 25)
    means = [
        SklearnKernelDensity(bandwidth=h, rtol=1e-12).fit(x.numpy()).score(validation.numpy())
        for h in grid
    ]
    best = int(np.argmax(means))
    assert 2 < best < 22
    assert best_bandwidth(x, None, grid) > 1.3 * grid[best]
    model = KernelDensity(D).fit(x, validation=validation, bandwidths=grid)
    assert float(model.bandwidth) == grid[best]
    chosen = KernelDensity(D).fit(x, validation=validation)
    assert chosen.log_prob(validation).mean() > means[best] / 50 - 0.02


@pytest.mark.parametrize("numbers", [50, 700, 2**22])
@float64
def test_bandwidth_by_leaving_one_out_is_that_of_a_grid(numbers, monkeypatch):
    monkeypatch.setattr("pyro_lvm.distributions.kernel_density._NUMBERS", numbers)
    x = correlated(40)
    grid = np.geomspace(0.1, 10.0, 15)

    def score(h):
        rest = [np.delete(x.numpy(), i, 0) for i in range(len(x))]
        fits = [SklearnKernelDensity(bandwidth=h, rtol=1e-12).fit(r) for r in rest]
        return sum(f.score(x[i : i + 1].numpy()) for i, f in enumerate(fits))

    best = int(np.argmax([score(h) for h in grid]))
    assert 1 < best < 13
    assert best_bandwidth(x, None, grid) == grid[best]
    assert float(KernelDensity(D).fit(x, bandwidths=grid).bandwidth) == grid[best]


@float64
def test_kernel_density_in_several_batch_dimensions():
    density = lvm.distributions.KernelDensity(correlated(10), 0.5)
    x = correlated(6)
    expected = density.log_prob(x)
    assert torch.equal(density.expand([3, 6]).log_prob(x), expected.expand(3, 6))
    assert torch.equal(density.log_prob(x.reshape(2, 3, D)), expected.reshape(2, 3))
    assert torch.allclose(density.expand([2, 1]).log_prob(x[:1]), expected[:1].expand(2, 1))


def test_kernel_density_before_and_after_fit():
    model, x = KernelDensity(D, bandwidth=2.0), correlated()
    at_first = dist.Normal(torch.zeros(D), 2.0).to_event(1)
    assert torch.allclose(model.log_prob(x), at_first.log_prob(x), rtol=1e-5)
    assert model.fit(x) is model
    assert model.num_points == N
    x[0] = 0.0  # the points are a copy
    assert (model.points[0] != 0).all()
    assert not list(model.parameters())


# -------------------------------------------------------------------------------------- errors


class ReturnsTorch(nn.Module):
    def forward(self):
        return torch.distributions.Normal(0.0, 1.0)


class ReturnsBatch(nn.Module):
    def forward(self):
        return dist.Normal(torch.zeros(D), 1.0)


def never():
    pass


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: Density(torch.zeros(3)),
            TypeError,
            "distribution to be a Distribution.*got torch",
        ),
        (lambda: Density(never), TypeError, "Distribution of pyro.distributions; got builtins"),
        (
            lambda: Density(dist.Normal(torch.zeros(3), 1.0)),
            ValueError,
            r"distribution without batch shape; got \(3,\).*to_event\(1\)",
        ),
        (lambda: Density(ReturnsTorch()).sample(2), TypeError, "ZukoToPyro"),
        (lambda: Density(ReturnsBatch()).sample(2), ValueError, r"without batch shape; got \(4,\)"),
        (
            lambda: Density(dist.Normal(0.0, 1.0)).log_prob(torch.zeros(3, 2)),
            ValueError,
            r"data of shape \(\), as p\(x\) has them; got \(3, 2\)",
        ),
        (lambda: gaussian().log_prob(torch.zeros(3, 2)), ValueError, r"shape \(4,\)"),
        (lambda: gaussian().model(torch.zeros(0, D)), ValueError, "at least one datum"),
        (lambda: gaussian().model([1.0]), TypeError, "torch.Tensor"),
        (lambda: Gaussian(0), ValueError, "num_features"),
        (lambda: Gaussian(3, "tied"), ValueError, "covariance in .*'full'.*got 'tied'"),
        (lambda: Gaussian(3, floor=0.0), ValueError, "floor"),
        (lambda: Gaussian(2).fit(torch.zeros(5, 3)), ValueError, r"shape \(2,\)"),
        (lambda: Gaussian(2).fit(torch.full((5, 2), torch.nan)), ValueError, "finite"),
        (lambda: Gaussian(2).fit(torch.zeros(5, 2).long()), TypeError, "floating"),
        (
            lambda: gaussian().impute(torch.zeros(2, D), torch.ones(2, D)),
            TypeError,
            "mask of booleans",
        ),
        (lambda: KernelDensity(0), ValueError, "num_features"),
        (lambda: KernelDensity(2, 0), ValueError, "num_points"),
        (lambda: KernelDensity(2, bandwidth=-1.0), ValueError, "bandwidth"),
        (lambda: KernelDensity(2).fit(torch.zeros(5, 3)), ValueError, "x with 2 features"),
        (
            lambda: KernelDensity(2).fit(torch.zeros(5, 2), validation=torch.zeros(5, 3)),
            ValueError,
            "validation with 2 features",
        ),
        (lambda: KernelDensity(2).fit(torch.zeros(1, 2)), ValueError, "at least 2 points"),
        (
            lambda: KernelDensity(2).fit(torch.zeros(5, 2), bandwidths=[]),
            ValueError,
            "at least one bandwidth",
        ),
        (
            lambda: KernelDensity(2).fit(torch.zeros(5, 2), bandwidths=[1.0, 0.0]),
            ValueError,
            "bandwidths to be a positive number",
        ),
        (
            lambda: exact(KernelDensity(2).model, None, torch.zeros(3, 2), torch.eye(3, 2).bool()),
            ValueError,
            "no such marginal",
        ),
    ],
)
def test_what_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_fit_that_is_refused_changes_nothing():
    model = KernelDensity(D).fit(correlated(), bandwidths=[0.5])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="bandwidths"):
        model.fit(correlated(10), bandwidths=[-1.0])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


class Flow(nn.Module):
    """One of Zuko's, whose distribution draws when it is called and has no method for it."""

    def __init__(self):
        super().__init__()
        self.flow = zuko.flows.MAF(D, transforms=1, hidden_features=(8,))

    def forward(self):
        return ZukoToPyro(self.flow())


def test_a_flow_of_zukos_is_a_density():
    flow, x = Flow(), standardized(N).float()
    model = Density(flow)
    torch.testing.assert_close(exact(model.model, None, x).log_prob, flow.flow().log_prob(x))
    assert model.sample(7).shape == (7, D)
    assert not model.sample(7).requires_grad


def test_a_flow_of_zukos_is_a_prior():
    x = standardized(N).float()
    encoder, decoder = (lvm.nn.MLP(D, [], head=lvm.nn.NormalHead(D)) for _ in range(2))
    vae = lvm.VAE(encoder, decoder, prior=Flow())
    terms = lvm.compute_terms(vae.model, vae.guide, x)
    expected = vae.prior.flow().log_prob(terms.samples["z"])
    torch.testing.assert_close(terms.log_prior["z"], expected)
    assert vae.sample(7).shape == (7, D)
