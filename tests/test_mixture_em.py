"""Expectation-maximisation: against NumPy, scikit-learn, closed forms and SVI."""

import math
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as SklearnMixture

from pyro_lvm.datasets import old_faithful
from pyro_lvm.models import EMFit, GaussianMixture
from pyro_lvm.models.gaussian_moments import Moments, Table, maximum_likelihood, moments_given

DATA = Path(__file__).parents[1].parent / "shared" / "data"
COVARIANCES = ["full", "tied", "diagonal", "spherical"]
SKLEARN_NAMES = {"full": "full", "tied": "tied", "diagonal": "diag", "spherical": "spherical"}
N, C, D = 300, 3, 4

each_covariance = pytest.mark.parametrize("covariance", COVARIANCES)
in_float64 = pytest.mark.usefixtures("float64")


def blobs(num_data=N, distance=2.0, num_features=D):
    """Three overlapping clusters, each with correlations and scales of its own."""
    labels = torch.arange(num_data) % C
    centres = distance * torch.randn(C, num_features)
    mixing = torch.eye(num_features) + 0.4 * torch.randn(C, num_features, num_features).tril(-1)
    noise = torch.randn(num_data, num_features, 1)
    return centres[labels] + (mixing[labels] @ noise).squeeze(-1) * (1 + labels[:, None])


def started(x, covariance, num_components=C, floor=1e-6):
    """A mixture at a start that no symmetry hides: as far from k-means as from the optimum."""
    mixture = GaussianMixture(num_components, x.shape[1], covariance, floor=floor).to(x)
    mixture.weights = torch.rand(num_components).to(x).add(0.5).softmax(0)
    mixture.loc = x[torch.randperm(len(x))[:num_components]].clone()
    mixture.scale = x.std(0).mean() * (0.5 + torch.rand(mixture.scale.shape)).to(x)
    if covariance in ("full", "tied"):
        mixture.tril = (0.3 * torch.randn(mixture.tril.shape)).to(x)
    return mixture


def mean_log_prob(mixture, x):
    return float(mixture.log_prob(x).mean().detach())


def covariances(mixture):
    return mixture.covariances().detach()


# ------------------------------------------------------------------------------ one exact iteration


def iteration_by_hand(mixture, x):
    """Weights, means and covariances after one iteration, a plain loop in NumPy."""
    weights, loc = (mixture.values()[name].detach().numpy() for name in ("weights", "loc"))
    matrices, x = covariances(mixture).numpy(), x.numpy()
    joint = np.empty((len(x), C))
    for c in range(C):
        difference = x - loc[c]
        square = np.einsum("nd,de,ne->n", difference, np.linalg.inv(matrices[c]), difference)
        log_det = np.linalg.slogdet(2 * math.pi * matrices[c])[1]
        joint[:, c] = np.log(weights[c]) - 0.5 * (square + log_det)
    log_prob = np.logaddexp.reduce(joint, 1)
    shares = np.exp(joint - log_prob[:, None])
    counts = shares.sum(0)
    means = shares.T @ x / counts[:, None]
    scatters = np.stack(
        [(shares[:, c, None] * (x - means[c])).T @ (x - means[c]) for c in range(C)]
    )
    found = scatters / counts[:, None, None]
    if mixture.covariance == "tied":
        found = np.broadcast_to(scatters.sum(0) / len(x), found.shape)
    if mixture.covariance in ("diagonal", "spherical"):
        found = found * np.eye(D)
    if mixture.covariance == "spherical":
        found = np.trace(found, axis1=1, axis2=2)[:, None, None] / D * np.eye(D)
    return counts / len(x), means, found, log_prob.mean()


@in_float64
@each_covariance
def test_one_iteration_by_hand(covariance):
    x = blobs()
    mixture = started(x, covariance)
    weights, means, matrices, score = iteration_by_hand(mixture, x)
    fit = mixture.fit_em(x, max_iterations=1)
    assert fit.iterations == 1
    assert not fit.converged
    assert fit.history[0] == pytest.approx(score, rel=1e-12)
    assert fit.history[1] == pytest.approx(mean_log_prob(mixture, x), rel=1e-10)
    assert np.allclose(mixture.weights.detach(), weights, rtol=1e-10)
    assert np.allclose(mixture.loc.detach(), means, rtol=1e-10)
    assert np.allclose(covariances(mixture), matrices, rtol=1e-9, atol=1e-10)


def as_sklearn(mixture, **settings):
    """The same start in scikit-learn."""
    precisions = torch.linalg.inv(covariances(mixture))
    start = {
        "full": precisions,
        "tied": precisions[0],
        "diagonal": precisions.diagonal(dim1=-2, dim2=-1),
        "spherical": precisions[:, 0, 0],
    }[mixture.covariance]
    return SklearnMixture(
        mixture.num_components,
        covariance_type=SKLEARN_NAMES[mixture.covariance],
        weights_init=mixture.weights.detach().numpy(),
        means_init=mixture.loc.detach().numpy(),
        precisions_init=start.numpy(),
        reg_covar=0.0,
        **settings,
    )


@in_float64
@each_covariance
def test_iterations_of_scikit_learn(covariance):
    x = blobs()
    mixture = started(x, covariance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        reference = as_sklearn(mixture, max_iter=5, tol=0.0).fit(x.numpy())
    mixture.fit_em(x, max_iterations=5, tolerance=0.0)
    assert np.allclose(mixture.weights.detach(), reference.weights_, rtol=1e-8)
    assert np.allclose(mixture.loc.detach(), reference.means_, rtol=1e-8)
    assert mean_log_prob(mixture, x) == pytest.approx(reference.score(x.numpy()), rel=1e-10)


# ------------------------------------------------------------------------------------ the optimum


@in_float64
@pytest.mark.parametrize("seed", range(3))
@each_covariance
def test_the_likelihood_never_falls(covariance, seed):
    torch.manual_seed(seed)
    x = blobs(num_data=60)
    fit = started(x, covariance).fit_em(x, max_iterations=60, tolerance=0.0)
    gains = np.diff(fit.history)
    assert (gains > -1e-12).all()
    assert gains.sum() > 0.1


@in_float64
@pytest.mark.parametrize("seed", range(3))
@each_covariance
def test_the_likelihood_never_falls_at_the_floor(covariance, seed):
    """A scale held up by the floor is the constrained optimum, not a disturbance of the others."""
    torch.manual_seed(seed)
    x = blobs(num_data=60)
    x[:, 1] = x[:, 0] + 0.05 * x[:, 1]
    x[:20] = x[0]
    fit = started(x, covariance, floor=0.3).fit_em(x, max_iterations=60, tolerance=0.0)
    assert (np.diff(fit.history) > -1e-12).all()


@in_float64
@each_covariance
def test_svi_has_nothing_to_gain_at_the_optimum(covariance):
    x = blobs()
    mixture = GaussianMixture(C, D, covariance, floor=1e-6).initialize(x)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def gradients():
        loss = elbo.differentiable_loss(mixture.model, mixture.guide, x) / N
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(mixture.parameters()))]
        )

    before = gradients().norm()
    assert mixture.fit_em(x, max_iterations=5000, tolerance=1e-13).converged
    assert before > 1e-3
    assert gradients().norm() < 1e-5


@pytest.mark.skipif(not (DATA / "faithful").exists(), reason=f"no faithful in {DATA}")
@in_float64
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
    x = old_faithful(DATA)
    mixture = GaussianMixture(num_components, 2, covariance).initialize(x)
    reference = as_sklearn(mixture, max_iter=500, tol=1e-10).fit(x.numpy())
    fit = mixture.fit_em(x, tolerance=1e-10, max_iterations=500)
    assert fit.converged
    assert len(x) * fit.history[-1] == pytest.approx(expected, abs=1e-4)
    assert fit.history[-1] == pytest.approx(reference.score(x.numpy()), abs=1e-7)


@in_float64
@each_covariance
def test_one_component_is_the_closed_form(covariance):
    x = blobs()
    mixture = started(x, covariance, num_components=1)
    fit = mixture.fit_em(x)
    expected = torch.cov(x.T, correction=0)
    if covariance in ("diagonal", "spherical"):
        expected = torch.diag(expected.diagonal())
    if covariance == "spherical":
        expected = expected.trace() / D * torch.eye(D)
    assert fit.converged
    assert fit.iterations == 2  # one to get there, one to see it
    assert torch.allclose(mixture.loc[0], x.mean(0))
    assert torch.allclose(covariances(mixture)[0], expected, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------------------- chunks and rounding


@in_float64
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@each_covariance
def test_chunks_change_nothing(covariance, chunk_size):
    x = blobs(num_data=50)
    whole, chunked = (started(x, covariance) for _ in range(2))
    chunked.load_state_dict(whole.state_dict())
    a = whole.fit_em(x, max_iterations=4, tolerance=0.0)
    b = chunked.fit_em(x, max_iterations=4, tolerance=0.0, chunk_size=chunk_size)
    assert a.history == pytest.approx(b.history, rel=1e-11)
    assert torch.allclose(covariances(whole), covariances(chunked), rtol=1e-8)


@pytest.mark.parametrize("distance", [2.0, 200.0])
@each_covariance
def test_float32_far_from_the_origin(covariance, distance, device):
    """At an offset of 1e4 the sums of squares themselves would have no correct digit."""
    x = (1e4 + blobs(distance=distance)).to(device)
    single = started(x, covariance)
    double = GaussianMixture(C, D, covariance, floor=1e-6).to(device).double()
    for name, value in single.values().items():
        setattr(double, name, value.detach().double())
    fit = single.fit_em(x, max_iterations=20, tolerance=0.0, chunk_size=64)
    exact = double.fit_em(x.double(), max_iterations=20, tolerance=0.0)
    n = min(len(fit.history), len(exact.history))
    assert fit.history[:n] == pytest.approx(exact.history[:n], rel=1e-4)
    assert n > 5 or distance > 100
    assert single.loc.dtype == torch.float32
    assert single.loc.device.type == device
    scale = double.scale.mean().detach()
    assert torch.allclose(single.loc.double(), double.loc, atol=float(2e-2 * scale))
    relative = covariances(single).double() - covariances(double)
    assert relative.abs().max() < 2e-2 * scale**2


def test_ill_conditioned_covariances_in_float32():
    """Features that nearly determine each other: one of 1000 standard deviations is left."""
    x = torch.randn(2000, D, dtype=torch.float64)
    x[:, 1:] = x[:, :1] + 1e-3 * x[:, 1:]
    x = x.float()
    mixture = GaussianMixture(1, D, floor=1e-6)
    mixture.fit_em(x, max_iterations=20, tolerance=0.0)
    expected = torch.cov(x.double().T, correction=0)
    ratio = torch.linalg.solve(expected, covariances(mixture.double())[0])
    assert torch.linalg.eigvals(ratio).real.sub(1).abs().max() < 1e-2


# --------------------------------------------------------------------------------------- stepwise


@in_float64
@each_covariance
def test_stepwise_gets_near_the_optimum(covariance):
    x = blobs(num_data=3000)
    exact, stepwise = (GaussianMixture(C, D, covariance, floor=1e-6) for _ in range(2))
    exact.initialize(x)
    stepwise.load_state_dict(exact.state_dict())
    start = mean_log_prob(exact, x)
    exact.fit_em(x, tolerance=1e-8, max_iterations=2000)
    fit = stepwise.fit_em(x, batch_size=250, max_iterations=20, tolerance=0.0)
    best, found = (mean_log_prob(m, x) for m in (exact, stepwise))
    assert found > best - 0.05 * (best - start) - 1e-3
    assert best > start
    assert fit.iterations == len(fit.history) <= 20


@in_float64
@each_covariance
def test_one_stepwise_step_by_hand(covariance):
    """With one batch the sums move by 2^-decay from the mixture's own towards the data's."""
    x = blobs()
    mixture = started(x, covariance)
    old_weights, old_loc = (mixture.values()[n].detach().numpy() for n in ("weights", "loc"))
    old_matrices = covariances(mixture).numpy()
    weights, means, matrices, _ = iteration_by_hand(mixture, x)
    mixture.fit_em(x, batch_size=N, max_iterations=1, decay=0.8)
    gamma = 2**-0.8
    count = (1 - gamma) * old_weights + gamma * weights
    first = ((1 - gamma) * old_weights * old_loc.T + gamma * weights * means.T).T
    assert np.allclose(mixture.weights.detach(), count, rtol=1e-10)
    assert np.allclose(mixture.loc.detach(), first / count[:, None], rtol=1e-9)
    if covariance == "full":
        outer = np.einsum("cd,ce->cde", old_loc, old_loc), np.einsum("cd,ce->cde", means, means)
        second = (1 - gamma) * old_weights[:, None, None] * (old_matrices + outer[0])
        second = (second + gamma * weights[:, None, None] * (matrices + outer[1])).transpose(
            1, 2, 0
        )
        loc = first / count[:, None]
        expected = (second / count).transpose(2, 0, 1) - np.einsum("cd,ce->cde", loc, loc)
        assert np.allclose(covariances(mixture), expected, rtol=1e-8)


@in_float64
@each_covariance
def test_moments_of_parts_are_those_of_the_whole(covariance):
    x = blobs(num_data=90)
    mixture = started(x, covariance)
    table = mixture._table()
    parts = [moments_given(part, table)[0] for part in (x[:30], x[30:])]
    per_datum = [
        Moments(m.counts / n, m.loc, m.scatter / n) for m, n in zip(parts, (30, 60), strict=True)
    ]
    found = per_datum[0].merged(per_datum[1], 2 / 3)
    whole = moments_given(x, table)[0]
    for a, b in zip(found, (whole.counts / 90, whole.loc, whole.scatter / 90), strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


# --------------------------------------------------------------------------------- hostile inputs


@each_covariance
def test_the_floor_is_respected(covariance, device):
    x = torch.randn(3, 2).repeat(10, 1).to(device)
    mixture = GaussianMixture(3, 2, covariance, floor=0.2).to(device).initialize(x)
    fit = mixture.fit_em(x)
    assert all(math.isfinite(value) for value in fit.history)
    assert (mixture.scale > mixture.floor).all()
    if covariance != "tied":
        assert (mixture.scale < 1.02 * mixture.floor).all()  # the data would go to 0


HOSTILE = {
    "a constant column": lambda: torch.cat([torch.randn(20, 1), torch.full((20, 1), 0.1)], 1),
    "equal columns": lambda: torch.randn(20, 1).expand(20, 2),
    "one point, many times": lambda: torch.full((20, 2), 0.1) * torch.tensor([1.0, 3e4]),
    "fewer points than components": lambda: torch.randn(2, 2),
    "one point": lambda: torch.randn(1, 2),
    "far from the origin": lambda: 1e5 + torch.randn(3, 2).repeat(10, 1),
    "tiny": lambda: 1e-8 * torch.randn(3, 2).repeat(10, 1),
    "outlier": lambda: torch.cat([torch.randn(30, 2), torch.full((1, 2), 1e6)]),
}


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_covariance
@pytest.mark.parametrize("data", HOSTILE)
def test_degenerate_data(data, covariance, dtype, batch_size):
    x = HOSTILE[data]().to(dtype)
    mixture = GaussianMixture(3, 2, covariance).to(dtype)
    if len(x) > 3:
        mixture.initialize(x)
    fit = mixture.fit_em(x, max_iterations=30, tolerance=0.0, batch_size=batch_size)
    assert all(math.isfinite(value) for value in fit.history)
    assert all(value.isfinite().all() for value in mixture.parameters())
    assert (mixture.scale > mixture.floor).all()
    assert (mixture.weights > 0).all()
    assert mixture.log_prob(x).isfinite().all()
    assert mixture.scale.dtype == dtype


@pytest.mark.parametrize("excess", [0.0, 1e-14, 1e-9, 1e-5])
def test_scatters_that_rounding_left_indefinite(excess):
    scatter = torch.tensor([[4.0, 2 + excess], [2 + excess, 1.0]], dtype=torch.float64)
    loc, one = torch.zeros(1, 2).double(), torch.ones(1).double()
    previous = Table(one, loc, torch.ones(1, 2).double(), torch.zeros(1, 2, 2).double())
    least = torch.full((1, 2), 0.1).double()
    found = maximum_likelihood(Moments(one, loc, scatter[None]), previous, least)
    expected = torch.tensor([[4.0, 2.0], [2.0, 1.01]], dtype=torch.float64)
    assert torch.allclose(found.covariances()[0], expected, atol=1e-3)
    assert found.scale[0, 1] == least[0, 1]


@in_float64
@each_covariance
def test_components_without_data_stay(covariance):
    x = blobs()
    mixture = started(x, covariance)
    loc = mixture.loc.detach().clone()
    loc[1] = 1e5
    mixture.loc = loc
    matrix = covariances(mixture)[1]
    mixture.fit_em(x, max_iterations=3, tolerance=0.0)
    assert torch.allclose(mixture.loc[1], loc[1])
    assert not torch.allclose(mixture.loc[0], loc[0])
    assert 0 < mixture.weights[1] < 1e-9
    if covariance != "tied":
        assert torch.allclose(covariances(mixture)[1], matrix, rtol=1e-6)


def test_what_is_refused():
    x = blobs()
    mixture = started(x, "full")
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    bad = x.clone()
    bad[3, 1] = math.nan
    refused = [
        (bad, {}, "finite"),
        (bad.nan_to_num(nan=math.inf), {}, "finite"),
        (x[:, :2], {}, "features"),
        (x[:0], {}, "at least one"),
        (x, {"max_iterations": 0}, "max_iterations"),
        (x, {"tolerance": -1.0}, "tolerance"),
        (x, {"batch_size": 0}, "batch_size"),
        (x, {"chunk_size": 0}, "chunk_size"),
        (x, {"batch_size": 10, "decay": 0.5}, "decay"),
        (x, {"batch_size": 10, "decay": 1.1}, "decay"),
    ]
    for data, settings, match in refused:
        with pytest.raises(ValueError, match=match):
            mixture.fit_em(data, **settings)
    assert all(torch.equal(value, before[name]) for name, value in mixture.state_dict().items())
    with pytest.raises(TypeError, match="floating"):
        mixture.fit_em(x.long())
    prior = dist.Normal(0.0, 1.0).expand([C, D]).to_event(2)
    with pytest.raises(ValueError, match=r"priors.*loc"):
        GaussianMixture(C, D, priors={"loc": prior}).fit_em(x)


# --------------------------------------------------------------------------------- as its users do


def test_a_fitted_mixture_is_trained_on():
    """An optimiser that holds its parameters, and Pyro's param store, see what EM found."""
    x = blobs()
    mixture = GaussianMixture(C, D).initialize(x)
    svi = SVI(
        mixture.model,
        mixture.guide,
        pyro.optim.Adam({"lr": 1e-3}),
        TraceEnum_ELBO(max_plate_nesting=1),
    )
    before = svi.step(x)
    parameters = list(mixture.parameters())
    fit = mixture.fit_em(x)
    assert all(a is b for a, b in zip(parameters, mixture.parameters(), strict=True))
    assert svi.step(x) == pytest.approx(-N * fit.history[-1], rel=1e-5)
    assert -N * fit.history[-1] < before
    changed = mixture.loc.detach().clone()
    svi.step(x)
    assert not torch.equal(changed, mixture.loc)


def test_the_fit_prints_well():
    fit = EMFit((-3.25, -2.5, -2.4), 2, True)
    text = "log p(x) = -2.4 nats per datum after 2 iterations of EM (converged), -3.25 at first"
    assert str(fit) == repr(fit) == text
    assert "not converged" in str(EMFit((-3.25,), 1, False))


def test_data_of_another_precision_than_the_mixture():
    x = blobs()
    mixture = GaussianMixture(C, D).initialize(x)
    mixture.fit_em(x.double(), max_iterations=2)
    assert mixture.loc.dtype == torch.float32
    mixture.fit_em(x.bfloat16(), max_iterations=2)
    assert mixture.log_prob(x).isfinite().all()
