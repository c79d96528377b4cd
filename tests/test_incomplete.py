"""Distributions of which some entries are missing, against those of the rest alone."""

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_lvm.distributions import ContinuousBernoulli, Incomplete, IndexedNormal, patterns
from pyro_lvm.distributions import marginal_table as tables
from pyro_lvm.distributions.incomplete import completed, observed_entries
from pyro_lvm.distributions.supports import inside_support

pytestmark = pytest.mark.usefixtures("float64")
N, D, C, K = 7, 4, 3, 2


def positive(*shape):
    return torch.rand(*shape) + 0.5


# name -> a distribution of one number, N x D of them
UNIVARIATE = {
    "normal": lambda: dist.Normal(torch.randn(N, D), positive(N, D)),
    "shared": lambda: dist.Normal(torch.randn(D), positive(D)),
    "bernoulli": lambda: dist.Bernoulli(logits=torch.randn(N, D)),
    "bernoulli of probabilities": lambda: dist.Bernoulli(torch.rand(N, D)),
    "continuous bernoulli": lambda: ContinuousBernoulli(torch.randn(N, D)),
    "categorical": lambda: dist.Categorical(logits=torch.randn(N, D, 5)),
    "poisson": lambda: dist.Poisson(positive(N, D)),
    "negative binomial": lambda: dist.NegativeBinomial(positive(N, D), logits=torch.randn(N, D)),
    "binomial": lambda: dist.Binomial(5, logits=torch.randn(N, D)),
    "geometric": lambda: dist.Geometric(logits=torch.randn(N, D)),
    "gamma": lambda: dist.Gamma(positive(N, D), positive(N, D)),
    "beta": lambda: dist.Beta(positive(N, D), positive(N, D)),
    "log-normal": lambda: dist.LogNormal(torch.randn(N, D), positive(N, D)),
    "half-cauchy": lambda: dist.HalfCauchy(positive(N, D)),
    "student": lambda: dist.StudentT(positive(N, D), torch.randn(N, D)),
    "uniform": lambda: dist.Uniform(-positive(N, D), 3 + positive(N, D)),
    "pareto": lambda: dist.Pareto(1 + positive(N, D), positive(N, D)),
    "von mises": lambda: dist.VonMises(torch.randn(N, D), positive(N, D)),
    "laplace": lambda: dist.Laplace(torch.randn(N, D), positive(N, D)),
    "logit-normal": lambda: dist.TransformedDistribution(
        dist.Normal(torch.randn(N, D), positive(N, D)), [dist.transforms.SigmoidTransform()]
    ),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.randn(N, D, 2)),
        dist.Normal(torch.randn(N, D, 2), positive(N, D, 2)),
    ),
}


def leaves_of(distribution):
    """The parameters of a distribution, for their gradients."""
    names = ("loc", "scale", "logits", "probs", "rate", "concentration", "concentration1")
    found = [vars(distribution).get(n) for n in names]
    return [p for p in found if isinstance(p, torch.Tensor) and p.is_floating_point()]


def spoiled(value, mask):
    """The value with what no log-probability is defined for under the mask."""
    return torch.where(mask, value, torch.nan if value.is_floating_point() else -7)


@pytest.mark.parametrize("name", UNIVARIATE)
def test_independent_entries_are_left_out(name):
    base = UNIVARIATE[name]()
    parameters = [p.requires_grad_() for p in leaves_of(base)]
    value = base.expand((N, D)).sample()
    mask = torch.rand(N, D) < 0.5
    mask[0] = False
    parts = torch.where(mask, base.log_prob(value), 0.0).sum(-1)
    found = Incomplete(base.to_event(1), mask).log_prob(spoiled(value, mask))
    assert torch.equal(found, parts)
    assert found[0] == 0
    whole = Incomplete(base, mask).log_prob(spoiled(value, mask))
    assert torch.equal(whole, torch.where(mask, base.log_prob(value), 0.0))
    if parameters:
        expected = torch.autograd.grad(parts.sum(), parameters, retain_graph=True)
        gradients = torch.autograd.grad(found.sum(), parameters)
        for a, b in zip(gradients, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", UNIVARIATE)
def test_what_stands_at_missing_entries_is_inside_of_the_support(name):
    base = UNIVARIATE[name]().expand((N, D))
    value = inside_support(base, spoiled(base.sample(), torch.zeros(N, D, dtype=torch.bool)))
    assert base.log_prob(value.expand(N, D)).isfinite().all()
    if base.support.is_discrete is False and name != "mixture":
        assert base.support.check(value + 1e-6).all()
        assert base.support.check(value - 1e-6).all()


# name -> distribution with an event of dependent entries, of which all or none may be missing
WHOLE = {
    "dirichlet": lambda: dist.Dirichlet(positive(N, D)),
    "one-hot": lambda: dist.OneHotCategorical(logits=torch.randn(N, D)),
    "multinomial": lambda: dist.Multinomial(6, logits=torch.randn(N, D)),
    "flow": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(N, D), 1.0).to_event(1), [dist.transforms.ExpTransform()]
    ),
    "matrices": lambda: dist.LKJCholesky(3, positive(N)),
    "rows of dirichlets": lambda: dist.Dirichlet(positive(N, 2, D)).to_event(1),
}


@pytest.mark.parametrize("name", WHOLE)
def test_events_are_there_or_not(name):
    base = WHOLE[name]()
    value, seen = base.sample(), torch.arange(N) % 2 == 0
    mask = seen.reshape(N, *[1] * len(base.event_shape))
    found = Incomplete(base, mask).log_prob(spoiled(value, mask))
    assert torch.equal(found, torch.where(seen, base.log_prob(value), 0.0))
    with pytest.raises(ValueError, match=r"independent or normal; got .*Mask whole events"):
        Incomplete(base, mask.expand(value.shape))


def test_rows_of_an_event_may_be_missing():
    """Events of two Dirichlets: one of them is seen."""
    base = dist.Dirichlet(positive(N, 2, D))
    value, mask = base.sample(), torch.rand(N, 2, 1) < 0.5
    found = Incomplete(base.to_event(1), mask).log_prob(spoiled(value, mask))
    assert torch.equal(found, torch.where(mask[..., 0], base.log_prob(value), 0.0).sum(-1))


def test_unknown_supports_are_left_alone():
    class Odd(dist.Normal):
        @property
        def support(self):
            raise NotImplementedError

    class Odder(dist.Normal):
        support = constraints.symmetric

    value = torch.eye(3)
    assert inside_support(Odd(0.0, 1.0), value) is value
    assert inside_support(Odder(0.0, 1.0), value) is value


# ------------------------------------------------------------------------------------ normals


def factors(*batch):
    return torch.randn(*batch, D, D).tril(-1) + torch.diag_embed(positive(*batch, D))


def indexed(index, *, batch=(), tied=False, tril=True, spherical=False):
    c, d = (1 if tied else C), (1 if spherical else D)
    own = torch.randn(*batch, c, D, D) if tril else None
    return IndexedNormal(index, torch.randn(*batch, C, D), positive(*batch, c, d), own)


# name -> normals with batch shape N, or that of their own parameters
NORMALS = {
    "multivariate normal": lambda: dist.MultivariateNormal(
        torch.randn(N, D), scale_tril=factors(N)
    ),
    "one covariance": lambda: dist.MultivariateNormal(torch.randn(N, D), scale_tril=factors()),
    "one for all": lambda: dist.MultivariateNormal(torch.randn(D), scale_tril=factors()),
    "particles": lambda: dist.MultivariateNormal(torch.randn(K, N, D), scale_tril=factors()),
    "one covariance for each particle": lambda: dist.MultivariateNormal(
        torch.randn(K, N, D), scale_tril=factors(K, 1)
    ),
    "low rank": lambda: dist.LowRankMultivariateNormal(
        torch.randn(N, D), torch.randn(N, D, 2), positive(N, D)
    ),
    "low rank, one covariance": lambda: dist.LowRankMultivariateNormal(
        torch.randn(K, N, D), torch.randn(D, 2), positive(D)
    ),
    "indexed": lambda: indexed(torch.randint(C, (N,))),
    "indexed, tied": lambda: indexed(torch.randint(C, (N,)), tied=True),
    "indexed, diagonal": lambda: indexed(torch.randint(C, (N,)), tril=False),
    "indexed, spherical": lambda: indexed(torch.randint(C, (N,)), tril=False, spherical=True),
    "indexed by particles": lambda: indexed(torch.randint(C, (K, N))),
    "enumerated": lambda: indexed(torch.arange(C).reshape(C, 1)),
    "enumerated, tied": lambda: indexed(torch.arange(C).reshape(C, 1), tied=True),
    "enumerated, a table for each particle": lambda: indexed(
        torch.arange(C).reshape(C, 1, 1), batch=(K, 1)
    ),
    "diagonal, a table for each particle": lambda: indexed(
        torch.arange(C).reshape(C, 1, 1), batch=(K, 1), tril=False
    ),
    "a table for each datum": lambda: indexed(torch.randint(C, (N,)), batch=(N,)),
}


def moments_of(base, rows):
    """Mean and covariance of all batch elements by hand, ``rows x D`` and ``rows x D x D``."""
    if not isinstance(base, IndexedNormal):
        return base.mean.expand(*rows, D), base.covariance_matrix.expand(*rows, D, D)
    factor = base.scale.expand(*base.scale.shape[:-1], D).unsqueeze(-1) * (
        torch.eye(D) + (torch.zeros(D, D) if base.tril is None else base.tril)
    )
    one_hot = torch.nn.functional.one_hot(base.index, C).double().expand(*rows, C)
    factor = factor.expand(*factor.shape[:-3], C, D, D)
    mean = torch.einsum("...c,...cd->...d", one_hot, base.loc.expand(*base.loc.shape[:-2], C, D))
    covariance = torch.einsum("...c,...cde->...de", one_hot, factor @ factor.mT)
    return mean.expand(*rows, D), covariance.expand(*rows, D, D)


def by_hand(base, value, mask, rows):
    """log N(x_o; loc_o, S_oo) of each element of the batch."""
    means, covariances = (t.reshape(-1, *t.shape[len(rows) :]) for t in moments_of(base, rows))
    value, mask = (t.expand(*rows, D).reshape(-1, D) for t in (value, mask))
    found = []
    for x, o, loc, s in zip(value, mask, means, covariances, strict=True):
        seen = (
            dist.MultivariateNormal(loc[o], s[o][:, o]).log_prob(x[o]) if o.any() else loc.sum() * 0
        )
        found.append(seen)
    return torch.stack(found).reshape(rows)


def parameters_of(base):
    names = ("loc", "scale", "tril", "_unbroadcasted_scale_tril", "_unbroadcasted_cov_factor")
    found = [vars(base).get(name) for name in (*names, "_unbroadcasted_cov_diag")]
    return [p.requires_grad_() for p in found if p is not None]


def some_missing():
    """Masks with equal rows, none and all observed among them."""
    mask = torch.rand(N, D) < 0.5
    mask[0], mask[1], mask[2] = False, True, mask[3]
    return mask


@pytest.mark.parametrize("name", NORMALS)
def test_marginals_of_normals_are_those_of_the_sub_covariance(name):
    base, mask, value = NORMALS[name](), some_missing(), torch.randn(N, D)
    parameters = parameters_of(base)
    incomplete = Incomplete(base, mask)
    rows = torch.broadcast_shapes(base.batch_shape, (N,))
    assert incomplete.batch_shape == rows
    found, expected = incomplete.log_prob(spoiled(value, mask)), by_hand(base, value, mask, rows)
    assert found.shape == expected.shape == rows
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)
    assert (found[..., 0] == 0).all()
    slope = torch.randn(rows)
    gradients = torch.autograd.grad((slope * found).sum(), parameters)
    expected = torch.autograd.grad((slope * expected).sum(), parameters)
    for a, b in zip(gradients, expected, strict=True):
        if a.shape[-2:] == (D, D) and not isinstance(base, IndexedNormal):
            b = b.tril()  # of scale_tril, of which the rest is not free
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NORMALS)
def test_complete_data_have_the_value_of_the_base_to_the_last_bit(name):
    base, value = NORMALS[name](), torch.randn(N, D)
    for mask in (torch.ones(N, D, dtype=torch.bool), torch.ones(N, 1, dtype=torch.bool)):
        incomplete = Incomplete(base, mask)
        assert torch.equal(incomplete.log_prob(value), incomplete.base_dist.log_prob(value))


@pytest.mark.parametrize("name", NORMALS)
def test_events_of_normals_may_be_missing_as_a_whole(name):
    base, value, seen = NORMALS[name](), torch.randn(N, D), torch.arange(N) % 3 > 0
    found = Incomplete(base, seen.unsqueeze(-1)).log_prob(spoiled(value, seen.unsqueeze(-1)))
    expected = torch.where(seen, base.log_prob(value), 0.0)
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NORMALS)
def test_missing_entries_are_drawn_given_the_observed_ones(name):
    base, mask, value, n = NORMALS[name](), some_missing(), torch.randn(N, D), 6000
    rows = torch.broadcast_shapes(base.batch_shape, (N,))
    incomplete = Incomplete(base, mask).expand((n, *rows))
    draws = incomplete.sample_given(spoiled(value, mask))
    assert draws.shape == (n, *rows, D)
    assert torch.equal(draws, torch.where(mask, value, draws))
    means, covariances = moments_of(base, rows)
    mean, covariance = torch.zeros(*rows, D), torch.zeros(*rows, D, D)
    for row in torch.cartesian_prod(*(torch.arange(size) for size in rows)).reshape(-1, len(rows)):
        row = tuple(row.tolist())
        mean[row], covariance[row] = conditional(
            means[row], covariances[row], value[row[-1]], mask[row[-1]]
        )
    assert torch.allclose(Incomplete(base, mask).mean_given(spoiled(value, mask)), mean)
    error = (draws.mean(0) - mean) / (covariance.diagonal(dim1=-2, dim2=-1) / n).sqrt()
    assert error[~mask.expand(error.shape)].abs().max() < 5
    centred = draws - mean
    found = torch.einsum("n...i,n...j->...ij", centred, centred) / n
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    spread = variance.unsqueeze(-1) * variance.unsqueeze(-2) + covariance.square()
    assert ((found - covariance).abs() <= 5 * (spread / n).sqrt()).all()


def conditional(loc, covariance, x, observed):
    """Mean and covariance of all entries given the observed ones, by hand."""
    missing, mean, spread = ~observed, x.clone(), torch.zeros(D, D)
    gain = covariance[missing][:, observed] @ torch.linalg.inv(covariance[observed][:, observed])
    mean[missing] = loc[missing] + gain @ (x - loc)[observed]
    rest = covariance[missing][:, missing] - gain @ covariance[observed][:, missing]
    spread[missing.outer(missing)] = rest.flatten()
    return mean, spread


@pytest.mark.parametrize("name", ["indexed", "indexed, tied", "low rank"])
def test_gradients_can_be_differentiated(name):
    mask, value = some_missing(), torch.randn(N, D)
    base = NORMALS[name]()
    parameters = parameters_of(base)
    (first,) = parameters[:1]
    results = []
    for log_prob in (
        Incomplete(base, mask).log_prob(spoiled(value, mask)),
        by_hand(base, value, mask, (N,)),
    ):
        gradients = torch.autograd.grad(log_prob.sum(), parameters, create_graph=True)
        total = sum(g.square().sum() for g in gradients)
        results.append(torch.autograd.grad(total, first)[0])
    assert torch.allclose(*results, rtol=1e-7, atol=1e-8)


def test_gradient_by_the_data():
    base, mask, value = NORMALS["indexed"](), some_missing(), torch.randn(N, D).requires_grad_()
    (gradient,) = torch.autograd.grad(Incomplete(base, mask).log_prob(value).sum(), value)
    (expected,) = torch.autograd.grad(by_hand(base, value, mask, (N,)).sum(), value)
    assert torch.allclose(gradient, expected)
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("name", ["indexed", "indexed, diagonal", "enumerated", "one covariance"])
@pytest.mark.parametrize("most", [1, 5])
def test_portions_do_not_change_anything(name, most, monkeypatch):
    base, mask, value = NORMALS[name](), some_missing(), torch.randn(N, D)
    parameters = parameters_of(base)

    def run():
        log_prob = Incomplete(base, mask).log_prob(spoiled(value, mask))
        mean = Incomplete(base, mask).mean_given(spoiled(value, mask))
        total = (log_prob * torch.arange(N)).sum() + mean.square().sum()
        return log_prob, mean, *torch.autograd.grad(total, parameters)

    expected = run()
    monkeypatch.setattr(tables, "columns_at_once", lambda *_: most)
    for a, b in zip(run(), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_recorded_tensors_have_the_same_densities(monkeypatch):
    """What is recorded has one factorisation for each datum, and values decide nothing."""
    for name in NORMALS:
        base, mask, value = NORMALS[name](), some_missing(), torch.randn(N, D)
        incomplete = Incomplete(base, mask)
        expected = incomplete.log_prob(spoiled(value, mask)), incomplete.mean_given(value)
        with monkeypatch.context() as patched:
            patched.setattr(torch._C, "_get_tracing_state", lambda: True)
            found = incomplete.log_prob(spoiled(value, mask)), incomplete.mean_given(value)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


def test_single_precision_is_that_of_the_parameters():
    """Conditional deviations a thousand times smaller than the marginal ones."""
    index, mask = torch.randint(C, (200,)), torch.rand(200, 6) < 0.5
    loc, scale = torch.randn(C, 6), torch.full((C, 6), 1e-3)
    scale[:, 0] = 1.0
    tril = torch.zeros(C, 6, 6)
    tril[..., 0] = 1e3  # features follow the first one
    base = IndexedNormal(index, loc, scale, tril)
    value = base.sample()
    single = IndexedNormal(index, loc.float(), scale.float(), tril.float())
    exact = Incomplete(base, mask).log_prob(value.float().double())
    found = Incomplete(single, mask).log_prob(value.float())
    assert found.dtype == torch.float32
    assert (found.double() - exact).abs().max() < 0.05


def test_a_covariance_that_is_none_gives_nan():
    base = IndexedNormal(
        torch.zeros(2).long(), torch.zeros(1, D), torch.ones(1, D), torch.zeros(1, D, D)
    )
    base.scale[0, 0] = torch.nan
    assert (
        Incomplete(base, torch.tensor([[True] * 3 + [False]]))
        .log_prob(torch.zeros(2, D))
        .isnan()
        .all()
    )


# -------------------------------------------------------------------------------- the wrapper


def test_draws_mean_and_support_are_those_of_the_whole():
    base = dist.Normal(torch.randn(N, D), positive(N, D)).to_event(1)
    incomplete = Incomplete(base, some_missing())
    assert incomplete.has_rsample
    torch.manual_seed(1)
    draw = incomplete.rsample((5,))
    torch.manual_seed(1)
    assert torch.equal(draw, base.rsample((5,)))
    assert torch.equal(incomplete.mean, base.mean)
    assert torch.equal(incomplete.variance, base.variance)
    assert incomplete.support.check(draw).all()
    assert incomplete.event_dim == 1
    assert incomplete.expand([K, N]).sample().shape == (K, N, D)


def test_masks_are_found_under_wrappers():
    first, rows = some_missing(), torch.arange(N) % 2 == 0
    base, value = dist.Normal(torch.randn(N, D), 1.0), torch.randn(N, D)
    log_prob = base.log_prob(value)
    cases = [
        (Incomplete(base.to_event(1), first), first),
        (Incomplete(base, first).to_event(1), first),
        (Incomplete(Incomplete(base.to_event(1), first), rows[:, None]), first & rows[:, None]),
        (Incomplete(base.to_event(1), first).mask(rows), first & rows[:, None]),
        (Incomplete(base.to_event(1).mask(rows), first), first & rows[:, None]),
        (Incomplete(base.to_event(1).mask(False), first), first & False),
        (base.to_event(1).mask(rows), rows[:, None]),
        (base.mask(first).to_event(1), first),
        (base.to_event(1).mask(False), torch.tensor(False)),
        (base.to_event(1).mask(True), torch.tensor(True)),
    ]
    for distribution, mask in cases:
        expected = torch.where(mask, log_prob, 0.0).sum(-1)
        assert torch.allclose(distribution.log_prob(value), expected)
        draw = completed(distribution, value)
        assert torch.equal(torch.where(mask, value, draw), draw)
        assert not torch.isclose(draw, value)[~mask.expand(N, D)].any()
        assert torch.equal(observed_entries(distribution).expand(N, D), mask.expand(N, D))
    assert observed_entries(base.to_event(1)) is None
    assert completed(base, value) is value


def test_discrete_entries_are_drawn_as_numbers_of_their_kind():
    base = dist.Categorical(logits=torch.randn(N, D, 5)).to_event(1)
    mask = some_missing()
    draw = Incomplete(base, mask).sample_given(base.sample())
    assert draw.dtype == torch.long
    assert ((draw >= 0) & (draw < 5)).all()


def test_values_are_validated_where_they_are_observed():
    mask, value = some_missing(), torch.randn(N, D)
    value[1, 0] = torch.nan
    for name in ("indexed", "multivariate normal", "low rank"):
        with pytest.raises(ValueError, match="within the support"):
            Incomplete(NORMALS[name](), mask).log_prob(value)
    with pytest.raises(ValueError, match="within the support"):
        Incomplete(UNIVARIATE["normal"]().to_event(1), mask).log_prob(value)


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (torch.ones(N, D), TypeError, r"mask of booleans for a distribution.*got torch.float"),
        ([True] * D, TypeError, "got list"),
        (torch.ones(N, 2, dtype=torch.bool), ValueError, r"event shape \(4,\).*got shape \(7, 2\)"),
        (torch.tensor(True), ValueError, r"got shape \(\)"),
    ],
)
def test_what_is_no_mask(mask, error, match):
    with pytest.raises(error, match=match):
        Incomplete(dist.Normal(torch.zeros(N, D), 1.0).to_event(1), mask)


def test_groups_are_computed_together():
    """Sums over the rows with one key, whatever the portions."""
    keys = torch.tensor([3, 1, 3, 3, 2, 1, 3, 0])
    value = torch.randn(8)
    for most, least in ((100, 1), (4, 1), (4, 3), (1, 1), (3, 2)):
        seen = []

        def compute(key, numbers, seen=seen):
            seen.append(numbers.numel())
            return key.unsqueeze(-1) * 10 + value[numbers]

        found = patterns.in_groups(compute, keys, most=most, least=least)
        assert torch.equal(found, keys * 10 + value)
        assert max(seen) <= max(most, 1)
    assert seen == [3, 2, 1, 1, 1]  # of four rows with key 3 no more than 3 at a time
