"""Densities of many Gaussians by matrix products: against triangular solves, and in chunks."""

import pyro.distributions as dist
import pytest
import torch

from pyro_lvm.distributions import IndexedNormal, whitening

C, D, N = 4, 5, 23
KINDS = ["full", "tied", "diagonal", "spherical"]


def table(kind, batch=()):
    """Means, conditional deviations and factors that no symmetry hides."""
    shared = 1 if kind == "tied" else C
    loc = torch.randn(*batch, C, D)
    scale = 0.5 + torch.rand(*batch, shared, 1 if kind == "spherical" else D)
    tril = torch.randn(*batch, shared, D, D).tril(-1) if kind in ("full", "tied") else None
    return [loc, scale] if tril is None else [loc, scale, tril]


def densities(x, loc, scale, tril=None):
    return IndexedNormal(torch.tensor(0), loc, scale, tril).log_prob_table(x)


def by_solves(x, loc, scale, tril=None):
    """As torch's MultivariateNormal has them, one triangular solve for each component."""
    unit = torch.eye(D).to(loc) if tril is None else torch.eye(D).to(loc) + tril
    factor = (scale.unsqueeze(-1) * unit).expand(*loc.shape, D)
    return dist.MultivariateNormal(loc, scale_tril=factor).log_prob(x.unsqueeze(-2))


@pytest.fixture
def small_chunks(monkeypatch):
    """Three columns at a time: the last chunk is not full."""
    monkeypatch.setattr(whitening, "_AT_ONCE", {"cpu": 3 * C * D})


@pytest.mark.usefixtures("float64", "small_chunks")
@pytest.mark.parametrize("batch", [(), (2, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind, batch):
    leaves = [p.requires_grad_() for p in (torch.randn(N, D), *table(kind, batch))]
    weight = torch.randn(*batch[:1], N, C)
    found = densities(*leaves)
    assert "InChunks" in names_of_nodes(found)
    assert torch.allclose(found, by_solves(*leaves), rtol=1e-12)
    found_grads = torch.autograd.grad((weight * found).sum(), leaves)
    expected_grads = torch.autograd.grad((weight * by_solves(*leaves)).sum(), leaves)
    for grad, expected in zip(found_grads, expected_grads, strict=True):
        assert expected.abs().sum() > 0
        assert torch.allclose(grad, expected.tril(-1) if grad.shape[-2:] == (D, D) else expected)


def names_of_nodes(tensor):
    """Of all functions behind a tensor."""
    names, nodes = "", [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        names += type(node).__name__
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    return names


@pytest.mark.usefixtures("float64", "small_chunks")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_chunks(kind):
    """Of every argument, the first and the second."""
    leaves = [p.requires_grad_() for p in (torch.randn(7, D), *table(kind))]
    assert torch.autograd.gradcheck(densities, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(densities, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_on_each_device(kind, device, monkeypatch):
    monkeypatch.setattr(whitening, "_AT_ONCE", {device: 3 * C * D})
    x, *parameters = (p.to(device) for p in (torch.randn(N, D), *table(kind)))
    parameters = [p.requires_grad_() for p in parameters]
    found = densities(x, *parameters)
    assert "InChunks" in names_of_nodes(found)
    assert torch.allclose(found, by_solves(x, *parameters), rtol=1e-4)
    found.sum().backward()
    assert all(p.grad.device.type == device for p in parameters)


@pytest.mark.usefixtures("float64", "small_chunks")
def test_transforms_of_torch_func():
    x, *parameters = torch.randn(N, D), *table("full")
    found = torch.func.grad(lambda loc: densities(x, loc, *parameters[1:]).sum())(parameters[0])
    loc = parameters[0].requires_grad_()
    densities(x, loc, *parameters[1:]).sum().backward()
    assert torch.allclose(found, loc.grad)


def expanded(x, loc, scale, tril):
    """The square multiplied out, x'Px - 2 x'P loc + loc'P loc: what must not be done."""
    factor = scale.unsqueeze(-1) * (torch.eye(D).to(loc) + tril)
    precision = torch.linalg.inv(factor @ factor.mT)
    linear = (precision @ loc.unsqueeze(-1)).squeeze(-1)
    square = torch.einsum("nd,cde,ne->nc", x, precision, x)
    square = square - 2 * x @ linear.T + (linear * loc).sum(-1)
    return -0.5 * square - whitening.log_normaliser(scale, D)


def worst(function, x, *parameters):
    """The greatest error of float32, in nats, against float64 at the same numbers."""
    exact = by_solves(*(p.double() for p in (x, *parameters)))
    near = exact > -100.0  # what is farther away than that weighs nothing
    assert near.sum() >= len(x)
    return float((function(x, *parameters) - exact)[near].abs().max())


@pytest.mark.parametrize("distance", [0.1, 10.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_far_from_the_origin(kind, distance):
    """An offset of 1e4, components close together and far apart."""
    loc, *factor = table(kind)
    loc = 1e4 + distance * loc
    x = IndexedNormal(torch.randint(C, (200,)), loc, *factor).sample()
    # Whitened data carry the rounding of their distance from the middle; 3e-4 nats is a weight's
    # error of 0.03%, at 100 standard deviations.
    assert worst(densities, x, loc, *factor) < max(5e-5, 3e-6 * distance)
    if kind == "full":
        assert worst(expanded, x, loc, *factor) > 10.0


def test_one_component_far_away_costs_the_others_nothing():
    loc, *factor = table("full")
    x = IndexedNormal(torch.randint(1, C, (200,)), loc, *factor).sample()
    loc[0] = 1e7
    assert worst(densities, x, loc, *factor) < 1e-4


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_float32_with_ill_conditioned_covariances(condition):
    """An inverse factor is as accurate as a triangular solve, up to a small number."""
    rotation = torch.linalg.qr(torch.randn(C, D, D, dtype=torch.float64)).Q
    spread = torch.logspace(0, -0.5, D, base=condition, dtype=torch.float64)  # of deviations
    factor = torch.linalg.cholesky(rotation @ torch.diag(spread.square()) @ rotation.mT)
    loc = torch.randn(C, D, dtype=torch.float64)
    x = loc[0] + torch.randn(500, D, dtype=torch.float64) @ factor[0].mT
    scale = factor.diagonal(dim1=-2, dim2=-1)
    tril = (factor / scale.unsqueeze(-1)).tril(-1)
    x, *parameters = (p.float() for p in (x, loc, scale, tril))
    ours, solves = worst(densities, x, *parameters), worst(by_solves, x, *parameters)
    assert ours < 5 * solves
    assert ours < 1e-3


def test_a_datum_without_batch():
    loc, *factor = table("full")
    x = torch.randn(D)
    one = IndexedNormal(torch.tensor(2), loc, *factor)
    assert one.log_prob(x).shape == ()
    assert torch.allclose(one.log_prob(x), by_solves(x, loc, *factor)[2], rtol=1e-5)
