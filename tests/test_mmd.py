"""The maximum mean discrepancy: definitions, closed forms, memory, and defects seen elsewhere."""

import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from test_divergences import draws, each_kernel, exponential
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_lvm.divergences import IMQ, MMD, RBF, kernel_mean

imq_or_rbf = pytest.mark.parametrize("make", [IMQ, RBF], ids=["imq", "rbf"])


# --- the definitions


def mmd_by_loops(kernel, x, y, estimator):
    """The definition, pair by pair."""

    def mean(a, b, skip):
        pairs = itertools.product(range(len(a)), range(len(b)))
        pairs = [(i, j) for i, j in pairs if not (skip and i == j)]
        values = [kernel((a[i] - b[j]).square().sum(), a.shape[1]).item() for i, j in pairs]
        return sum(values) / len(values)

    unbiased = estimator == "u"
    paired = unbiased and len(x) == len(y)
    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, paired)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", ["u", "v"])
@pytest.mark.parametrize("sizes", [(5, 7), (6, 6)])
@each_kernel
def test_mmd_is_the_double_loop(make, estimator, sizes):
    q, p = draws(*sizes, dim=4)
    expected = mmd_by_loops(make(), q, p, estimator)
    actual = MMD(make(), estimator=estimator)(q, p).item()
    assert actual == pytest.approx(expected, rel=1e-10)


@pytest.mark.usefixtures("float64")
def test_mmd_u_of_pairs_is_that_of_gretton_lemma_6():
    q, p = draws(5, 5)

    def k(a, b):
        return RBF((0.7,))((a - b).square().sum(), 3).item()

    total = 0.0
    for i, j in itertools.permutations(range(5), 2):
        total += k(q[i], q[j]) + k(p[i], p[j]) - k(q[i], p[j]) - k(q[j], p[i])
    assert MMD(RBF((0.7,)))(q, p).item() == pytest.approx(total / 20, rel=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [(5, 5), (4, 6)])
def test_mmd_linear_is_the_sum_over_neighbours_on_a_ring(sizes):
    q, p = draws(*sizes)

    def mean(a, b, size):
        pairs = [(a[i], b[(i + 1) % size]) for i in range(size)]
        return sum(RBF()((u - v).square().sum(), 3) for u, v in pairs) / size

    shared = min(sizes)
    expected = mean(q, q, sizes[0]) + mean(p, p, sizes[1]) - mean(q, p, shared) - mean(p, q, shared)
    torch.testing.assert_close(MMD(RBF(), estimator="linear")(q, p), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("median", [False, True])
def test_mmd_linear_has_the_u_statistic_as_its_mean_over_orders_of_pairs(median):
    q, p = draws(5, 5)
    linear = MMD(estimator="linear", median_heuristic=median)
    orders = [list(order) for order in itertools.permutations(range(5))]
    values = [linear(q[order], p[order]) for order in orders]
    torch.testing.assert_close(sum(values) / len(values), MMD(median_heuristic=median)(q, p))
    assert torch.stack(values).std() > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [(3, 4), (4, 2)])
def test_mmd_linear_has_the_u_statistic_as_its_mean_over_orders_of_both_samples(sizes):
    q, p = draws(*sizes)
    orders = itertools.product(*(itertools.permutations(range(n)) for n in sizes))
    values = [MMD(estimator="linear")(q[list(i)], p[list(j)]) for i, j in orders]
    torch.testing.assert_close(sum(values) / len(values), MMD()(q, p))


# --- closed forms


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
    return mean_and_error(torch.stack([mmd(*pair) for pair in zip(q, p, strict=True)]))


def mean_and_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", ["u", "linear"])
@pytest.mark.parametrize(("num_q", "num_p"), [(2, 2), (8, 20), (40, 30), (16, 16)])
def test_mmd_u_and_linear_have_the_closed_form_as_their_mean(estimator, num_q, num_p):
    mean, error = repeated(estimator, num_q, num_p)
    assert abs(mean - (E_QQ + E_PP - 2 * E_QP)) < 5 * error


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("num_q", "num_p"), [(1, 1), (8, 20), (40, 30)])
def test_mmd_v_has_the_documented_bias(num_q, num_p):
    mean, error = repeated("v", num_q, num_p)
    bias = (1 - E_QQ) / num_q + (1 - E_PP) / num_p
    assert abs(mean - bias - (E_QQ + E_PP - 2 * E_QP)) < 5 * error


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("median", [False, True])
@pytest.mark.parametrize("estimator", ["u", "linear"])
@pytest.mark.parametrize("sizes", [(10, 10), (6, 12)])
@imq_or_rbf
def test_mmd_is_zero_on_average_for_equal_distributions(make, sizes, estimator, median):
    mmd = MMD(make(), estimator=estimator, median_heuristic=median)
    values = torch.stack(
        [mmd(torch.randn(sizes[0], 3), torch.randn(sizes[1], 3)) for _ in range(400)]
    )
    mean, error = mean_and_error(values)
    assert abs(mean) < 5 * error
    assert values.min() < 0


@pytest.mark.usefixtures("float64")
@imq_or_rbf
def test_mmd_v_is_never_negative(make):
    mmd = MMD(make(), estimator="v")
    values = torch.stack([mmd(*torch.randn(2, 10, 3)) for _ in range(100)])
    assert values.min() > 0
    same = torch.randn(10, 3)
    assert mmd(same, same).item() == pytest.approx(0.0, abs=1e-12)


# --- pairs under one condition


def conditional_pairs(repeats=600, size=8):
    """x_i and y_i from one N(c_i, 0.1^2), c_i ~ N(0, 1): over all conditions q = p."""
    conditions = torch.randn(repeats, size, 1)
    return (conditions + 0.1 * torch.randn_like(conditions) for _ in range(2))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("median", [False, True])
@pytest.mark.parametrize("estimator", ["u", "linear"])
def test_mmd_of_pairs_that_share_a_condition_is_unbiased(estimator, median):
    mmd = MMD(RBF((H,)), estimator=estimator, median_heuristic=median)
    pairs = zip(*conditional_pairs(), strict=True)
    mean, error = mean_and_error(torch.stack([mmd(x, y) for x, y in pairs]))
    assert abs(mean) < 5 * error


@pytest.mark.usefixtures("float64")
def test_mmd_of_pairs_that_share_a_condition_would_be_biased_with_their_own_pairs():
    mmd, values = MMD(RBF((H,))), []
    for x, y in zip(*conditional_pairs(), strict=True):
        own, size = RBF((H,))((x - y).square().sum(-1), 1).mean(), len(x)
        apart = (mmd.kernel((x - y.T).square(), 1).sum() - size * own) / (size * (size - 1))
        values.append(mmd(x, y) - 2 * (own - apart) / size)  # the cross mean with its diagonal
    mean, error = mean_and_error(torch.stack(values))
    assert mean < -20 * error


# --- the median heuristic


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("estimator", ["u", "v", "linear"])
def test_mmd_median_is_the_unit_of_distances(estimator):
    q, p = draws(7, 6)
    median = torch.pdist(torch.cat([q, p])).square().median()

    def kernel(squared_distance, dim):
        return IMQ()(squared_distance * 2 * dim / median, dim)

    expected = MMD(kernel, estimator=estimator)(q, p)
    mmd = MMD(estimator=estimator, median_heuristic=True)
    torch.testing.assert_close(mmd(q, p), expected)
    torch.testing.assert_close(mmd(1000 * q, 1000 * p), expected)


@pytest.mark.usefixtures("float64")
def test_mmd_median_of_large_samples_is_that_of_evenly_spaced_rows():
    q, p = draws(768, 512, dim=2)
    median = torch.pdist(torch.cat([q[::3], p[::2]])).square().median()
    expected = MMD(lambda d, dim: IMQ()(d * 2 * dim / median, dim))(q, p)
    torch.testing.assert_close(MMD(median_heuristic=True)(q, p), expected)


@pytest.mark.parametrize("place", [0.0, 1e-30, 0.1, 1e4])
@pytest.mark.parametrize("estimator", ["u", "v", "linear"])
def test_mmd_median_is_safe_where_points_coincide(estimator, place, device):
    q, p = (torch.full((n, 3), place, device=device).requires_grad_() for n in (6, 5))
    value = MMD(estimator=estimator, median_heuristic=True)(q, p)
    value.backward()
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0.0, atol=1e-5)
    assert q.grad.abs().max() < 1e-3
    assert p.grad.abs().max() < 1e-3


# --- large samples


class Learned(nn.Module):
    """A kernel with a width to learn, and one that is fixed."""

    def __init__(self):
        super().__init__()
        self.log_width = nn.Parameter(torch.tensor(0.3))
        self.fixed = nn.Parameter(torch.tensor(0.1), requires_grad=False)
        self.unused = nn.Parameter(torch.tensor(1.0))

    def forward(self, squared_distance, dim):
        return torch.exp(-squared_distance / dim * self.log_width.exp()) + self.fixed


def in_blocks(monkeypatch, rows=7):
    monkeypatch.setattr(kernel_mean, "LARGEST_GRAM", 0)
    monkeypatch.setattr(kernel_mean, "BLOCK_ROWS", {})
    monkeypatch.setattr(kernel_mean, "OTHER_BLOCK_ROWS", rows)


def value_and_gradient(mmd, q, p):
    leaves = [x for x in (q, p, *mmd.parameters()) if x.requires_grad]
    value = mmd(q, p)
    return [value, *torch.autograd.grad(value, leaves, materialize_grads=True)]


BLOCKWISE = {
    "u": lambda: MMD(IMQ((0.5, 2.0))),
    "v": lambda: MMD(estimator="v"),
    "median": lambda: MMD(RBF(), median_heuristic=True),
    "function": lambda: MMD(exponential),
    "module": lambda: MMD(Learned()),
}
each_blockwise = pytest.mark.parametrize("make", BLOCKWISE.values(), ids=BLOCKWISE.keys())


@each_blockwise
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [(20, 30), (21, 21), (3, 3), (2, 15)])
@pytest.mark.parametrize("learned", ["qp", "q", "p", ""])
def test_mmd_in_blocks_is_that_of_the_whole(make, sizes, learned, device, monkeypatch):
    mmd, (q, p) = make().to(device), draws(*sizes, device=device)
    q.requires_grad_("q" in learned)
    p.requires_grad_("p" in learned)
    if not learned:
        mmd.requires_grad_(False)
    expected = value_and_gradient(mmd, q, p) if learned else mmd(q, p)
    in_blocks(monkeypatch)
    actual = value_and_gradient(mmd, q, p) if learned else mmd(q, p)
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        assert not mmd(q, p).requires_grad
        torch.testing.assert_close(mmd(q, p), mmd(q, p))


@pytest.mark.usefixtures("float64")
def test_mmd_in_blocks_of_one_sample_with_itself(monkeypatch):
    q = torch.randn(20, 3, requires_grad=True)
    mmd = MMD(estimator="v")
    in_blocks(monkeypatch)
    torch.testing.assert_close(
        value_and_gradient(mmd, q, q * 1.0)[1:2], [torch.zeros_like(q)], rtol=0.0, atol=1e-12
    )


@pytest.mark.usefixtures("float64")
def test_mmd_in_blocks_reaches_a_kernel_alone(monkeypatch):
    mmd, (q, p) = MMD(Learned()), draws(20, 30)
    expected = value_and_gradient(mmd, q, p)
    in_blocks(monkeypatch)
    torch.testing.assert_close(value_and_gradient(mmd, q, p), expected)
    assert expected[1] != 0


@pytest.mark.usefixtures("float64")
def test_mmd_in_blocks_loses_no_gradient_of_a_function_with_tensors(monkeypatch):
    width, (q, p) = torch.tensor(1.3, requires_grad=True), draws(20, 30)
    mmd, leaves = MMD(lambda d, dim: torch.exp(-d / dim / width)), [q.requires_grad_(), width]
    expected = torch.autograd.grad(mmd(q, p), leaves)
    in_blocks(monkeypatch)
    torch.testing.assert_close(torch.autograd.grad(mmd(q, p), leaves), expected)


@each_blockwise
@pytest.mark.usefixtures("float64")
def test_mmd_in_blocks_can_be_traced(make, monkeypatch):
    in_blocks(monkeypatch, rows=12)
    mmd, sizes = make(), (13, 13) if make is BLOCKWISE["u"] else (14, 10)

    def samples():
        return [x.requires_grad_() for x in draws(*sizes)]

    graph = make_fx(mmd)(*samples())
    q, p = samples()
    leaves = [q, p, *(x for x in mmd.parameters() if x.requires_grad)]
    value = graph(q, p)
    actual = [value, *torch.autograd.grad(value, leaves, materialize_grads=True)]
    torch.testing.assert_close(actual, value_and_gradient(mmd, q, p))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that was made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.size = max(self.size, *sizes, 0)
        return result


@pytest.mark.parametrize(
    ("make", "bound"),
    [
        (MMD, kernel_mean.LARGEST_GRAM),
        (lambda: MMD(estimator="linear"), 6000 * 4),
        (lambda: MMD(median_heuristic=True), kernel_mean.LARGEST_GRAM),
    ],
    ids=["u", "linear", "median"],
)
def test_mmd_never_holds_a_large_gram_matrix(make, bound):
    q, p = (x.requires_grad_() for x in draws(3000, 3000, dim=4))
    with Largest() as largest:
        make()(q, p).backward()
    assert largest.size <= bound


PEAK = """
import resource, torch
from pyro_lvm.divergences import MMD
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
torch.set_num_threads(1)
MMD()(torch.randn(4, 16, requires_grad=True), torch.randn(4, 16)).backward()
q, p = (torch.randn(40_000, 16).requires_grad_() for _ in range(2))
before = peak()
MMD()(q, p).backward()
assert q.grad.abs().sum() > 0 and p.grad.abs().sum() > 0
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no module resource")
def test_mmd_of_large_samples_needs_little_memory():
    """A Gram matrix of 40,000 draws has 6.4 GB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400 * 1024  # 400 MiB


# --- what has gone wrong elsewhere


@pytest.mark.usefixtures("float64")
def test_pytorch_vae_rbf_does_not_divide_twice_by_batch_size():
    """PyTorch-VAE divides a mean by B (B - 1) again, so that its weight fades with the batch."""
    small, small_error = repeated("u", 8, 8)
    large, large_error = repeated("u", 64, 64)
    assert abs(small - large) < 5 * math.hypot(small_error, large_error)
    assert large > 0.1


@pytest.mark.usefixtures("float64")
@each_kernel
def test_pixyz_mmd_normalises_by_batch_size_not_feature_dimension(make):
    """Pixyz divides by the feature dimension; features written twice must change nothing."""
    mmd, (q, p) = MMD(make()), draws(6, 9)
    torch.testing.assert_close(mmd(torch.cat([q, q], 1), torch.cat([p, p], 1)), mmd(q, p))
    torch.testing.assert_close(
        MMD(make(), estimator="v")(torch.cat([q, q]), torch.cat([p, p])),
        MMD(make(), estimator="v")(q, p),
    )


@pytest.mark.usefixtures("float64")
def test_pyro_trace_mmd_biased_v_statistic_is_not_the_default():
    """Pyro's Trace_MMD is biased upwards, by most where there are few draws."""
    u, u_error = repeated("u", 4, 4, same=True)
    v, v_error = repeated("v", 4, 4, same=True)
    assert MMD().estimator == "u"
    assert abs(u) < 5 * u_error
    assert abs(v - (1 - E_PP) / 2) < 5 * v_error
    assert v > 5 * v_error


def test_pyro_trace_mmd_settings_cannot_land_in_the_wrong_slot():
    """An argument of Trace_MMD's that was passed by position became another."""
    with pytest.raises(TypeError, match="positional"):
        MMD(IMQ(), "v")


# --- every error

two = torch.zeros(2, 3)
ERRORS = {
    "kernel_word": (lambda: MMD("rbf"), TypeError, "got 'rbf'. Try lvm.divergences.IMQ()"),
    "estimator": (lambda: MMD(estimator="w"), ValueError, "'u', 'v' or 'linear'; got 'w'"),
    "one_datum": (
        lambda: MMD()(two[:1], two),
        ValueError,
        "q_samples with at least 2 row(s) for estimator='u'; got 1. Use a larger batch",
    ),
    "one_prior_draw": (lambda: MMD()(two, two[:1]), ValueError, "p_samples with at least 2 row(s)"),
    "one_on_a_ring": (
        lambda: MMD(estimator="linear")(two, two[:1]),
        ValueError,
        "p_samples with at least 2 row(s) for estimator='linear'; got 1",
    ),
    "no_datum": (lambda: MMD(estimator="v")(two[:0], two), ValueError, "at least 1 row(s)"),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, error, match):
    with pytest.raises(error, match=re.escape(match)):
        call()


def test_mmd_v_takes_one_row():
    assert torch.isfinite(MMD(estimator="v")(two[:1], two))


def test_mmd_repr_names_the_settings():
    assert repr(MMD(RBF((1.0,)))) == "MMD(kernel=RBF(bandwidths=(1.0,)), estimator='u')"
    assert "median_heuristic=True" in repr(MMD(median_heuristic=True))
    assert "Learned()" in repr(MMD(Learned()))
