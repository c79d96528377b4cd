"""Missing values: log p of what was observed, and draws of the rest, against closed forms."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.nn import Linear

import pyro_lvm as lvm
from pyro_lvm.datasets import linear_gaussian
from pyro_lvm.marginal import exact, importance_sampling, impute
from pyro_lvm.marginal.imputation import Imputation

N, D, L = 40, 6, 2
COVARIANCES = ["full", "tied", "diagonal", "spherical"]


def holes(*shape):
    """Where something is observed; of the first datum nothing is, of the second one all."""
    mask = torch.rand(*shape) < 0.6
    mask[0], mask[1] = False, True
    return mask


def spoiled(value, mask):
    return torch.where(mask, value, torch.nan)


class Subset:
    """The linear Gaussian problem, of which some entries of each datum are observed."""

    def __init__(self, num_data=N):
        self.problem = linear_gaussian(D, L)
        self.x, self.mask = self.problem.sample(num_data), holes(num_data, D)
        self.seen = spoiled(self.x, self.mask)
        self.model = lvm.masked(self.problem.model, x=self.mask)

    def to(self, device):
        self.problem = self.problem.to(device)
        for name in ("x", "mask", "seen"):
            setattr(self, name, getattr(self, name).to(device))
        self.model = lvm.masked(self.problem.model, x=self.mask)
        return self

    @property
    def covariance(self):
        return self.problem.W @ self.problem.W.T + self.problem.scale.square().diag()

    @property
    def log_prob(self):
        """log N(x_o; b_o, S_oo) by hand."""
        found = []
        for x, o in zip(self.x, self.mask, strict=True):
            s = self.covariance[o][:, o]
            exact = dist.MultivariateNormal(self.problem.loc[o], s).log_prob(x[o]) if o.any() else 0
            found.append(exact + torch.zeros(()).to(self.x))
        return torch.stack(found)

    def conditional(self):
        """Mean and covariance of what is missing, by hand; x and 0 where it is observed."""
        means, covariances = self.x.clone(), torch.zeros(len(self.x), D, D).to(self.x)
        for i, o in enumerate(self.mask):
            m, s = ~o, self.covariance
            gain = s[m][:, o] @ torch.linalg.inv(s[o][:, o])
            means[i, m] = self.problem.loc[m] + gain @ (self.x[i] - self.problem.loc)[o]
            covariances[i, m.outer(m)] = (s[m][:, m] - gain @ s[o][:, m]).flatten()
        return means, covariances

    def guide(self, shift=0.0, widen=1.0, parameter=None):
        """The exact posterior of z given what is observed, moved and widened."""

        def guide(x):
            p, seen = self.problem, self.mask.to(self.x)
            weighted = seen.unsqueeze(-1) * p.W / p.scale.square().unsqueeze(-1)  # N x D x L
            precision = torch.eye(L).to(self.x) + weighted.mT @ p.W
            covariance = torch.linalg.inv(precision)
            residual = torch.where(self.mask, self.x - p.loc, 0.0)
            mean = (covariance @ (weighted.mT @ residual.unsqueeze(-1))).squeeze(-1)
            factor = torch.linalg.cholesky(covariance)
            with pyro.plate("data", len(x)):
                loc = mean + shift * factor.sum(-1) + (0.0 if parameter is None else parameter)
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=widen * factor))

        return guide


# ------------------------------------------------------------------- any pair, by `masked`


@pytest.mark.usefixtures("float64")
def test_log_p_of_what_is_observed_by_the_exact_posterior(device):
    subset = Subset().to(device)
    score = importance_sampling(subset.model, subset.guide(), subset.seen, num_samples=1)
    assert torch.allclose(score.log_prob, subset.log_prob, rtol=0, atol=1e-10)
    assert score.log_prob[0].abs() < 1e-14
    assert torch.allclose(score.log_prob[1], subset.problem.log_prob(subset.x)[1])


@pytest.mark.usefixtures("float64")
def test_log_p_of_what_is_observed_by_another_guide():
    subset = Subset()
    guide = subset.guide(shift=0.3, widen=1.3)
    score = importance_sampling(subset.model, guide, subset.seen, num_samples=4000)
    z_scores = (score.log_prob - subset.log_prob) / score.std_error
    assert z_scores.abs().max() < 5  # of the datum without observations, log p = 0, too
    assert 0.3 < z_scores.square().mean() < 2.5
    unmasked = importance_sampling(subset.problem.model, guide, subset.x, num_samples=4000)
    assert (unmasked.log_prob - score.log_prob)[2:].abs().mean() > 1


@pytest.mark.usefixtures("float64")
def test_gradients_are_those_of_the_closed_form():
    """Of log p(x, z) - log q(z | x_o), which is log p(x_o) at every z, by model and guide."""
    subset = Subset()
    parameters = [subset.problem.W.requires_grad_(), subset.problem.loc.requires_grad_()]
    expected = torch.autograd.grad(-subset.log_prob.sum(), parameters)
    loss = lvm.TraceInfo_ELBO().differentiable_loss
    for data in (subset.seen, torch.where(subset.mask, subset.x, 1e6)):
        found = torch.autograd.grad(loss(subset.model, subset.guide(), data), parameters)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n not in ("topics", "guide_chain")])
@pytest.mark.usefixtures("float64")
def test_complete_masks_change_no_bit(name):
    problem = PROBLEMS[name]()
    names = {"masked_mixture": ["x0", "x1"]}.get(name, ["x"])
    sizes = {"nested_masked": (4, NUM_DATA), "modules": (NUM_DATA, 2, 3), "mixture": (NUM_DATA, 2)}
    shape = sizes.get(name, (30 if name == "global_and_local" else NUM_DATA,))
    mask = torch.ones(shape, dtype=torch.bool)
    model = lvm.masked(problem.model, **dict.fromkeys(names, mask))
    results = []
    for program in (problem.model, model):
        torch.manual_seed(3)
        results.append(
            importance_sampling(program, problem.guide, *problem.args, num_samples=7).log_prob
        )
        torch.manual_seed(3)
        results.append(lvm.TraceInfo_ELBO().loss(program, problem.guide, *problem.args))
    assert torch.equal(results[0], results[2])
    assert results[1] == results[3]


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n not in ("topics", "guide_chain")])
@pytest.mark.usefixtures("float64")
def test_without_observations_the_likelihood_is_one(name):
    problem = PROBLEMS[name]()
    names = {"masked_mixture": ["x0", "x1"]}.get(name, ["x"])
    rows = torch.zeros(1, dtype=torch.bool)
    if name == "nested_masked":
        rows = rows.reshape(1, 1)
    model = lvm.masked(problem.model, **dict.fromkeys(names, rows))
    terms = lvm.compute_terms(model, problem.guide, *problem.args, num_particles=3)
    if name not in ("mixture", "masked_mixture"):
        assert (terms.log_likelihood == 0).all()
    if name in ("nested_masked", "semi_supervised"):
        return  # guides too narrow for the prior, which is the posterior here
    score = importance_sampling(model, problem.guide, *problem.args, num_samples=4000)
    assert (score.log_prob.abs() <= 5 * score.std_error + 1e-12).all()


@pytest.mark.usefixtures("float64")
def test_masks_have_the_dimensions_of_plates_and_event():
    """Rows, entries, and what all data share, against masks of all entries."""
    x = torch.randn(5, 3)

    def model(x):
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(torch.arange(3.0), 1.0).to_event(1), obs=x)

    log_prob = dist.Normal(torch.arange(3.0), 1.0).log_prob(x)
    rows, features = torch.arange(5) % 2 == 0, torch.tensor([True, False, True])
    for mask, expected in (
        (rows, log_prob * rows[:, None]),
        (features[None], log_prob * features),
        (rows[:, None] & features, log_prob * (rows[:, None] & features)),
        (None, log_prob),
    ):
        terms = lvm.compute_terms(lvm.masked(model, x=mask), None, x)
        assert torch.equal(terms.log_likelihood[0], expected.sum(-1))


@pytest.mark.usefixtures("float64")
def test_nested_plates_and_other_names():
    """Words in documents; the data plate is on the left, has no size, and another name."""
    x, mask = torch.randn(NUM_DATA, 4, 2), holes(NUM_DATA, 4, 2)

    def model(x):
        rows, words = pyro.plate("documents", dim=-2), pyro.plate("words", 4, dim=-1)
        with rows, words:
            pyro.sample("x", dist.Normal(torch.zeros(NUM_DATA, 4, 2), 1.0).to_event(1), obs=x)

    log_prob = dist.Normal(0.0, 1.0).log_prob(x)
    for seen in (mask, mask[..., 0], mask[:1], mask[:, :1]):
        own = seen if seen.dim() == 3 else seen.unsqueeze(-1)
        model_seen = lvm.masked(model, x=seen)
        terms = lvm.compute_terms(model_seen, None, spoiled(x, own), plate="documents")
        assert torch.allclose(terms.log_likelihood[0], (log_prob * own).sum((1, 2)))


@pytest.mark.usefixtures("float64")
def test_masks_of_all_data_follow_a_plate_that_draws_some():
    x, mask = torch.arange(30.0).reshape(10, 3), holes(10, 3)
    drawn = []

    def model():
        with pyro.plate("data", 10, subsample_size=4) as index:
            drawn.append(index)
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x[index])

    log_prob = dist.Normal(0.0, 1.0).log_prob(x) * mask
    for seen, expected in ((mask, log_prob), (mask[:, 0], None)):
        terms = lvm.compute_terms(lvm.masked(model, x=seen), None)
        if expected is None:
            expected = dist.Normal(0.0, 1.0).log_prob(x) * seen[:, None]
        assert torch.allclose(terms.log_likelihood[0], expected[drawn[-1]].sum(-1))
        assert terms.plate_scale == 2.5
    part = lvm.masked(model, x=torch.ones(4, 3, dtype=torch.bool))  # of the minibatch itself
    assert lvm.compute_terms(part, None).log_likelihood.isfinite().all()


@pytest.mark.usefixtures("float64")
def test_whole_data_may_be_missing_of_any_event():
    """Events without a marginal: Dirichlet observations, some of them NaN."""
    x, seen = dist.Dirichlet(torch.ones(6, 3)).sample(), torch.arange(6) < 4

    def model(x):
        concentration = pyro.param("c", torch.ones(3))
        with pyro.plate("data", 6):
            pyro.sample("x", dist.Dirichlet(concentration), obs=x)

    model_seen = lvm.masked(model, x=seen)
    loss = Trace_ELBO().differentiable_loss(model_seen, lambda x: None, spoiled(x, seen[:, None]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-4 * math.log(2))
    assert pyro.param("c").grad.isfinite().all()


def test_conditions_inside_and_masks_of_several_sites():
    def model():
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(0.0, 1.0))

    data = {"x": torch.zeros(4), "y": torch.zeros(4)}
    x, y = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    terms = lvm.compute_terms(lvm.masked(poutine.condition(model, data), x=x, y=y), None)
    expected = -0.5 * math.log(2 * math.pi) * torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert torch.allclose(terms.log_likelihood[0], expected)
    assert torch.equal(terms.masks["x"], x)
    assert torch.equal(terms.masks["y"], y)


def test_draws_are_those_of_the_story():
    subset = Subset()
    torch.manual_seed(0)
    expected = poutine.trace(poutine.uncondition(subset.problem.model)).get_trace(subset.x)
    torch.manual_seed(0)
    found = poutine.trace(poutine.uncondition(subset.model)).get_trace(subset.seen)
    assert torch.equal(found.nodes["x"]["value"], expected.nodes["x"]["value"])


def nothing_latent(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1) if z.dim() else z, obs=x)


def with_dirichlet(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Dirichlet(torch.ones(3)), obs=x)


@pytest.mark.parametrize(
    ("model", "masks", "error", "match"),
    [
        (nothing_latent, {"x": torch.ones(5, 3)}, TypeError, "mask of booleans for x.*torch.float"),
        (nothing_latent, {"x": True}, TypeError, "got bool"),
        (
            nothing_latent,
            {"x": torch.ones(4, 3, dtype=torch.bool)},
            ValueError,
            r"site 'x' of shape \(5, 3\), or \(5,\) for whole events; got \(4, 3\)",
        ),
        (nothing_latent, {"x": torch.ones(3, dtype=torch.bool)}, ValueError, r"got \(3,\)"),
        (nothing_latent, {"x": torch.ones(1, 5, 3, dtype=torch.bool)}, ValueError, r"got \(1, 5"),
        (nothing_latent, {"z": torch.ones(5, dtype=torch.bool)}, ValueError, "latent site 'z'"),
        (nothing_latent, {"y": torch.ones(5, dtype=torch.bool)}, ValueError, r"none at \['y'\]"),
        (
            with_dirichlet,
            {"x": torch.ones(5, 3, dtype=torch.bool)},
            ValueError,
            "Site 'x' has no such marginal.*Dirichlet.*Mask whole events",
        ),
    ],
)
def test_what_masked_refuses(model, masks, error, match):
    x = torch.full((5, 3), 1 / 3)
    with pytest.raises(error, match=match):
        lvm.compute_terms(lvm.masked(model, **masks), None, x)


# ----------------------------------------------------------------------------- observations


def test_terms_know_what_is_missing():
    subset = Subset()
    terms = lvm.compute_terms(subset.model, subset.guide(), subset.seen, num_particles=2)
    assert torch.equal(terms.masks["x"], subset.mask)
    assert torch.equal(terms.observed["x"], torch.where(subset.mask, subset.x, 0.0))
    assert lvm.compute_terms(subset.problem.model, subset.guide(), subset.x).masks == {}
    nested = PROBLEMS["nested_masked"]()
    terms = lvm.compute_terms(nested.model, nested.guide, *nested.args)
    assert terms.masks["x"].shape == (NUM_DATA, 4)
    assert (~terms.masks["x"]).sum() == 3


@pytest.mark.usefixtures("float64")
def test_scores_are_of_the_same_data_if_the_same_is_missing():
    subset = Subset()
    x = torch.where(subset.mask, subset.x, 0.0)

    def score(mask, x):
        model = lvm.masked(subset.problem.model, x=mask)
        return importance_sampling(model, subset.guide(), x, num_samples=2)

    seen, other = score(subset.mask, subset.seen), subset.mask.flip(0)
    assert len(lvm.compare({"a": seen, "b": score(subset.mask, x)})) == 2
    for different in (score(None, x), score(other, x)):
        with pytest.raises(ValueError, match="same data"):
            lvm.compare({"a": seen, "b": different})


@pytest.mark.usefixtures("float64")
def test_arviz_has_gaps():
    subset = Subset(num_data=8)
    seen = lvm.to_arviz(subset.model, subset.guide(), subset.seen, num_samples=3, num_weights=2)
    values = torch.as_tensor(seen["observed_data"]["x"].values)
    assert torch.equal(values.nan_to_num(1e3), torch.where(subset.mask, subset.x, 1e3))
    replicates = torch.as_tensor(seen["posterior_predictive"]["x"].values)
    assert replicates.isfinite().all()
    likelihood = torch.as_tensor(seen["log_likelihood"]["marginal"].values)
    assert torch.allclose(likelihood, subset.log_prob.expand(1, 3, -1))


def test_story_and_data_are_not_compared_through_a_mask():
    subset = Subset()
    objective = lvm.ImplicitDivergence(lvm.MMD())
    with pytest.raises(ValueError, match="mask at site 'x'"):
        objective.loss(subset.model, None, subset.seen)


# ---------------------------------------------------------------------------------- mixtures


def random_mixture(covariance, **settings):
    mixture = lvm.GaussianMixture(3, 4, covariance, **settings)
    mixture.weights = torch.tensor([0.5, 0.2, 0.3])
    mixture.loc = 2 * torch.randn(3, 4)
    mixture.scale = 0.5 + torch.rand(mixture.scale.shape)
    if covariance in ("full", "tied"):
        mixture.tril = torch.randn(mixture.tril.shape)
    return mixture


def joint_by_hand(mixture, x, mask):
    """log p(x_o, z = c), ``N x C``, by the sub-covariances."""
    rows = []
    for value, o in zip(x, mask, strict=True):
        row = mixture.weights.log()
        if o.any():
            covariances = mixture.covariances()[:, o][:, :, o]
            row = row + dist.MultivariateNormal(mixture.loc[:, o], covariances).log_prob(value[o])
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.usefixtures("float64")
def test_mixtures_integrate_missing_features_out(covariance):
    mixture, mask, x = random_mixture(covariance), holes(20, 4), 2 * torch.randn(20, 4)
    mask[3:6] = mask[6]
    seen, joint = spoiled(x, mask), joint_by_hand(mixture, x, mask)
    expected = joint.logsumexp(-1)
    found = mixture.log_prob(seen, mask)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    assert found[0].abs() < 1e-14
    assert torch.allclose(mixture.responsibilities(seen, mask), joint.softmax(-1))
    assert torch.equal(mixture.assign(seen, mask), joint.argmax(-1))
    score = exact(mixture.model, mixture.guide, seen, mask=mask)
    assert torch.allclose(score.log_prob, expected, rtol=0, atol=1e-10)
    several = importance_sampling(mixture.model, mixture.guide, seen, mask, num_samples=3)
    assert torch.allclose(several.log_prob, expected, rtol=0, atol=1e-10)
    parameters = list(mixture.parameters())
    loss = lvm.TraceInfo_ELBO().differentiable_loss(mixture.model, mixture.guide, seen, mask)
    gradients = torch.autograd.grad(loss, parameters)
    for a, b in zip(gradients, torch.autograd.grad(-expected.sum(), parameters), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_complete_data_of_mixtures_are_as_without_a_mask(covariance):
    mixture, x = random_mixture(covariance), torch.randn(20, 4)
    for mask in (torch.ones(20, 4, dtype=torch.bool), torch.ones(20, dtype=torch.bool)):
        assert torch.equal(mixture.log_prob(x, mask), mixture.log_prob(x))
        assert torch.equal(mixture.responsibilities(x, mask), mixture.responsibilities(x))
        plain, masked = (exact(mixture.model, None, x, mask=m).log_prob for m in (None, mask))
        assert torch.equal(plain, masked)


def test_nothing_observed_of_a_mixture_is_exactly_nothing():
    mixture = random_mixture("full")
    mixture.weights = torch.tensor([0.5, 0.25, 0.25])  # whose sum is 1 in every precision
    mask = torch.zeros(5, 1, dtype=torch.bool)
    assert (mixture.log_prob(torch.full((5, 4), torch.nan), mask) == 0).all()
    assert (exact(mixture.model, None, torch.zeros(5, 4), mask=mask).log_prob == 0).all()


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.usefixtures("float64")
def test_mixtures_draw_what_is_missing(covariance):
    """Both by themselves and by `impute`, with moments by the law of total covariance."""
    mixture, mask, x = random_mixture(covariance), holes(6, 4), 2 * torch.randn(6, 4)
    seen, n = spoiled(x, mask), 12_000
    mean, spread = mixture_moments(mixture, x, mask)
    assert torch.allclose(mixture.conditional_mean(seen, mask), mean, atol=1e-10)
    imputation = impute(mixture.model, mixture.guide, seen, mask, num_samples=n)
    assert (imputation.log_weight - imputation.log_weight[0]).abs().max() < 1e-10
    assert torch.allclose(imputation.ess, torch.full((6,), float(n)).double())
    for draws in (mixture.impute(seen, mask, num_samples=n), imputation.draws["x"]):
        assert draws.shape == (n, 6, 4)
        assert torch.equal(draws, torch.where(mask, x, draws))
        centred = draws - mean
        error = draws.std(0) / math.sqrt(n)
        assert (centred.mean(0).abs() <= 5 * error + 1e-12).all()
        products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
        error = products.std(0) / math.sqrt(n)
        assert ((products.mean(0) - spread).abs() <= 5 * error + 1e-12).all()


def mixture_moments(mixture, x, mask):
    """E and Cov of the missing features given the observed ones, by hand."""
    shares = joint_by_hand(mixture, x, mask).softmax(-1).detach()
    means, spreads = torch.zeros(3, *x.shape), torch.zeros(3, *x.shape, x.shape[1])
    for c, s in enumerate(mixture.covariances().detach()):
        for i, o in enumerate(mask):
            m, loc = ~o, mixture.loc[c].detach()
            gain = s[m][:, o] @ torch.linalg.inv(s[o][:, o])
            means[c, i] = x[i]
            means[c, i, m] = loc[m] + gain @ (x[i] - loc)[o]
            spreads[c, i, m.outer(m)] = (s[m][:, m] - gain @ s[o][:, m]).flatten()
    mean = torch.einsum("nc,cnd->nd", shares, means)
    apart = means - mean
    spread = torch.einsum("nc,cnde->nde", shares, spreads)
    return mean, spread + torch.einsum("nc,cnd,cne->nde", shares, apart, apart)


@pytest.mark.usefixtures("float64")
def test_mixtures_are_fitted_to_what_is_observed():
    """Two clusters, a third of their features missing: SVI finds both means and raises log p."""
    labels, mask = torch.rand(300) < 0.4, torch.rand(300, 3) < 0.67
    x = torch.randn(300, 3) @ (torch.eye(3) + torch.ones(3, 3).tril(-1)).T + 8.0 * labels[:, None]
    mixture = lvm.GaussianMixture(2, 3)
    mixture.loc = torch.tensor([[-1.0] * 3, [9.0] * 3])
    seen = torch.where(mask, x, 0.0)
    before = mixture.log_prob(seen, mask).mean().detach()
    lvm.fit(
        mixture.model,
        mixture.guide,
        (seen, mask),
        epochs=150,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
        progress=False,
    )
    assert mixture.log_prob(seen, mask).mean() > before + 1
    assert torch.allclose(mixture.loc[1] - mixture.loc[0], torch.full((3,), 8.0), atol=0.6)
    assert (mixture.assign(seen, mask) == labels)[mask.any(-1)].float().mean() > 0.97
    expected = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 3.0]])
    assert (mixture.covariances() - expected).abs().max() < 0.9


def test_mixtures_with_priors_take_masks():
    prior = dist.Normal(torch.zeros(2, 4), 3.0).to_event(2)
    mixture = lvm.GaussianMixture(2, 4, priors={"loc": prior})
    x, mask = torch.randn(20, 4), holes(20, 4)
    loss = lvm.TraceInfo_ELBO().differentiable_loss
    value = loss(mixture.model, mixture.guide, spoiled(x, mask), mask)
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in mixture.parameters())
    score = importance_sampling(mixture.model, mixture.guide, spoiled(x, mask), mask, num_samples=9)
    assert score.log_prob[0].abs() < 1e-5
    imputation = impute(mixture.model, mixture.guide, spoiled(x, mask), mask, num_samples=9)
    assert torch.allclose(imputation.ess, torch.full((20,), 9.0).double())
    assert imputation.draws["x"].isfinite().all()


# --------------------------------------------------------------------------------------- VAE


def small_vae(**settings):
    encoder = lvm.nn.MLP(D, [16], head=lvm.nn.NormalHead(L))
    decoder = lvm.nn.MLP(L, [16], head=lvm.nn.NormalHead(D))
    return lvm.VAE(encoder, decoder, **settings)


def seeded(function, *args, **kwargs):
    torch.manual_seed(5)
    return function(*args, **kwargs)


def test_vae_without_missing_entries_is_as_it_was():
    vae, x = small_vae(), torch.randn(N, D)
    loss = lvm.TraceInfo_ELBO().loss
    plain = seeded(loss, vae.model, vae.guide, x)
    score = seeded(importance_sampling, vae.model, vae.guide, x, num_samples=5).log_prob
    for mask in (torch.ones(N, D, dtype=torch.bool), torch.ones(N, dtype=torch.bool)):
        assert seeded(loss, vae.model, vae.guide, x, mask) == plain
        assert seeded(loss, vae.model, vae.guide, x, mask=mask) == plain
        found = seeded(importance_sampling, vae.model, vae.guide, x, mask=mask, num_samples=5)
        assert torch.equal(found.log_prob, score)


def test_vae_counts_what_is_observed_and_fills_the_rest():
    x, mask, filled = torch.randn(N, D), holes(N, D), []

    class Encoder(lvm.nn.MLP):
        def forward(self, x):
            filled.append(x)
            return super().forward(x)

    vae = lvm.VAE(
        Encoder(D, [16], head=lvm.nn.NormalHead(L)),
        lvm.nn.MLP(L, [16], head=lvm.nn.NormalHead(D)),
        fill=-3.0,
    )
    terms = lvm.compute_terms(vae.model, vae.guide, spoiled(x, mask), mask)
    assert torch.equal(filled[-1], torch.where(mask, x, -3.0))
    likelihood = vae.decode(terms.samples["z"][0]).base_dist.log_prob(x)
    assert torch.allclose(terms.log_likelihood[0], (likelihood * mask).sum(-1))
    assert terms.log_likelihood[0, 0] == 0
    q = vae.encode(torch.where(mask, x, -3.0))
    assert torch.allclose(terms.log_guide["z"][0], q.log_prob(terms.samples["z"][0]))
    assert torch.equal(vae.encode(spoiled(x, mask), mask).mean, q.mean)
    assert torch.equal(vae.reconstruct(spoiled(x, mask), mask), vae.decode(q.mean).mean)


def test_vae_has_gradients_without_nan():
    vae, x, mask = small_vae(), torch.randn(N, D), holes(N, D)
    for elbo in (lvm.TraceInfo_ELBO(), lvm.TraceIW_ELBO(num_particles=3, gradient="dreg")):
        gradients = []
        for data in (spoiled(x, mask), torch.where(mask, x, 9.0)):
            loss = seeded(elbo.differentiable_loss, vae.model, vae.guide, data, mask)
            gradients.append(torch.autograd.grad(loss, list(vae.parameters())))
        for a, b in zip(*gradients, strict=True):
            assert a.isfinite().all()
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["vae", "full", "diagonal"])
def test_compiled_losses_equal_eager_ones(kind):
    x, mask = torch.randn(12, D), holes(12, D)
    pair = small_vae() if kind == "vae" else lvm.GaussianMixture(2, D, kind)
    elbo = lvm.TraceInfo_ELBO()
    graph = lvm.compile(elbo, pair.model, pair.guide, backend=lambda graph, _: graph)
    for data in (x, spoiled(x, mask)):
        for seen in (mask, mask.flip(0)):  # no mask is a constant of the graph
            own = spoiled(x, seen) if data.isnan().any() else x
            results = []
            for loss in (graph, lambda *a: elbo.differentiable_loss(pair.model, pair.guide, *a)):
                value = seeded(loss, own, seen)
                results.append((value, *torch.autograd.grad(value, list(pair.parameters()))))
            for a, b in zip(*results, strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert graph.fallback_reason is None


def test_files_hold_what_the_encoder_sees(tmp_path):
    vae = small_vae(fill=0.5)
    lvm.save(vae, tmp_path / "vae.pt")
    again = lvm.load(tmp_path / "vae.pt")
    x, mask = torch.randn(N, D), holes(N, D)
    assert again.fill == 0.5
    assert torch.equal(again.encode(x, mask).mean, vae.encode(x, mask).mean)


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (torch.ones(N, D), TypeError, "mask of booleans for x"),
        (torch.ones(N, D + 1, dtype=torch.bool), ValueError, r"shape \(40, 6\).*got \(40, 7\)"),
        (torch.ones(D, dtype=torch.bool), ValueError, r"got \(6,\)"),
    ],
)
@pytest.mark.parametrize("kind", ["vae", "mixture"])
def test_what_models_refuse(kind, mask, error, match):
    pair, x = small_vae() if kind == "vae" else lvm.GaussianMixture(2, D), torch.randn(N, D)
    with pytest.raises(error, match=match):
        lvm.compute_terms(pair.model, pair.guide, x, mask=mask)
    with pytest.raises(error, match=match):
        (pair.encode if kind == "vae" else pair.log_prob)(x, mask)


def test_fill_is_a_number():
    with pytest.raises(ValueError, match="fill to be a finite number; got nan"):
        small_vae(fill=math.nan)


def test_fit_says_what_to_do_with_nan():
    vae, x = small_vae(), spoiled(torch.randn(N, D), holes(N, D))
    with pytest.raises(ValueError, match=r"nan_to_num\(\) and a mask"):
        lvm.fit(vae.model, vae.guide, (x, ~x.isnan()), epochs=1, progress=False)


def test_digits_with_half_of_the_pixels_are_learned_and_completed():
    """Train on incomplete digits, and complete others better than by the mean of each pixel."""
    x = torch.tensor(digits().data / 16, dtype=torch.float32)[torch.randperm(1797)]
    mask = torch.rand(x.shape) < 0.5
    train, test = slice(0, 1500), slice(1500, 1797)
    vae = lvm.VAE(
        lvm.nn.MLP(64, [128], head=lvm.nn.NormalHead(12)),
        lvm.nn.MLP(12, [128], head=lvm.nn.NormalHead(64, scale="shared")),
    )
    seen = torch.where(mask, x, 0.0)
    lvm.fit(
        vae.model,
        vae.guide,
        (seen[train], mask[train]),
        epochs=60,
        optimizer=lambda p: torch.optim.Adam(p, lr=4e-3),
        progress=False,
    )
    gaps = torch.where(mask[test], x[test], torch.nan)
    imputation = impute(vae.model, vae.guide, gaps, mask[test], num_samples=100)
    mean = seen[train].sum(0) / mask[train].sum(0).clamp(min=1)

    def error(guess):
        return float((guess - x[test]).square()[~mask[test]].mean())

    assert error(imputation.mean()) < 0.8 * error(mean)
    assert torch.equal(imputation.mean()[mask[test]], x[test][mask[test]])


def test_any_model_is_trained_with_masks_in_minibatches():
    """A story that knows of no mask, wrapped in every call, is trained as the VAE's own is."""
    vae, x, mask = small_vae(), torch.randn(N, D), holes(N, D)
    other = copy.deepcopy(vae)

    def model(x, mask):
        return lvm.masked(other.model, x=mask)(x)

    seen = torch.where(mask, x, 0.0)
    runs = [
        lvm.fit(*pair, (seen, mask), epochs=3, batch_size=16, seed=2, progress=False)
        for pair in ((vae.model, vae.guide), (model, other.guide))
    ]
    assert runs[0].history["loss"] == pytest.approx(runs[1].history["loss"], rel=1e-6)
    assert all(
        torch.allclose(a, b) for a, b in zip(vae.parameters(), other.parameters(), strict=True)
    )
    score = importance_sampling(model, other.guide, seen, mask, num_samples=5, batch_size=7)
    assert len(score.log_prob) == N


def digits():
    from sklearn.datasets import load_digits

    return load_digits()


# -------------------------------------------------------------------------------- imputation


@pytest.mark.usefixtures("float64")
def test_what_is_missing_has_its_conditional_moments(device):
    """From a guide that is off, by weights: E[x_m | x_o] and Cov[x_m | x_o] of the linear model."""
    subset = Subset(num_data=12).to(device)
    mean, covariance = subset.conditional()
    guide = subset.guide(shift=0.3, widen=1.3)
    imputation = impute(subset.model, guide, subset.seen, num_samples=8000)
    draws, missing = imputation.draws["x"], ~subset.mask
    assert draws.shape == (8000, 12, D)
    assert draws.device.type == device
    assert torch.equal(draws, torch.where(subset.mask, subset.x, draws))
    assert torch.equal(imputation.mean()[subset.mask], subset.x[subset.mask])
    z_scores = ((imputation.mean() - mean) / imputation.std_error())[missing]
    assert z_scores.abs().max() < 5
    assert 0.4 < z_scores.square().mean() < 2
    assert (imputation.std_error()[subset.mask] == 0).all()
    plain = (draws.mean(0) - mean)[missing] / (draws.std(0)[missing] / math.sqrt(8000))
    assert plain.abs().max() > 5  # the weights are needed
    weights = imputation.weights.unsqueeze(-1).unsqueeze(-1)
    products = (draws - mean).unsqueeze(-1) * (draws - mean).unsqueeze(-2)
    found = (weights * products).sum(0)
    error = (weights * (products - found)).square().sum(0).sqrt()
    assert ((found - covariance).abs() <= 5 * error + 1e-12).all()
    assert "warning" not in str(imputation)


@pytest.mark.usefixtures("float64")
def test_weights_are_those_of_importance_sampling():
    """Chunk by chunk, sample by sample, and in all: their mean is p(x_o)."""
    subset = Subset(num_data=8)
    for settings in ({}, {"chunk_size": 7}, {"chunk_size": 1}):
        imputation = impute(
            subset.model, subset.guide(0.3, 1.3), subset.seen, num_samples=400, **settings
        )
        assert imputation.num_samples == 400
        weights = (imputation.log_weight - subset.log_prob).exp()
        assert ((weights.mean(0) - 1).abs() <= 5 * weights.std(0) / 20).all()
        assert torch.allclose(imputation.ess, 1 / imputation.weights.square().sum(0))
    exact_guide = impute(subset.model, subset.guide(), subset.seen, num_samples=3)
    assert torch.allclose(exact_guide.log_weight, subset.log_prob.expand(3, -1))


@pytest.mark.usefixtures("float64")
def test_resampled_draws_count_alike():
    draws = torch.tensor([0.0, 1.0, 5.0]).reshape(3, 1, 1).expand(3, 2, 1)
    weights = torch.tensor([[0.1, 0.5], [0.2, 0.5], [0.7, 0.0]])
    imputation = Imputation(
        draws={"x": draws},
        masks={"x": torch.zeros(2, 1, dtype=torch.bool)},
        log_weight=weights.log() + 3.0,
        ess=torch.ones(2),
        pareto_k=torch.zeros(2),
    )
    assert torch.allclose(imputation.mean(), torch.tensor([[3.7], [0.5]]))
    by_hand = (0.1 * 3.7) ** 2 + (0.2 * 2.7) ** 2 + (0.7 * 1.3) ** 2
    assert torch.allclose(imputation.std_error()[0], torch.tensor([math.sqrt(by_hand)]))
    again = imputation.resample(4000)["x"]
    assert again.shape == (4000, 2, 1)
    shares = torch.stack([(again == v).double().mean((0, 2)) for v in (0.0, 1.0, 5.0)])
    assert (shares - weights).abs().max() < 5 * 0.5 / math.sqrt(4000)
    assert shares[2, 1] == 0


@pytest.mark.usefixtures("float64")
def test_discrete_observations_are_drawn():
    """z ~ N(0, 1), two pixels with probability sigmoid(2 z): by quadrature over z."""
    pixels = torch.tensor([[1.0, -5.0], [0.0, -5.0], [-5.0, -5.0], [1.0, 1.0]])
    mask = pixels >= 0

    def model(x, mask):
        with lvm.pair.Masks(x=mask), pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample(
                "x",
                dist.Bernoulli(logits=2 * z.unsqueeze(-1)).expand((*z.shape, 2)).to_event(1),
                obs=x,
            )

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.3))

    imputation = impute(model, guide, pixels, mask=mask, num_samples=6000)
    draws = imputation.draws["x"]
    assert draws.unique().tolist() == [0.0, 1.0]
    grid = torch.linspace(-8, 8, 2001)
    density, one = dist.Normal(0.0, 1.0).log_prob(grid).exp(), torch.sigmoid(2 * grid)
    expected = torch.stack(
        [(density * p * one).sum() / (density * p).sum() for p in (one, 1 - one, torch.ones(2001))]
    )
    found, error = imputation.mean()[:3, 1], imputation.std_error()[:3, 1]
    assert ((found - expected).abs() < 5 * error).all()
    assert torch.equal(imputation.mean()[3], torch.ones(2))


@pytest.mark.usefixtures("float64")
def test_masks_of_poutine_are_read_too():
    """x_i ~ N(z, 1) in a nested plate, some words under poutine.mask."""
    x, mask = torch.randn(3, NUM_DATA), holes(NUM_DATA, 3).T

    def model(x):
        with pyro.plate("data", NUM_DATA, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("words", 3, dim=-2), poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", NUM_DATA, dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.2))

    imputation = impute(model, guide, torch.where(mask, x, -50.0), num_samples=6000)
    count = mask.sum(0)
    mean = (x * mask).sum(0) / (1 + count)  # of z given what is observed, and so of all words
    assert imputation.draws["x"].shape == (6000, NUM_DATA, 3)
    found, error = imputation.mean(), imputation.std_error()
    assert torch.equal(found[mask.T], x.T[mask.T])
    assert ((found - mean[:, None]).abs() < 5 * error)[~mask.T].all()
    squares = (imputation.weights.unsqueeze(-1) * (imputation.draws["x"] - mean[:, None]) ** 2).sum(
        0
    )
    variance = (1 + 1 / (1 + count)).unsqueeze(-1).expand_as(squares)
    assert ((squares - variance).abs() < 0.25 * variance)[~mask.T].all()


@pytest.mark.usefixtures("float64")
def test_what_the_model_enumerates_is_drawn_given_all_there_is():
    """A mixture prior over z, and two sites of which one is missing now and then."""
    weights, centre = torch.tensor([0.25, 0.75]), torch.tensor([-2.0, 1.0])
    x, mask = torch.randn(NUM_DATA, 2), holes(NUM_DATA, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(weights), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(centre[y], 1.0))
            pyro.sample("a", dist.Normal(z, 0.5), obs=x[:, 0])
            pyro.sample("b", dist.Normal(3 * centre[y] + z, 0.5), obs=x[:, 1])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3, 2.5))

    pair = lvm.masked(model, a=mask[:, 0], b=mask[:, 1]), guide
    imputation = impute(*pair, spoiled(x, mask), num_samples=20_000)
    loc = torch.stack([centre, 4 * centre], -1)  # given y
    covariance = torch.full((2, 2), 1.0) + 0.25 * torch.eye(2)
    expected = torch.zeros(NUM_DATA, 2)
    for i, o in enumerate(mask):
        m, s = ~o, covariance
        joint = weights.log()
        if o.any():
            joint = joint + dist.MultivariateNormal(loc[:, o], s[o][:, o]).log_prob(x[i, o])
        gain = s[m][:, o] @ torch.linalg.inv(s[o][:, o])
        means = loc[:, m] + (x[i] - loc)[:, o] @ gain.T
        expected[i, m] = joint.softmax(-1) @ means
    for site, column in (("a", 0), ("b", 1)):
        found, error = imputation.mean(site), imputation.std_error(site)
        missing = ~mask[:, column]
        assert ((found - expected[:, column]).abs() < 5 * error)[missing].all()
    assert set(imputation.resample(5)) == {"a", "b"}
    with pytest.raises(ValueError, match=r"one of the sites \['a', 'b'\]; got None"):
        imputation.mean()


@pytest.mark.parametrize("kind", ["normal", "autoguide", "enumerated in the guide"])
@pytest.mark.usefixtures("float64")
def test_global_latents_are_those_of_the_guide(kind):
    """mean ~ q, z_i ~ N(mean, 1), two features around z_i; the exact mean given q by hand."""
    x, mask = torch.randn(NUM_DATA, 2), holes(NUM_DATA, 2)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            u = 0.0
            if kind == "enumerated in the guide":
                u = pyro.sample("u", dist.Bernoulli(0.5)).unsqueeze(-1) * 0.0
            loc = z.unsqueeze(-1) + u
            pyro.sample("x", dist.Normal(loc.expand(*loc.shape[:-1], 2), 1.0).to_event(1), obs=x)

    inner = AutoNormal(
        poutine.block(model, expose=["mean"]),
        init_loc_fn=lambda _: torch.tensor(0.7),
        init_scale=0.4,
    )

    def guide(x):
        if kind == "autoguide":
            inner(x)
        else:
            pyro.sample("mean", dist.Normal(0.7, 0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5, 1.3))
            if kind == "enumerated in the guide":
                pyro.sample("u", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    imputation = impute(lvm.masked(model, x=mask), guide, spoiled(x, mask), num_samples=10_000)
    count = mask.sum(-1)
    # E[z | x_o, mean] is linear in the mean, whose expectation under q is 0.7
    expected = (0.7 + torch.where(mask, x, 0.0).sum(-1)) / (1 + count)
    found, missing = imputation.mean(), ~mask
    spread = (1 + 1 / (1 + count) + (0.4 / (1 + count)) ** 2).sqrt().unsqueeze(-1)
    # a hundred draws of the mean, and draws of z, weighted among a hundred
    error = (0.4 / (1 + count)).unsqueeze(-1) / 10 + spread / imputation.ess.sqrt().unsqueeze(-1)
    assert ((found - expected.unsqueeze(-1)).abs() < 5 * error)[missing].all()
    assert (
        imputation.log_weight.reshape(100, 100, -1).logsumexp(1) - math.log(100)
    ).abs().max() < 1e-9


@pytest.mark.usefixtures("float64")
def test_pairs_that_subsample_are_completed_where_they_look():
    x, mask, drawn = 10 * torch.arange(30.0).expand(2, 30).T.clone(), holes(30, 2), []

    def model():
        with pyro.plate("data", 30, subsample_size=4) as index:
            drawn.append(index)
            z = pyro.sample("z", dist.Normal(x[index, 0], 1.0))
            loc = z.unsqueeze(-1).expand(*z.shape, 2)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=spoiled(x, mask)[index])

    def guide():
        with pyro.plate("data", 30, subsample_size=4) as index:
            pyro.sample("z", dist.Normal(x[index, 0], 1.0))

    imputation = impute(lvm.masked(model, x=mask), guide, num_samples=300, chunk_size=50)
    assert torch.equal(imputation.masks["x"], mask[drawn[-1]])
    assert (imputation.mean() - x[drawn[-1]]).abs().max() < 1


@pytest.mark.usefixtures("float64")
def test_printing_says_what_is_known():
    subset = Subset()
    good = impute(subset.model, subset.guide(0.1, 1.2), subset.seen, num_samples=300)
    missing = int((~subset.mask).sum())
    assert f"300 draws of what is missing in {N} data" in str(good)
    assert f"x: {missing} of {N * D} entries ({missing / N / D:.1%})" in str(good)
    assert "warning" not in str(good)
    bad = impute(subset.model, subset.guide(5.0, 0.3), subset.seen, num_samples=300)
    assert "warning: Pareto k above 0.7" in str(bad)
    assert "fewer than 10 effective draws" in str(bad)
    assert "marginal.widened" in str(bad)
    assert "warning" not in str(impute(subset.model, subset.guide(), subset.seen, num_samples=3))


def test_nothing_else_changes():
    """No parameter, no gradient, no training mode."""
    vae, x, mask = small_vae(), torch.randn(N, D), holes(N, D)
    vae.train()
    before = {n: p.clone() for n, p in vae.named_parameters()}
    draws = impute(vae.model, vae.guide, spoiled(x, mask), mask, num_samples=3)
    assert not draws.draws["x"].requires_grad
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in vae.named_parameters())
    assert vae.training


def test_programs_that_do_not_broadcast():
    """A layer for exactly N rows; sample by sample there is no other dimension."""
    layer, x, mask = Linear(L, D), torch.randn(N, D), holes(N, D)

    def model(x):
        with pyro.plate("data", N):
            z = pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
            assert z.shape == (N, L)
            pyro.sample("x", dist.Normal(layer(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", N):
            pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))

    pair = lvm.masked(model, x=mask), guide
    assert impute(*pair, x, num_samples=4, chunk_size=1).draws["x"].shape == (4, N, D)


def point_mass(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(torch.zeros(len(x), L), event_dim=1))


@pytest.mark.parametrize(
    ("masked", "guide", "settings", "match"),
    [
        (False, None, {}, r"observed sites with a mask.*got \['x'\] without one.*lvm.masked"),
        (True, None, {"num_samples": 0}, "num_samples to be a positive integer"),
        (True, None, {"chunk_size": 0}, "chunk_size to be a positive integer"),
        (True, None, {"plate": "rows"}, "plate named 'rows'"),
        (True, point_mass, {}, "point mass at"),
    ],
)
@pytest.mark.usefixtures("float64")
def test_what_impute_refuses(masked, guide, settings, match):
    subset = Subset()
    model = subset.model if masked else subset.problem.model
    with pytest.raises(ValueError, match=match):
        impute(model, guide or subset.guide(), torch.where(subset.mask, subset.x, 0.0), **settings)


def test_labels_under_a_mask_are_drawn_from_their_prior():
    """A mask around a site that is summed out takes no prior away: labels are 1 in 9 of 10."""
    seen, loc = torch.tensor([True, False]), torch.tensor([-3.0, 3.0])

    def model(x):
        with pyro.plate("data", 2), poutine.mask(mask=seen):
            z = pyro.sample(
                "z", dist.Categorical(torch.tensor([0.1, 0.9])), infer={"enumerate": "parallel"}
            )
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    drawn = impute(model, None, torch.tensor([0.5, 0.0]), num_samples=4000)
    mean, error = drawn.mean()[1], drawn.std_error()[1]
    assert (mean - 2.4).abs() < 5 * error
    assert drawn.mean()[0] == 0.5
