"""Kernels and divergences: contracts, closed forms, and the defects that ours must not have."""

import copy
import itertools
import math
import pickle
import re

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_lvm.divergences import IMQ, MMD, RBF
from pyro_lvm.divergences.kernels import squared_distances

KERNELS = {
    "imq": IMQ,
    "imq_single": lambda: IMQ(scales=(1.0,)),
    "rbf": RBF,
    "rbf_single": lambda: RBF(bandwidths=(0.7,)),
}
DIVERGENCES = {
    "mmd_imq_u": MMD,
    "mmd_imq_v": lambda: MMD(estimator="v"),
    "mmd_rbf_u": lambda: MMD(RBF()),
    "mmd_rbf_v": lambda: MMD(RBF(), estimator="v"),
    "mmd_function": lambda: MMD(lambda squared_distance, dim: torch.exp(-squared_distance / dim)),
}
each_kernel = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS.keys())
each_divergence = pytest.mark.parametrize("make", DIVERGENCES.values(), ids=DIVERGENCES.keys())


# --- kernels


@each_kernel
@pytest.mark.usefixtures("float64")
def test_kernel_counts_its_widths_at_home_symmetric_and_positive_definite(make):
    kernel, x = make(), torch.randn(40, 3)
    (widths,) = vars(kernel).values()
    num_widths = float(len(widths))
    gram = kernel(squared_distances(x, x), 3)
    torch.testing.assert_close(gram.diagonal(), torch.full((40,), num_widths), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(gram, gram.T)
    assert torch.linalg.eigvalsh(gram).min() >= -1e-10
    assert gram.min() > 0
    assert gram.max() <= num_widths


@each_kernel
def test_kernel_falls_with_the_distance(make):
    values = make()(torch.linspace(0, 20, 50), 2)
    assert (values.diff() < 0).all()


@pytest.mark.usefixtures("float64")
def test_imq_formula():
    expected = 12 * 0.5 / (12 * 0.5 + 7) + 12 * 3 / (12 * 3 + 7)  # C = 2 * dim * scale
    assert IMQ(scales=(0.5, 3.0))(torch.tensor(7.0), 6).item() == pytest.approx(expected)


@pytest.mark.usefixtures("float64")
def test_rbf_formula():
    expected = math.exp(-7 / (12 * 0.25)) + math.exp(-7 / (12 * 9))
    assert RBF(bandwidths=(0.5, 3.0))(torch.tensor(7.0), 6).item() == pytest.approx(expected)


@each_kernel
@pytest.mark.parametrize("dim", [1, 2, 16, 512])
def test_kernel_width_fits_a_standard_normal_in_every_dimension(make, dim):
    kernel, x = make(), torch.randn(200, dim)
    typical = kernel(squared_distances(x[:100], x[100:]), dim).mean().item()
    assert 0.1 < typical / kernel(torch.zeros(()), dim).item() < 0.9


@each_kernel
def test_kernel_is_a_value(make):
    kernel = make()
    assert kernel == make()
    assert hash(kernel) == hash(make())
    assert pickle.loads(pickle.dumps(kernel)) == kernel
    assert eval(repr(kernel)) == kernel
    with pytest.raises(AttributeError):
        kernel.scales = kernel.bandwidths = (1.0,)


def test_kernel_takes_any_sequence_of_widths():
    assert hash(RBF(bandwidths=[1, 2])) == hash(RBF(bandwidths=(1.0, 2.0)))
    assert IMQ(scales=torch.tensor([0.5, 1.0])) == IMQ(scales=(0.5, 1.0))


# --- squared distances


@pytest.mark.usefixtures("float64")
def test_squared_distances():
    x, y = torch.randn(7, 3), 5 + torch.randn(4, 3)
    expected = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    torch.testing.assert_close(squared_distances(x, y), expected)


def test_squared_distances_far_from_the_origin_in_float32(device):
    # multiples of 1/8, which float32 holds exactly at 1e4
    x, y = (torch.randint(-16, 16, (n, 5), device=device) / 8 + 1e4 for n in (30, 40))
    exact = (x.double()[:, None] - y.double()).square().sum(-1)
    torch.testing.assert_close(squared_distances(x, y).double(), exact, rtol=1e-4, atol=1e-4)


def test_squared_distances_where_points_coincide():
    x = torch.randn(50, 8).requires_grad_()
    distances = squared_distances(x, x.detach())
    assert (distances >= 0).all()
    distances.diagonal().sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x), rtol=0.0, atol=1e-5)


@pytest.mark.usefixtures("float64")
def test_squared_distances_gradient():
    x, y = (torch.randn(n, 2, requires_grad=True) for n in (4, 3))
    assert torch.autograd.gradcheck(squared_distances, (x, y))


# --- the contract of divergences


def draws(*sizes, dim=3, shift=0.5, **kwargs):
    """Samples of q and p, from different normals."""
    first, second = sizes
    return shift + 1.3 * torch.randn(first, dim, **kwargs), torch.randn(second, dim, **kwargs)


@each_divergence
def test_divergence_is_a_scalar_with_gradients_to_both(make, device):
    q, p = (x.requires_grad_() for x in draws(6, 9, device=device))
    value = make().to(device)(q, p)
    assert value.shape == ()
    assert value.device.type == device
    value.backward()
    for x in (q, p):
        assert torch.isfinite(x.grad).all()
        assert (x.grad != 0).all()


@each_divergence
@pytest.mark.usefixtures("float64")
def test_divergence_gradient(make):
    q, p = (x.requires_grad_() for x in draws(4, 5, dim=2))
    assert torch.autograd.gradcheck(make(), (q, p))


@each_divergence
@pytest.mark.usefixtures("float64")
def test_divergence_does_not_depend_on_the_order_of_either_sample(make):
    divergence, (q, p) = make(), draws(20, 30)
    permuted = divergence(q[torch.randperm(20)], p[torch.randperm(30)])
    torch.testing.assert_close(permuted, divergence(q, p))


@each_divergence
@pytest.mark.usefixtures("float64")
def test_divergence_does_not_depend_on_a_common_shift(make):
    divergence, (q, p) = make(), draws(20, 30)
    torch.testing.assert_close(divergence(q + 100, p + 100), divergence(q, p))


@each_divergence
def test_divergence_leaves_its_arguments_alone(make):
    q, p = draws(6, 9)
    q_before, p_before = q.clone(), p.clone()
    make()(q, p)
    assert torch.equal(q, q_before)
    assert torch.equal(p, p_before)


@each_divergence
def test_divergence_grows_with_the_mean_shift(make):
    divergence = make()
    values = [divergence(*draws(300, 300, shift=shift)).item() for shift in (0.0, 1.0, 2.0, 4.0)]
    assert values == sorted(values)


@each_divergence
def test_divergence_can_be_traced(make):
    divergence = make()
    graph = make_fx(divergence)(*draws(6, 9))
    other = draws(6, 9)
    torch.testing.assert_close(graph(*other), divergence(*other))


@each_divergence
def test_divergence_can_be_copied(make):
    divergence, (q, p) = make(), draws(6, 9)
    torch.testing.assert_close(copy.deepcopy(divergence)(q, p), divergence(q, p))


# --- MMD


def mmd_by_loops(kernel, x, y, estimator):
    """The definition, pair by pair."""

    def k(a, b):
        return kernel((a - b).square().sum(), len(a)).item()

    def within(z):
        pairs = itertools.product(range(len(z)), repeat=2)
        pairs = [(i, j) for i, j in pairs if estimator == "v" or i != j]
        return sum(k(z[i], z[j]) for i, j in pairs) / len(pairs)

    between = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    return within(x) + within(y) - 2 * between


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", ["u", "v"])
@each_kernel
def test_mmd_is_the_double_loop(make, estimator):
    q, p = draws(5, 7, dim=4)
    expected = mmd_by_loops(make(), q, p, estimator)
    actual = MMD(make(), estimator=estimator)(q, p).item()
    assert actual == pytest.approx(expected, rel=1e-10)


def rbf_mean(shift, variance, h):
    """E exp(-t^2 / (2 h^2)) for t ~ N(shift, variance): a Gaussian integral."""
    total = h**2 + variance
    return h / math.sqrt(total) * math.exp(-(shift**2) / (2 * total))


# q = N(1, 0.5^2), p = N(0, 1), kernel of bandwidth 0.7 in one dimension
H, SHIFT, Q_SCALE = 0.7, 1.0, 0.5
E_QQ = rbf_mean(0.0, 2 * Q_SCALE**2, H)
E_PP = rbf_mean(0.0, 2.0, H)
E_QP = rbf_mean(SHIFT, Q_SCALE**2 + 1, H)


def repeated(estimator, num_q, num_p, *, repeats=400, same=False):
    """Mean of independent estimates, and its standard error."""
    mmd = MMD(RBF(bandwidths=(H,)), estimator=estimator)
    q = torch.randn(repeats, num_q, 1)
    q = q if same else SHIFT + Q_SCALE * q
    p = torch.randn(repeats, num_p, 1)
    values = torch.stack([mmd(*pair) for pair in zip(q, p, strict=True)])
    return values.mean().item(), values.std().item() / math.sqrt(repeats)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("num_q", "num_p"), [(2, 2), (8, 20), (40, 30)])
def test_mmd_u_has_the_closed_form_as_its_mean(num_q, num_p):
    mean, error = repeated("u", num_q, num_p)
    assert abs(mean - (E_QQ + E_PP - 2 * E_QP)) < 5 * error


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("num_q", "num_p"), [(1, 1), (8, 20), (40, 30)])
def test_mmd_v_has_the_documented_bias(num_q, num_p):
    mean, error = repeated("v", num_q, num_p)
    bias = (1 - E_QQ) / num_q + (1 - E_PP) / num_p
    assert abs(mean - bias - (E_QQ + E_PP - 2 * E_QP)) < 5 * error


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [IMQ, RBF], ids=["imq", "rbf"])
def test_mmd_u_is_zero_on_average_for_equal_distributions(make):
    mmd = MMD(make())
    values = torch.stack([mmd(*torch.randn(2, 10, 3)) for _ in range(400)])
    assert abs(values.mean()) < 5 * values.std() / math.sqrt(400)
    assert values.min() < 0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [IMQ, RBF], ids=["imq", "rbf"])
def test_mmd_v_is_never_negative(make):
    mmd = MMD(make(), estimator="v")
    values = torch.stack([mmd(*torch.randn(2, 10, 3)) for _ in range(100)])
    assert values.min() > 0
    same = torch.randn(10, 3)
    assert mmd(same, same).item() == pytest.approx(0.0, abs=1e-12)


# --- what has gone wrong elsewhere


@pytest.mark.usefixtures("float64")
def test_mmd_is_not_divided_by_the_batch_size_twice():
    """PyTorch-VAE divides a mean by B (B - 1) again, so that its weight fades with the batch."""
    small, small_error = repeated("u", 8, 8)
    large, large_error = repeated("u", 64, 64)
    assert abs(small - large) < 5 * math.hypot(small_error, large_error)
    assert large > 0.1


@pytest.mark.usefixtures("float64")
@each_kernel
def test_mmd_is_not_normalised_by_the_number_of_features(make):
    """Pixyz divides by the feature dimension; features written twice must change nothing."""
    mmd, (q, p) = MMD(make()), draws(6, 9)
    torch.testing.assert_close(mmd(torch.cat([q, q], 1), torch.cat([p, p], 1)), mmd(q, p))


@pytest.mark.usefixtures("float64")
def test_mmd_is_no_v_statistic_unless_asked():
    """Pyro's Trace_MMD is biased upwards, by most where there are few draws."""
    u, u_error = repeated("u", 4, 4, same=True)
    v, v_error = repeated("v", 4, 4, same=True)
    assert MMD().estimator == "u"
    assert abs(u) < 5 * u_error
    assert abs(v - (1 - E_PP) / 2) < 5 * v_error
    assert v > 5 * v_error


@each_divergence
def test_following_the_negative_gradient_brings_q_to_p(make):
    """With a sign wrong (pythae's default weight is negative) the samples would flee."""
    divergence, shift = make(), torch.tensor([1.5, -1.0], requires_grad=True)
    q, p = torch.randn(2, 200, 2)
    optimizer = torch.optim.Adam([shift], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        divergence(q + shift, p).backward()
        optimizer.step()
    assert shift.detach().norm() < 0.4


# --- every error

two = torch.zeros(2, 3)
ERRORS = {
    "imq_empty": (lambda: IMQ(scales=()), ValueError, "Expected scales with at least one value"),
    "imq_zero": (lambda: IMQ(scales=(1.0, 0.0)), ValueError, "scales to be a positive number"),
    "rbf_empty": (lambda: RBF(bandwidths=()), ValueError, "bandwidths with at least one value"),
    "rbf_negative": (lambda: RBF(bandwidths=(-1.0,)), ValueError, "bandwidths to be a positive"),
    "rbf_nan": (lambda: RBF(bandwidths=(math.nan,)), ValueError, "bandwidths to be a positive"),
    "kernel_word": (lambda: MMD("rbf"), TypeError, "got 'rbf'. Try lvm.divergences.IMQ()"),
    "estimator": (lambda: MMD(estimator="w"), ValueError, "estimator to be 'u' or 'v'; got 'w'"),
    "one_datum": (
        lambda: MMD()(two[:1], two),
        ValueError,
        "q_samples with at least 2 row(s) for estimator='u'; got 1. Use a larger batch",
    ),
    "one_prior_draw": (lambda: MMD()(two, two[:1]), ValueError, "p_samples with at least 2 row(s)"),
    "no_datum": (lambda: MMD(estimator="v")(two[:0], two), ValueError, "at least 1 row(s)"),
    "widths": (lambda: MMD()(two, two[:, :2]), ValueError, "of one width D; got 3 and 2"),
    "rank_one": (lambda: MMD()(two[0], two), ValueError, "q_samples of shape B x D; got (3,)"),
    "rank_three": (lambda: MMD()(two, two[None]), ValueError, "p_samples of shape B x D; got (1,"),
    "no_features": (lambda: MMD()(two[:, :0], two[:, :0]), ValueError, "B x D; got (2, 0)"),
    "integers": (lambda: MMD()(two.long(), two), TypeError, "q_samples .* got torch.int64"),
    "list": (lambda: MMD()(two, [[0.0]]), TypeError, "p_samples .* got list"),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, error, match):
    pattern = match if ".*" in match else re.escape(match)
    with pytest.raises(error, match=pattern):
        call()


def test_mmd_repr_names_the_settings():
    assert repr(MMD(RBF((1.0,)))) == "MMD(kernel=RBF(bandwidths=(1.0,)), estimator='u')"
