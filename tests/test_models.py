"""The models are ordinary pairs: their values against closed forms, and what all have in common."""

import copy
import itertools
import math
import pickle
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import nn

from pyro_lvm.datasets import linear_gaussian, old_faithful
from pyro_lvm.infer import TraceInfo_ELBO
from pyro_lvm.marginal import importance_sampling
from pyro_lvm.models import VAE, GaussianMixture
from pyro_lvm.models.gaussian_moments import maximum_likelihood, moments_given
from pyro_lvm.nn import MLP, BernoulliHead, NormalHead

DATA = Path(__file__).parents[1].parent / "shared" / "data"
COVARIANCES = ["full", "tied", "diagonal", "spherical"]
SKLEARN_NAMES = {"full": "full", "tied": "tied", "diagonal": "diag", "spherical": "spherical"}

needs_faithful = pytest.mark.skipif(
    not (DATA / "faithful").exists(), reason=f"no faithful in {DATA}"
)


def train(model, x, *, elbo=None, steps=20, lr=0.01, decay=1.0):
    """Losses of SVI."""
    optimizer = pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "gamma": decay}
    )
    svi = SVI(model.model, model.guide, optimizer, elbo or elbo_for(model))
    losses = []
    for _ in range(steps):
        losses.append(svi.step(x))
        optimizer.step()
    return losses


def elbo_for(model, **settings):
    kind = TraceEnum_ELBO if isinstance(model, GaussianMixture) else Trace_ELBO
    return kind(max_plate_nesting=1, **settings)


def seeded_loss(model, x):
    pyro.set_rng_seed(5)
    return elbo_for(model).loss(model.model, model.guide, x)


def values_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -------------------------------------------------------------------------- Gaussian mixtures


def blobs(num_data=150, num_features=3, distance=2.5):
    """Two overlapping correlated clusters and their labels."""
    labels = (torch.arange(num_data) % 3 == 0).long()
    mixing = torch.eye(num_features) + 0.5 * torch.ones(num_features, num_features).tril(-1)
    x = torch.randn(num_data, num_features) @ mixing.T
    return x + distance * labels[:, None], labels


def random_mixture(covariance, num_components=3, num_features=2):
    """A mixture with parameters that no symmetry hides."""
    mixture = GaussianMixture(num_components, num_features, covariance)
    mixture.weights = torch.tensor([0.5, 0.2, 0.3])
    mixture.loc = 2 * torch.randn(num_components, num_features)
    mixture.scale = 0.5 + torch.rand(mixture.scale.shape)
    if covariance in ("full", "tied"):
        mixture.tril = torch.randn(mixture.tril.shape)
    return mixture


def covariance_by_hand(mixture, c):
    """L L^T, L = diag(scale) (I + tril), of one component."""
    own = 0 if mixture.covariance == "tied" else c
    factor = torch.eye(mixture.num_features, dtype=mixture.loc.dtype)
    if mixture.covariance in ("full", "tied"):
        factor = factor + mixture.tril[own].tril(-1)
    factor = torch.diag(mixture.scale[own].expand(mixture.num_features)) @ factor
    return (factor @ factor.T).detach()


def joint_by_hand(mixture, x):
    """Log p(x_i, z_i = c), ``N x C``."""
    columns = [
        mixture.weights[c].log()
        + dist.MultivariateNormal(mixture.loc[c], covariance_by_hand(mixture, c)).log_prob(x)
        for c in range(mixture.num_components)
    ]
    return torch.stack(columns, -1).detach()


@needs_faithful
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("num_components", "covariance", "expected"),
    [
        (2, "full", -1130.2640),
        (2, "tied", -1140.1868),
        (2, "diagonal", -1147.8064),
        (2, "spherical", -1709.5293),
        (1, "full", -1289.7967),
    ],
)
def test_old_faithful(num_components, covariance, expected):
    """The maxima of the likelihood that EM finds; the last one is the closed form."""
    x = old_faithful(DATA)
    mixture = GaussianMixture(num_components, 2, covariance).initialize(x)
    train(mixture, x, steps=300, lr=0.05, decay=0.98)
    assert float(mixture.log_prob(x).sum().detach()) == pytest.approx(expected, abs=2e-4)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_svi_reaches_the_optimum_of_em(covariance):
    x, _ = blobs(distance=4.0)
    mixture = GaussianMixture(2, 3, covariance).initialize(x)
    precisions = torch.linalg.inv(mixture.covariances()).detach()
    start = {
        "full": precisions,
        "tied": precisions[0],
        "diagonal": precisions.diagonal(dim1=-2, dim2=-1),
        "spherical": precisions[:, 0, 0],
    }[covariance]
    reference = SklearnMixture(
        2,
        covariance_type=SKLEARN_NAMES[covariance],
        weights_init=mixture.weights.detach().numpy(),
        means_init=mixture.loc.detach().numpy(),
        precisions_init=start.numpy(),
        tol=1e-8,
        reg_covar=0.0,
        max_iter=5000,
    ).fit(x.numpy())
    train(mixture, x, steps=250, lr=0.05, decay=0.97)
    found = float(mixture.log_prob(x).sum().detach())
    assert found == pytest.approx(len(x) * reference.score(x.numpy()), abs=1e-3)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_one_component_starts_at_the_closed_form(covariance):
    """Its k-means cluster is all the data: the start is the maximum of the likelihood."""
    x, _ = blobs()
    mixture = GaussianMixture(1, 3, covariance, floor=1e-6).initialize(x)
    expected = torch.cov(x.T, correction=0)
    if covariance in ("diagonal", "spherical"):
        expected = torch.diag(expected.diagonal())
    if covariance == "spherical":
        expected = expected.trace() / 3 * torch.eye(3)
    assert torch.allclose(mixture.loc[0], x.mean(0))
    assert torch.allclose(mixture.covariances()[0], expected, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_mixture_values_by_hand(covariance):
    mixture = random_mixture(covariance)
    x = 3 * torch.randn(20, 2)
    expected = torch.stack([covariance_by_hand(mixture, c) for c in range(3)])
    assert torch.allclose(mixture.covariances(), expected)
    joint = joint_by_hand(mixture, x)
    assert torch.allclose(mixture.log_prob(x), joint.logsumexp(-1))
    shares = mixture.responsibilities(x)
    assert torch.allclose(shares, joint.softmax(-1))
    assert torch.allclose(shares.sum(-1), torch.ones(20))
    assert torch.equal(mixture.assign(x), shares.argmax(-1))
    assert mixture.assign(x).unique().numel() > 1
    # The loss sums the label out: it is exact.
    loss = elbo_for(mixture).loss(mixture.model, mixture.guide, x)
    assert loss == pytest.approx(-float(joint.logsumexp(-1).sum()), rel=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_mixture_draws_have_their_mean_and_covariance(covariance):
    mixture, n = random_mixture(covariance), 20_000
    weights, loc = mixture.weights.detach(), mixture.loc.detach()
    mean = weights @ loc
    within = sum(weights[c] * covariance_by_hand(mixture, c) for c in range(3))
    between = torch.einsum("c,ci,cj->ij", weights, loc - mean, loc - mean)
    x = mixture.sample(n)
    assert x.shape == (n, 2)
    assert ((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(n)).all()
    products = torch.einsum("ni,nj->nij", x - mean, x - mean)
    error = (products.mean(0) - within - between).abs()
    assert (error < 5 * products.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_separated_clusters_are_found(covariance, device):
    x, labels = blobs(num_data=90, distance=20.0)
    x, labels = x.to(device), labels.to(device)
    mixture = GaussianMixture(2, 3, covariance).to(device).initialize(x)
    train(mixture, x)
    assigned = mixture.assign(x)
    assert assigned.device.type == mixture.sample(3).device.type == device
    agreement = [(relabel[assigned] == labels).float().mean() for relabel in relabellings(2, x)]
    assert max(agreement) == 1.0


def relabellings(num_components, like):
    orders = itertools.permutations(range(num_components))
    return [torch.tensor(order, device=like.device) for order in orders]


def constant_column():
    return torch.cat([torch.randn(20, 1), torch.full((20, 1), 0.1)], 1)


DEGENERATE = {
    "duplicated points": lambda: torch.randn(3, 2).repeat(10, 1),
    "a constant column": constant_column,
    "fewer distinct points than components": lambda: torch.randn(2, 2).repeat(10, 1),
    "one point, many times": lambda: torch.full((20, 2), 0.1) * torch.tensor([1.0, 3e4]),
    "as many components as data": lambda: torch.randn(3, 2),
    "far from the origin": lambda: 1e5 + torch.randn(3, 2).repeat(10, 1),
    "tiny": lambda: 1e-8 * torch.randn(3, 2).repeat(10, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("data", DEGENERATE)
def test_degenerate_data_are_fitted(data, covariance, dtype):
    x = DEGENERATE[data]().to(dtype)
    mixture = GaussianMixture(3, 2, covariance).to(dtype).initialize(x)
    losses = train(mixture, x, steps=50)
    assert all(math.isfinite(loss) for loss in losses)
    assert all(value.isfinite().all() for value in mixture.parameters())
    assert mixture.scale.dtype == dtype
    assert (mixture.scale >= mixture.floor).all()
    assert (mixture.weights > 0).all()
    assert float(mixture.weights.sum().detach()) == pytest.approx(1.0, abs=1e-5)
    assert mixture.log_prob(x).isfinite().all()
    assert mixture.covariances().isfinite().all()


@pytest.mark.usefixtures("float64")
def test_features_that_are_constant_in_each_cluster():
    """Rounding leaves a variance of 0 below 0."""
    labels = torch.rand(400) < 0.5
    x = torch.randn(400, 10) + 20.0 * labels[:, None]
    x[:, 0] = torch.where(labels, 0.1, 0.3)
    mixture = GaussianMixture(2, 10).initialize(x)
    assert all(value.isfinite().all() for value in mixture.parameters())
    assert torch.allclose(mixture.scale[:, 0], 2 * mixture.floor[0, 0])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_given_floor_holds(covariance):
    x = torch.randn(3, 2).repeat(10, 1)
    mixture = GaussianMixture(3, 2, covariance, floor=0.2).initialize(x)
    assert (mixture.floor == 0.2).all()
    train(mixture, x, steps=80, lr=0.2)
    assert (mixture.scale >= 0.2).all()
    assert float(mixture.scale.min().detach()) == pytest.approx(
        0.2, abs=0.01
    )  # the data would go to 0


def test_the_floor_is_in_the_unit_of_the_data():
    x, _ = blobs()
    unit = torch.tensor([1.0, 1e3, 1e-6])  # each feature in its own
    floor = GaussianMixture(2, 3).initialize(unit * x).floor
    torch.testing.assert_close(floor[0], 1e-3 * (unit * x).std(0, unbiased=False))
    spherical = GaussianMixture(2, 3, "spherical").initialize(1e3 * x).floor
    torch.testing.assert_close(spherical.item(), x.var(0, unbiased=False).mean().sqrt().item())
    assert (GaussianMixture(2, 3).floor == 1e-3).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal"])
def test_units_of_the_features_do_not_matter(covariance):
    """The same fit in units a million times apart: log p(x) differs by the log of the units."""
    x, _ = blobs()
    unit = torch.tensor([1.0, 1e6, 1e-6], dtype=x.dtype)
    scores = []
    for data in (x, unit * x):
        torch.manual_seed(0)
        labels = x[:, 0] > x[:, 0].median()  # k-means depends on units; the moments do not
        mixture = GaussianMixture(2, 3, covariance).initialize(data)
        table = mixture._table()
        moments, _ = moments_given(data, table, labels=labels.long())
        table = maximum_likelihood(moments, table, mixture.floor)
        mixture._declare({name: getattr(table, name) for name in mixture._shapes()})
        scores.append(mixture.log_prob(data).detach())
    assert torch.allclose(scores[0], scores[1] + unit.log().sum(), atol=1e-4)


def test_a_new_floor_binds_the_param_store_too():
    """Parameters that Pyro already knows take the floor of a state_dict over."""
    x, _ = blobs()
    source = GaussianMixture(2, 3).initialize(1e3 * x)
    mixture = GaussianMixture(2, 3)
    train(mixture, x, steps=2)
    parameters = list(mixture.parameters())
    mixture.load_state_dict(source.state_dict())
    assert torch.equal(mixture.floor, source.floor)
    assert all(a is b for a, b in zip(parameters, mixture.parameters(), strict=True))
    with poutine.trace(param_only=True) as tracer:
        mixture.model(x)
    name = next(name for name in tracer.trace.nodes if name.endswith(".scale"))
    assert torch.equal(tracer.trace.nodes[name]["value"], source.scale)
    assert torch.equal(pyro.param(name), mixture.scale)


def test_initialize_starts_a_trained_mixture_anew():
    x, _ = blobs()
    mixture = GaussianMixture(2, 3).initialize(x)
    train(mixture, x)
    pyro.set_rng_seed(1)
    mixture.initialize(x + 100.0)
    assert (mixture.loc > 90).all()
    fresh = seeded_loss(mixture, x + 100.0)
    assert fresh == pytest.approx(-float(mixture.log_prob(x + 100.0).sum().detach()), rel=1e-5)
    before = values_of(mixture)
    train(mixture, x + 100.0)
    assert not any(torch.equal(value, before[name]) for name, value in mixture.named_parameters())


# ------------------------------------------------------------------------------------- priors


def all_priors(covariance, num_components=2, num_features=2):
    """A prior on every parameter."""
    mixture = GaussianMixture(num_components, num_features, covariance)
    priors = {"weights": dist.Dirichlet(2 * torch.ones(num_components))}
    for name, value in mixture.values().items():
        if name != "weights":
            kind = dist.LogNormal if name == "scale" else dist.Normal
            priors[name] = kind(torch.full(value.shape, 0.3), 2.0).to_event(value.dim())
    return priors


def loc_and_weights():
    return {
        "loc": dist.Normal(0.0, 10.0).expand([2, 2]).to_event(2),
        "weights": dist.Dirichlet(torch.ones(2)),
    }


def conjugate(num_data=5, prior_scale=0.5, noise=1.3):
    """loc ~ N(0, prior_scale^2), x ~ N(loc, noise^2): its posterior and log p(x)."""
    x = 1.0 + torch.randn(num_data, 2)
    prior = dist.Normal(0.0, prior_scale).expand([1, 2]).to_event(2)
    mixture = GaussianMixture(1, 2, "diagonal", priors={"loc": prior})
    mixture.scale = torch.full((1, 2), noise)
    precision = 1 / prior_scale**2 + num_data / noise**2
    mean = x.sum(0, keepdim=True) / noise**2 / precision
    covariance = noise**2 * torch.eye(num_data) + prior_scale**2
    columns = dist.MultivariateNormal(torch.zeros(num_data), covariance)
    return mixture, x, mean, precision**-0.5, float(columns.log_prob(x.T).sum())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [TraceEnum_ELBO, TraceInfo_ELBO])
def test_loss_at_the_exact_posterior_is_the_evidence(kind):
    """log p(x, loc) - log p(loc | x) = log p(x) for every draw of loc."""
    mixture, x, mean, sd, evidence = conjugate()
    mixture.values()  # the guide has parameters from here on
    mixture._autoguide.locs.loc = mean
    mixture._autoguide.scales.loc = torch.full((1, 2), sd)
    for particles in (1, 4):
        elbo = kind(num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=1)
        for _ in range(3):
            loss = elbo.loss(mixture.model, mixture.guide, x)
            assert loss == pytest.approx(-evidence, rel=1e-10)


@pytest.mark.usefixtures("float64")
def test_posterior_of_the_mean_is_learned():
    mixture, x, mean, sd, _ = conjugate()
    elbo = TraceEnum_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    loss = elbo(mixture.model, mixture.guide)
    loss(x)
    optimizer = torch.optim.Adam(mixture._autoguide.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.985)
    for _ in range(400):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
        schedule.step()
    learned = mixture._autoguide
    # The steps end at 0.05 * 0.985^400 = 1e-4. What is left is the noise of the gradient, averaged
    # over the last hundred steps of 32 draws: some 2 % of the posterior's width.
    assert ((mixture.values()["loc"] - mean).abs() < 0.1 * sd).all()
    assert ((learned.scales.loc / sd).log().abs() < 0.1).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_map_loss_is_log_joint(covariance, particles):
    """With point masses the loss is -log p(x | theta) - log p(theta), however many particles."""
    x, _ = blobs(num_data=20, num_features=2)
    priors = all_priors(covariance)
    mixture = GaussianMixture(2, 2, covariance, priors=priors, autoguide=AutoDelta)
    train(mixture, x, steps=3, lr=0.3)
    theta = mixture.values()
    assert theta.keys() == priors.keys()
    expected = mixture.log_prob(x).sum() + sum(
        prior.log_prob(theta[name]) for name, prior in priors.items()
    )
    elbo = elbo_for(mixture, num_particles=particles, vectorize_particles=particles > 1)
    loss = elbo.loss(mixture.model, mixture.guide, x)
    assert loss == pytest.approx(-float(expected), rel=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_each_particle_has_its_own_draws(covariance):
    """The loss of K given draws of every parameter is the mean of -log p(x, theta_k)."""
    x, _ = blobs(num_data=20, num_features=2)
    priors = all_priors(covariance)
    draws = {name: prior.sample((3,)) for name, prior in priors.items()}  # K x event

    def autoguide(model):
        def guide(x):
            for name, value in draws.items():
                point = dist.Delta(value.unsqueeze(1), event_dim=value.dim() - 1)
                pyro.sample(name, point)  # K x 1 x event, within the plate of particles

        return guide

    mixture = GaussianMixture(2, 2, covariance, priors=priors, autoguide=autoguide)
    expected = []
    for k in range(3):
        point = GaussianMixture(2, 2, covariance, floor=1e-9)
        for name, value in draws.items():
            setattr(point, name, value[k])
        log_prior = sum(prior.log_prob(draws[name][k]) for name, prior in priors.items())
        expected.append(joint_by_hand(point, x).logsumexp(-1).sum() + log_prior)
    elbo = elbo_for(mixture, num_particles=3, vectorize_particles=True)
    loss = elbo.loss(mixture.model, mixture.guide, x)
    assert loss == pytest.approx(-float(sum(expected)) / 3, rel=1e-9)


@pytest.mark.parametrize("kind", [TraceEnum_ELBO, TraceInfo_ELBO])
def test_mixture_with_priors_is_an_ordinary_pair(kind):
    x, _ = blobs(num_data=60, num_features=2, distance=8.0)
    mixture = GaussianMixture(2, 2, "diagonal", priors=loc_and_weights())
    losses = train(mixture, x, elbo=kind(max_plate_nesting=1), steps=120, lr=0.1)
    assert sum(losses[-10:]) / 10 < 0.5 * sum(losses[:5]) / 5
    sites = poutine.trace(mixture.guide).get_trace(x).nodes
    assert {"loc", "weights"} <= sites.keys()
    theta = mixture.values()
    assert torch.equal(theta["loc"], mixture._autoguide.median()["loc"])
    joint = torch.stack(
        [
            theta["weights"][c].log()
            + dist.Normal(theta["loc"][c], theta["scale"][c]).to_event(1).log_prob(x)
            for c in range(2)
        ],
        -1,
    )
    assert torch.allclose(mixture.log_prob(x), joint.logsumexp(-1), rtol=1e-4)
    draws = mixture.sample(10_000)
    error = (draws.mean(0) - theta["weights"] @ theta["loc"]).abs()
    assert (error < 5 * draws.std(0) / 100).all()


def test_another_autoguide():
    x, _ = blobs(num_data=30, num_features=2)
    mixture = GaussianMixture(
        2, 2, "diagonal", priors=loc_and_weights(), autoguide=AutoMultivariateNormal
    )
    train(mixture, x, steps=3)
    assert mixture.values()["loc"].shape == (2, 2)
    assert mixture.log_prob(x).isfinite().all()


# ------------------------------------------------------------------------------ autoencoders


class PlainEncoder(nn.Module):
    """A user's own: images of rank three to latents of rank two, with nothing of ours."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * 3 * 4, 2 * 3)

    def forward(self, x):
        return dist.Normal(self.linear(x.flatten(-3)).unflatten(-1, (2, 3)), 0.5).to_event(2)


class PlainDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2 * 3, 2 * 3 * 4)

    def forward(self, z):
        logits = self.linear(z.flatten(-2)).unflatten(-1, (2, 3, 4))
        return dist.Bernoulli(logits=logits).to_event(3)


class LearnedPrior(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.ones(2))
        self.log_scale = nn.Parameter(torch.zeros(2))

    def forward(self):
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


def mlp_vae(prior=None, **settings):
    encoder = MLP(5, [8], head=NormalHead(2))
    return VAE(encoder, MLP(2, [8], head=NormalHead(5)), prior, **settings)


def vectors():
    return torch.randn(30, 5) * 0.3 + torch.arange(5.0)


def images():
    return (torch.rand(30, 2, 3, 4) < torch.linspace(0, 1, 4)).to(torch.get_default_dtype())


# name -> constructor, data, shape of z
VAES = {
    "networks of ours": (mlp_vae, vectors, (2,)),
    "a user's own networks": (lambda: VAE(PlainEncoder(), PlainDecoder()), images, (2, 3)),
    "a learned prior": (lambda: mlp_vae(LearnedPrior()), vectors, (2,)),
    "a distribution as prior": (
        lambda: mlp_vae(dist.Laplace(torch.ones(2), 2.0).to_event(1)),
        vectors,
        (2,),
    ),
    "binary data": (
        lambda: VAE(
            MLP((2, 3, 4), [8], head=NormalHead(2)), MLP(2, [8], head=BernoulliHead((2, 3, 4)))
        ),
        images,
        (2,),
    ),
}


def prior_by_hand(name):
    return {
        "a user's own networks": dist.Normal(torch.zeros(2, 3), 1.0).to_event(2),
        "a learned prior": dist.Normal(torch.ones(2), 1.0).to_event(1),
        "a distribution as prior": dist.Laplace(torch.ones(2), 2.0).to_event(1),
    }.get(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", VAES)
def test_vae_loss_by_hand(name):
    """log q(z | x) - log p(z) - log p(x | z) at the z that the same seed draws."""
    build, data, latent_shape = VAES[name]
    vae, x = build(), data()
    vae.model(x)  # a default prior takes its shape here
    loss = seeded_loss(vae, x)
    pyro.set_rng_seed(5)
    q = vae.encoder(x)
    z = q.sample()
    assert z.shape == (len(x), *latent_shape)
    expected = q.log_prob(z) - prior_by_hand(name).log_prob(z) - vae.decoder(z).log_prob(x)
    assert expected.shape == (len(x),)
    assert loss == pytest.approx(float(expected.detach().sum()), rel=1e-12)


@pytest.mark.parametrize("name", VAES)
def test_vae_trains(name, device):
    build, data, _ = VAES[name]
    vae, x = build().to(device), data().to(device)
    if name == "a distribution as prior" and device != "cpu":
        pytest.skip("a Distribution stays where it was made")
    before = values_of(vae)
    losses = train(vae, x, steps=60, lr=0.02)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    for parameter, value in vae.named_parameters():
        assert not torch.equal(value, before[parameter]), parameter


@pytest.mark.parametrize("name", VAES)
def test_vae_shapes(name, device):
    build, data, latent_shape = VAES[name]
    if name == "a distribution as prior" and device != "cpu":
        pytest.skip("a Distribution stays where it was made")
    vae, x = build().to(device), data().to(device)
    n, event = len(x), x.shape[1:]
    trace = poutine.trace(vae.model).get_trace(x)
    assert [f.name for f in trace.nodes["x"]["cond_indep_stack"]] == ["data"]
    assert trace.nodes["z"]["value"].shape == (n, *latent_shape)
    assert vae.encode(x).batch_shape == (n,)
    assert vae.encode(x).event_shape == latent_shape
    z = vae.prior_distribution().sample((6, 7))
    assert vae.decode(z).batch_shape == (6, 7)
    assert vae.decode(z).event_shape == event
    for found in (vae.reconstruct(x), vae.sample(n), vae.sample(n, mean=True)):
        assert found.shape == (n, *event)
        assert found.device.type == device
        assert not found.requires_grad


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", VAES)
def test_vae_reconstructs_and_interpolates(name):
    build, data, _ = VAES[name]
    vae, x = build(), data()
    start, end = x[:4], x[4:8]
    assert torch.equal(vae.reconstruct(start), vae.decoder(vae.encoder(start).mean).mean)
    path = vae.interpolate(start, end, 5)
    assert path.shape == (5, *start.shape)
    assert torch.allclose(path[0], vae.reconstruct(start), rtol=1e-12)
    assert torch.allclose(path[-1], vae.reconstruct(end), rtol=1e-12)
    middle = (vae.encoder(start).mean + vae.encoder(end).mean) / 2
    assert torch.allclose(path[2], vae.decoder(middle).mean, rtol=1e-12)
    assert vae.interpolate(start, end).shape == (8, *start.shape)
    assert vae.interpolate(start, end, 2).shape == (2, *start.shape)


@pytest.mark.usefixtures("float64")
def test_vae_draws_come_from_prior_and_likelihood():
    """x = z W^T + b + noise with z ~ p(z): mean and covariance of the draws."""
    problem = linear_gaussian(4, 2)
    vae = linear_vae(problem)
    n = 20_000
    x = vae.sample(n)
    covariance = problem.W @ problem.W.T
    for draws, expected in [
        (vae.sample(n), covariance + torch.diag(problem.scale**2)),
        (vae.sample(n, mean=True), covariance),
    ]:
        assert ((draws.mean(0) - problem.loc).abs() < 5 * draws.std(0) / math.sqrt(n)).all()
        centred = draws - problem.loc
        products = torch.einsum("ni,nj->nij", centred, centred)
        error = (products.mean(0) - expected).abs()
        assert (error < 5 * products.std(0) / math.sqrt(n)).all()
    assert x.shape == (n, 4)


def linear_vae(problem):
    """A linear Gaussian story as a VAE, its encoder the exact posterior."""
    return VAE(Posterior(problem), Likelihood(problem))


class Posterior(nn.Module):
    def __init__(self, problem):
        super().__init__()
        self.problem = problem
        self.head = nn.Module()
        self.head.event_shape = (problem.W.shape[1],)

    def forward(self, x):
        loc, scale_tril = self.problem.posterior(x)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)


class Likelihood(nn.Module):
    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def forward(self, z):
        loc = z @ self.problem.W.T + self.problem.loc
        return dist.Normal(loc, self.problem.scale).to_event(1)


@pytest.mark.usefixtures("float64")
def test_log_prob_of_a_linear_vae_is_exact():
    problem = linear_gaussian(6, 3)
    vae, x = linear_vae(problem), problem.sample(20)
    score = importance_sampling(vae.model, vae.guide, x, num_samples=1)
    assert torch.allclose(score.log_prob, problem.log_prob(x), rtol=0, atol=1e-10)


def test_default_prior_needs_a_shape():
    vae, x = VAE(PlainEncoder(), PlainDecoder()), images()
    for call in (lambda: vae.sample(3), vae.prior_distribution):
        with pytest.raises(ValueError, match=r"shape of z.*model or guide.*prior="):
            call()
    vae.model(x)
    assert vae.sample(3).shape == (3, 2, 3, 4)
    # An encoder with a head says it before any data.
    assert mlp_vae().sample(3).shape == (3, 5)


@pytest.mark.parametrize("move", ["networks", "model"])
def test_vae_in_double_precision(move):
    """Whether its networks are converted before, or the whole afterwards."""
    encoder, decoder = MLP(5, [8], head=NormalHead(2)), MLP(2, [8], head=NormalHead(5))
    if move == "networks":
        vae = VAE(encoder.double(), decoder.double())
    else:
        vae = VAE(encoder, decoder).double()
    x = vectors().double()
    assert train(vae, x, steps=3)
    assert vae.prior_distribution().sample().dtype == torch.float64
    for found in (vae.sample(3), vae.reconstruct(x), vae.interpolate(x, x, 2)):
        assert found.dtype == torch.float64


def test_functions_do_for_networks():
    vae = VAE(
        lambda x: dist.Normal(x[..., :2], 1.0).to_event(1),
        lambda z: dist.Normal(torch.cat([z, z], -1), 1.0).to_event(1),
    )
    x = torch.randn(6, 4)
    assert math.isfinite(seeded_loss(vae, x))
    assert vae.reconstruct(x).shape == (6, 4)


# -------------------------------------------------------------------- what all have in common


def image_vae():
    return VAE(PlainEncoder(), PlainDecoder(), dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))


# name -> constructor, data
MODELS = {
    "vae": (mlp_vae, vectors),
    "image vae": (image_vae, images),
    "vae with a learned prior": (lambda: mlp_vae(LearnedPrior()), vectors),
    "full mixture": (lambda: GaussianMixture(2, 5, "full"), vectors),
    "spherical mixture": (lambda: GaussianMixture(2, 5, "spherical"), vectors),
    "mixture with priors": (
        lambda: GaussianMixture(
            2, 5, "tied", priors={"loc": dist.Normal(0.0, 3.0).expand([2, 5]).to_event(2)}
        ),
        vectors,
    ),
}

every_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    constructor, data = MODELS[name]
    return constructor(), data()


@every_model
def test_two_models_are_trained_apart(name):
    (first, x), (second, _) = build(name), build(name)
    seeded_loss(second, x)  # its parameters are in the store before the first one's
    untouched = values_of(second)
    train(first, x)
    seeded_loss(second, x)
    assert same(values_of(second), untouched)
    trained = values_of(first)
    assert not same(trained, untouched)
    train(second, x)
    seeded_loss(first, x)
    assert same(values_of(first), trained)
    third, _ = build(name)
    seeded_loss(third, x)
    assert not same(values_of(third), trained)
    assert not same(values_of(third), values_of(second))


COPIES = {
    "deep copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@every_model
@pytest.mark.parametrize("when", ["new", "trained"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_starts_equal_and_is_trained_apart(name, when, how):
    model, x = build(name)
    if when == "trained":
        train(model, x)
    other = COPIES[how](model)
    assert seeded_loss(other, x) == seeded_loss(model, x)
    original = values_of(model)
    assert same(values_of(other), original)
    train(other, x)
    seeded_loss(model, x)
    assert same(values_of(model), original)
    assert all(
        not torch.equal(value, original[parameter]) for parameter, value in other.named_parameters()
    )
    trained = values_of(other)
    train(model, x)
    seeded_loss(other, x)
    assert same(values_of(other), trained)


@every_model
def test_what_others_keep_in_the_param_store_stays(name):
    foreign = pyro.param("theirs", torch.tensor([1.0, 2.0]))
    model, x = build(name)
    train(model, x)
    if isinstance(model, GaussianMixture):
        model.initialize(x)
    copy.deepcopy(model)
    assert torch.equal(pyro.param("theirs"), foreign)
    assert pyro.param("theirs").unconstrained() is foreign.unconstrained()


@every_model
@pytest.mark.parametrize("kind", ["of Pyro's", "of ours"])
def test_module_local_parameters(name, kind):
    with pyro.settings.context(module_local_params=True):
        model, x = build(name)
        elbo = elbo_for(model) if kind == "of Pyro's" else TraceInfo_ELBO(max_plate_nesting=1)
        loss = elbo(model.model, model.guide)
        loss(x)
        if kind == "of ours":  # Pyro's module of a loss does not see whose methods the pair are
            assert {id(p) for p in loss.parameters()} == {id(p) for p in model.parameters()}
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            value = loss(x)
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    assert not list(pyro.get_param_store().keys())


@every_model
@pytest.mark.parametrize("when", ["new", "trained"])
def test_state_dict_round_trip(name, when):
    model, x = build(name)
    if isinstance(model, GaussianMixture):
        model.initialize(50 * x)  # another floor than the default
    train(model, x)
    other, _ = build(name)
    if when == "trained":
        train(other, x)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert seeded_loss(other, x) == seeded_loss(model, x)
    assert same(values_of(other), values_of(model))
    if isinstance(model, GaussianMixture):
        assert torch.equal(other.log_prob(x), model.log_prob(x))
        assert torch.equal(other.floor, model.floor)
    train(other, x)
    assert not same(values_of(other), values_of(model))


def test_state_dicts_are_plain_tensors(tmp_path):
    """They go through a file without pickled classes."""
    x = vectors()
    mixture = GaussianMixture(2, 5).initialize(x)
    torch.save(mixture.state_dict(), tmp_path / "mixture.pt")
    other = GaussianMixture(2, 5)
    other.load_state_dict(torch.load(tmp_path / "mixture.pt", weights_only=True))
    assert torch.equal(other.log_prob(x), mixture.log_prob(x))


@every_model
def test_another_name_of_the_plate(name):
    vae_like = "vae" in name
    x = vectors()
    model = mlp_vae(plate="rows") if vae_like else GaussianMixture(2, 5, plate="rows")
    nodes = poutine.trace(model.model).get_trace(x).nodes
    assert [frame.name for frame in nodes["x"]["cond_indep_stack"]] == ["rows"]
    score = importance_sampling(model.model, model.guide, x, num_samples=2, plate="rows")
    assert score.log_prob.shape == (len(x),)


# ------------------------------------------------------------------------------ what is refused


def mixture_with(**priors):
    return GaussianMixture(2, 3, "full", priors=priors)


def normal(*shape):
    return dist.Normal(0.0, 1.0).expand(shape)


X = torch.zeros(4, 3)
NAN = torch.full((4, 3), math.nan)
USES = ("model", "guide", "log_prob", "responsibilities", "assign", "initialize")
WRONG_DATA = {
    "rank": (torch.zeros(4), ValueError, "x with 2 dimension.*got shape"),
    "higher rank": (torch.zeros(4, 3, 1), ValueError, "x with 2 dimension.*got shape"),
    "integers": (torch.zeros(4, 3, dtype=torch.long), TypeError, "floating point.*int64"),
    "no tensor": ([[0.0] * 3], TypeError, "torch.Tensor; got list"),
    "empty": (torch.zeros(0, 3), ValueError, "at least one datum"),
    "features": (torch.zeros(4, 2), ValueError, r"x with 3 features.*\(4, 2\)"),
}


@pytest.mark.parametrize("use", [use for use in USES if use != "guide"])
@pytest.mark.parametrize("wrong", WRONG_DATA)
def test_data_that_a_mixture_refuses(wrong, use):
    x, error, match = WRONG_DATA[wrong]
    mixture = GaussianMixture(2, 3)
    before = values_of(mixture)
    with pytest.raises(error, match=match):
        getattr(mixture, use)(x)
    assert same(values_of(mixture), before)


REFUSED = {
    "no components": (lambda: GaussianMixture(0, 3), "num_components.*>= 1; got 0"),
    "no features": (lambda: GaussianMixture(2, 0), "num_features.*>= 1; got 0"),
    "covariance": (lambda: GaussianMixture(2, 3, "diag"), "covariance in.*'diagonal'.*'diag'"),
    "floor of 0": (lambda: GaussianMixture(2, 3, floor=0.0), "floor.*positive"),
    "negative floor": (lambda: GaussianMixture(2, 3, floor=-1.0), "floor.*positive"),
    "NaN": (lambda: GaussianMixture(2, 3).initialize(NAN), r"finite values in x; got 12.*\(0, 0\)"),
    "infinity": (lambda: GaussianMixture(2, 3).initialize(X + math.inf), "finite values in x"),
    "too few data": (lambda: GaussianMixture(5, 3).initialize(X), "at least 5 data.*got 4"),
    "unknown prior": (lambda: mixture_with(means=normal()), r"among \['loc'.*got \['means'\]"),
    "a prior that does not exist here": (
        lambda: GaussianMixture(2, 3, "diagonal", priors={"tril": normal(2, 3, 3).to_event(3)}),
        r"got \['tril'\]",
    ),
    "a prior with a batch shape": (
        lambda: mixture_with(loc=normal(2, 3)),
        r"'loc' with event shape \(2, 3\).*got \(\) and \(2, 3\).*to_event\(2\)",
    ),
    "a prior of another shape": (
        lambda: mixture_with(loc=normal(3, 2).to_event(2)),
        r"'loc' with event shape \(2, 3\).*got \(3, 2\) and \(\)",
    ),
    "a prior of other weights": (
        lambda: mixture_with(weights=dist.Dirichlet(torch.ones(3))),
        r"'weights' with event shape \(2,\).*got \(3,\)",
    ),
    "one step": (lambda: mlp_vae().interpolate(vectors(), vectors(), 1), "num_steps >= 2.*got 1"),
    "no data for a vae": (lambda: mlp_vae().model(torch.zeros(0, 5)), "at least one datum"),
    "no data for its guide": (lambda: mlp_vae().guide(torch.zeros(0, 5)), "at least one datum"),
    "a scalar": (lambda: mlp_vae().model(torch.tensor(1.0)), "at least one dimension"),
    "a vae's features": (lambda: mlp_vae().guide(torch.zeros(4, 3)), r"\(4, 3\)"),
    "a prior of vae with a batch shape": (
        lambda: mlp_vae(dist.Normal(torch.zeros(2), 1.0)),
        r"prior.*no batch shape; got \(2,\).*to_event",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what):
    call, match = REFUSED[what]
    with pytest.raises(ValueError, match=match):
        call()


def test_a_vae_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"torch\.Tensor; got list"):
        mlp_vae().guide([1.0])
