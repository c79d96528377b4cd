"""IndexedNormal against the dense multivariate normal, for every shape of its table."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyro_lvm.distributions import IndexedNormal

C, D, N, K = 3, 4, 5, 2

# name -> shapes of scale and tril
TABLES = {
    "full": ((C, D), (C, D, D)),
    "tied": ((1, D), (1, D, D)),
    "diagonal": ((C, D), None),
    "spherical": ((C, 1), None),
    "tied factor, own scales": ((C, D), (1, D, D)),
    "tied scales, own factor": ((1, D), (C, D, D)),
}
# name -> batch dimensions of loc, scale and tril: global latents inside a plate of K particles
BATCHES = {
    "none": ((), (), ()),
    "all": ((K, 1), (K, 1), (K, 1)),
    "loc": ((K, 1), (), ()),
    "scale": ((), (K, 1), ()),
    "tril": ((), (), (K, 1)),
}
BATCHED_TABLES = [
    (table, batch)
    for table, (_, tril_shape) in TABLES.items()
    for batch in BATCHES
    if not (batch == "tril" and tril_shape is None)
]
INDICES = {
    "enumerated": lambda: torch.arange(C).reshape(C, 1, 1),
    "sampled": lambda: torch.randint(C, (N,)),
    "sampled per particle": lambda: torch.randint(C, (K, N)),
    "one": lambda: torch.tensor(1),
}


def make_table(name, batch="none", dtype=None):
    scale_shape, tril_shape = TABLES[name]
    loc_batch, scale_batch, tril_batch = BATCHES[batch]
    loc = torch.randn(*loc_batch, C, D, dtype=dtype)
    scale = 0.5 + torch.rand(*scale_batch, *scale_shape, dtype=dtype)
    tril = None if tril_shape is None else torch.randn(*tril_batch, *tril_shape, dtype=dtype)
    return loc, scale, tril


def scale_trils(loc, scale, tril):
    """diag(scale) (I + tril) of each Gaussian, ``... x C x D x D``."""
    unit = torch.eye(D, dtype=loc.dtype)
    if tril is not None:
        unit = unit + tril.tril(-1)
    factor = scale.expand(*scale.shape[:-2], C, D).unsqueeze(-1) * unit
    batch = torch.broadcast_shapes(factor.shape[:-3], loc.shape[:-2])
    return factor.expand(*batch, C, D, D)


def dense(index, loc, scale, tril):
    """The same Gaussians as a MultivariateNormal, one matrix for each element of the batch."""
    factor = scale_trils(loc, scale, tril)
    batch = torch.broadcast_shapes(index.shape, factor.shape[:-3])
    one_hot = torch.nn.functional.one_hot(index, C).to(loc).expand(*batch, C)
    chosen_loc = torch.einsum("...c,...cd->...d", one_hot, loc.expand(*batch, C, D))
    chosen = torch.einsum("...c,...cde->...de", one_hot, factor.expand(*batch, C, D, D))
    return dist.MultivariateNormal(chosen_loc, scale_tril=chosen)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize(("table", "batch"), BATCHED_TABLES)
def test_log_prob_is_the_multivariate_normals(table, batch, index):
    z = INDICES[index]()
    parameters = make_table(table, batch)
    value = 2 * torch.randn(N, D)
    ours, reference = IndexedNormal(z, *parameters), dense(z, *parameters)
    assert ours.batch_shape == reference.batch_shape
    assert ours.event_shape == (D,)
    expected = reference.log_prob(value)
    assert ours.log_prob(value).shape == expected.shape
    assert torch.allclose(ours.log_prob(value), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_one_feature_is_the_normal():
    index, loc, scale = torch.randint(C, (N,)), torch.randn(C, 1), torch.rand(C, 1) + 0.1
    x = torch.randn(N, 1)
    expected = dist.Normal(loc[index, 0], scale[index, 0]).log_prob(x[:, 0])
    for tril in (None, torch.randn(C, 1, 1)):
        found = IndexedNormal(index, loc, scale, tril).log_prob(x)
        assert torch.allclose(found, expected, rtol=1e-13)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("table", TABLES)
def test_table_of_densities_has_a_column_per_gaussian(table):
    parameters = make_table(table)
    x = torch.randn(N, D)
    columns = IndexedNormal(torch.tensor(0), *parameters).log_prob_table(x)
    for c in range(C):
        expected = dense(torch.tensor(c), *parameters).log_prob(x)
        assert torch.allclose(columns[:, c], expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("table", TABLES)
def test_expand(table):
    z = INDICES["enumerated"]()
    parameters = make_table(table)
    x = torch.randn(N, D)
    expanded = IndexedNormal(z, *parameters).expand([C, K, N])  # a list, as Pyro's plates do
    assert isinstance(expanded, IndexedNormal)
    assert expanded.batch_shape == (C, K, N)
    assert torch.equal(
        expanded.log_prob(x), IndexedNormal(z, *parameters).log_prob(x).expand(C, K, N)
    )
    assert expanded.sample((7,)).shape == (7, C, K, N, D)
    assert expanded.expand([6, C, K, N]).batch_shape == (6, C, K, N)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("table", "batch"), BATCHED_TABLES)
def test_draws_have_their_mean_and_covariance(table, batch):
    z = torch.tensor([2, 0])
    parameters = make_table(table, batch)
    reference = dense(z, *parameters)
    n = 20_000
    draws = IndexedNormal(z, *parameters).sample((n,))
    assert draws.shape == (n, *reference.batch_shape, D)
    covariance = reference.covariance_matrix
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    error = (draws.mean(0) - reference.mean) / (variance / n).sqrt()
    assert error.abs().max() < 5
    centred = draws - reference.mean
    found = torch.einsum("n...i,n...j->...ij", centred, centred) / n
    # Var(x_i x_j) of normals: S_ii S_jj + S_ij^2
    spread = variance.unsqueeze(-1) * variance.unsqueeze(-2) + covariance.square()
    assert ((found - covariance) / (spread / n).sqrt()).abs().max() < 5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("table", TABLES)
def test_draws_are_differentiable(table):
    """The gradient is that of loc + L noise, written out."""
    z = torch.tensor([1, 2, 2, 0])
    parameters = [p if p is None else p.requires_grad_() for p in make_table(table)]
    leaves = [p for p in parameters if p is not None]
    weight = torch.randn(len(z), D)
    torch.manual_seed(1)
    draws = IndexedNormal(z, *parameters).rsample()
    torch.manual_seed(1)
    noise = torch.randn(len(z), D)
    factor = scale_trils(*parameters)[z]
    expected = parameters[0][z] + (factor @ noise.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(draws, expected)
    found_grads = torch.autograd.grad((weight * draws.tanh()).sum(), leaves)
    grads = torch.autograd.grad((weight * expected.tanh()).sum(), leaves)
    for found, grad in zip(found_grads, grads, strict=True):
        assert grad.abs().sum() > 0
        assert torch.allclose(found, grad)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch", ["none", "all"])
@pytest.mark.parametrize("table", TABLES)
def test_gradient_of_log_prob(table, batch):
    z = INDICES["enumerated"]()
    leaves = [p for p in (*make_table(table, batch), torch.randn(N, D)) if p is not None]
    leaves = [p.requires_grad_() for p in leaves]
    assert torch.autograd.gradcheck(
        lambda *p: IndexedNormal(z, *p[:-1]).log_prob(p[-1]), leaves, fast_mode=True
    )


def test_upper_part_of_tril_is_ignored():
    loc, scale, tril = make_table("full")
    tril.requires_grad_()
    x, z = torch.randn(N, D), torch.randint(C, (N,))
    log_prob = IndexedNormal(z, loc, scale, tril).log_prob(x)
    assert torch.equal(log_prob, IndexedNormal(z, loc, scale, tril.tril(-1)).log_prob(x))
    log_prob.sum().backward()
    assert (tril.grad.triu() == 0).all()
    assert (tril.grad.tril(-1) != 0).any()


def relative_error(index, parameters, x):
    """Of float32, against float64 at the same numbers."""
    exact = [p if p is None else p.double() for p in parameters]
    expected = dense(index, *exact).log_prob(x.double())
    found = IndexedNormal(index, *parameters).log_prob(x)
    assert found.dtype == torch.float32
    return ((found - expected) / expected).abs().max()


@pytest.mark.parametrize("table", ["full", "tied", "diagonal", "spherical"])
def test_float32_far_from_the_origin(table):
    """A shift of 1e6 costs nothing: data and means are subtracted before anything is squared."""
    loc, scale, tril = make_table(table)
    loc = loc + 1e6
    x = loc[0] + torch.randint(-8, 9, (N, D))
    z = INDICES["enumerated"]()
    assert relative_error(z, (loc, scale, tril), x) < 1e-5


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("table", ["full", "tied", "diagonal", "spherical"])
def test_float32_at_extreme_scales(table, size):
    """A determinant of scales, 1e-96 here, would be 0 in float32."""
    loc, scale, tril = make_table(table)
    x = size * torch.randn(N, D)
    assert relative_error(INDICES["enumerated"](), (size * loc, size * scale, tril), x) < 1e-5


def test_float32_with_features_of_very_different_scales():
    loc, scale, tril = make_table("full")
    units = torch.tensor([1e-10, 1e-3, 1e3, 1e10])
    # scale is relative to the features before, so L = diag(units) L' is the same story in new units
    parameters = (loc * units, scale * units, tril)
    assert relative_error(INDICES["enumerated"](), parameters, torch.randn(N, D) * units) < 1e-4


def test_a_density_integrates_to_one():
    """On a grid, for a skewed Gaussian: the sign of the log-determinant and its size."""
    tril = torch.tensor([[[0.0, 0.0], [1.5, 0.0]]])
    normal = IndexedNormal(torch.tensor(0), torch.zeros(1, 2), torch.tensor([[0.3, 0.6]]), tril)
    axis = torch.linspace(-5, 5, 401)
    grid = torch.cartesian_prod(axis, axis)
    total = normal.log_prob(grid).logsumexp(0) + 2 * math.log(axis[1] - axis[0])
    assert total.abs() < 1e-4


@pytest.mark.parametrize("table", TABLES)
def test_lives_where_its_parameters_do(table, device):
    parameters = [p if p is None else p.to(device) for p in make_table(table)]
    normal = IndexedNormal(torch.randint(C, (N,), device=device), *parameters)
    draws = normal.rsample((6,))
    log_prob = normal.log_prob(draws)
    assert draws.device.type == log_prob.device.type == device
    assert log_prob.shape == (6, N)
    assert log_prob.isfinite().all()


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(N, D + 1), "event_shape"),
        (torch.full((N, D), math.nan), "support"),
    ],
)
def test_what_validation_refuses(x, match):
    normal = IndexedNormal(torch.zeros(N, dtype=torch.long), *make_table("full"))
    with pytest.raises(ValueError, match=match):
        normal.log_prob(x)
