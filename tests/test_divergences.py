"""Kernels, and the contract of divergences; each has its own tests in a file of its own."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import logsigmoid

from pyro_lvm.divergences import IMQ, MMD, RBF, Adversarial, SlicedWasserstein, Stein
from pyro_lvm.divergences.kernels import squared_distances

KERNELS = {
    "imq": IMQ,
    "imq_single": lambda: IMQ(scales=(1.0,)),
    "rbf": RBF,
    "rbf_single": lambda: RBF(bandwidths=(0.7,)),
}
each_kernel = pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS.keys())


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


class Quadratic(nn.Module):
    """T(z) = a + b . z + c |z|^2, which holds log p/q of normals with spherical covariances."""

    def __init__(self, dim=3, a=0.2, b=-0.3, c=0.1):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))
        self.b = nn.Parameter(torch.full((dim,), b))
        self.c = nn.Parameter(torch.tensor(c))

    def forward(self, z):
        return self.a + z @ self.b + self.c * z.square().sum(-1)

    def set_optimum(self, shift, scale):
        """Of q = N(shift, scale^2) and p = N(0, 1)."""
        shift = torch.as_tensor(shift).expand(self.b.shape)
        with torch.no_grad():
            self.a.copy_((shift.square() / (2 * scale**2) + math.log(scale)).sum())
            self.b.copy_(-shift / scale**2)
            self.c.fill_(1 / (2 * scale**2) - 1 / 2)


def exponential(squared_distance, dim):
    return torch.exp(-squared_distance / dim)


DIVERGENCES = {
    "mmd_imq_u": lambda dim: MMD(),
    "mmd_imq_v": lambda dim: MMD(estimator="v"),
    "mmd_imq_linear": lambda dim: MMD(estimator="linear"),
    "mmd_rbf_u": lambda dim: MMD(RBF()),
    "mmd_rbf_v": lambda dim: MMD(RBF(), estimator="v"),
    "mmd_median": lambda dim: MMD(median_heuristic=True),
    "mmd_median_linear": lambda dim: MMD(estimator="linear", median_heuristic=True),
    "mmd_function": lambda dim: MMD(exponential),
    "sliced_wasserstein": lambda dim: SlicedWasserstein(),
    "sliced_wasserstein_first_order": lambda dim: SlicedWasserstein(20, order=1),
    "adversarial_js": lambda dim: Adversarial(Quadratic(dim)),
    "adversarial_js_minimax": lambda dim: Adversarial(Quadratic(dim), generator="minimax"),
    "adversarial_kl": lambda dim: Adversarial(Quadratic(dim), objective="kl"),
    "stein": lambda dim: Stein(),
    "stein_rbf": lambda dim: Stein(RBF()),
}
OF_SAMPLES = {name: make for name, make in DIVERGENCES.items() if not name.startswith("stein")}
UNORDERED = {name: make for name, make in DIVERGENCES.items() if "linear" not in name}
each_divergence = pytest.mark.parametrize("make", DIVERGENCES.values(), ids=DIVERGENCES.keys())
each_of_samples = pytest.mark.parametrize("make", OF_SAMPLES.values(), ids=OF_SAMPLES.keys())
each_unordered = pytest.mark.parametrize("make", UNORDERED.values(), ids=UNORDERED.keys())


def draws(*sizes, dim=3, shift=0.5, **kwargs):
    """Samples of q = N(shift, 1.3^2) and p = N(0, 1)."""
    first, second = sizes
    return shift + 1.3 * torch.randn(first, dim, **kwargs), torch.randn(second, dim, **kwargs)


def log_standard_normal(z):
    return -z.square().sum(-1) / 2


def needs_density(divergence):
    return getattr(divergence, "against", "samples") == "density"


def evaluate(divergence, q, p):
    """The divergence under one seed; p is the standard normal where its density is needed."""
    torch.manual_seed(1)
    return divergence(q, log_standard_normal if needs_density(divergence) else p)


def inform(divergence, shift, scale):
    """Tell a discriminator all about two normals."""
    if isinstance(divergence, Adversarial):
        divergence.discriminator.set_optimum(shift, scale)


@each_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_divergence_is_a_scalar_with_gradients_to_both(make, dtype, device):
    divergence = make(3).to(device, dtype)
    q, p = (x.requires_grad_() for x in draws(6, 9, device=device, dtype=dtype))
    value = evaluate(divergence, q, p)
    assert value.shape == ()
    assert value.dtype == dtype
    assert value.device.type == device
    value.backward()
    for x in [q] if needs_density(divergence) else [q, p]:
        assert torch.isfinite(x.grad).all()
        assert (x.grad != 0).all()


def surrogate_at(divergence, q, p):
    """The function that the gradient at q and p is documented to be that of, by hand."""
    if isinstance(divergence, Stein):
        phi = svgd_direction(divergence.kernel, q.detach(), -q.detach())  # the score of N(0, 1)
        return lambda q, p: -(phi * q).sum() / len(q)
    if isinstance(divergence, Adversarial):
        return lambda q, p: adversarial_surrogate(divergence, q, p)
    if getattr(divergence, "median_heuristic", False):
        pooled = torch.cat([q, p]).detach()
        rate = 2 * q.shape[1] / torch.pdist(pooled).square().median()
        kernel = divergence.kernel
        return MMD(lambda d, dim: kernel(d * rate, dim), estimator=divergence.estimator)
    return lambda q, p: evaluate(divergence, q, p)


def adversarial_surrogate(divergence, q, p):
    t_q, t_p = divergence.discriminator(q), divergence.discriminator(p)
    if divergence.objective == "kl":
        return -t_q.mean() - torch.exp(-t_p).mean() + 1
    if divergence.generator == "minimax":
        return (logsigmoid(t_p).mean() + logsigmoid(-t_q).mean()) / 2
    return -(logsigmoid(t_q).mean() + logsigmoid(-t_p).mean()) / 2


def svgd_direction(kernel, z, score):
    """phi, pair by pair."""
    phi = torch.zeros_like(z)
    for i in range(len(z)):
        for j in range(len(z)):
            source = z[i].clone().requires_grad_()
            k = kernel((source - z[j]).square().sum(), z.shape[1])
            (slope,) = torch.autograd.grad(k, source)
            phi[j] += (k.detach() * score[i] + slope) / len(z)
    return phi


def numerical_gradient(function, x, step=1e-6):
    """Central differences."""
    gradient = torch.zeros_like(x)
    for k in range(x.numel()):
        move = torch.zeros_like(x)
        move.view(-1)[k] = step
        gradient.view(-1)[k] = (function(x + move) - function(x - move)) / (2 * step)
    return gradient


@each_divergence
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [(4, 5), (4, 4)])
def test_divergence_gradient_is_that_of_the_documented_function(make, sizes):
    divergence = make(2)
    q, p = (x.requires_grad_() for x in draws(*sizes, dim=2))
    evaluate(divergence, q, p).backward()
    surrogate = surrogate_at(divergence, q, p)
    with torch.no_grad():
        by_q = numerical_gradient(lambda x: surrogate(x, p), q)
        by_p = numerical_gradient(lambda x: surrogate(q, x), p)
    torch.testing.assert_close(q.grad, by_q, rtol=1e-5, atol=1e-7)
    if not needs_density(divergence):
        torch.testing.assert_close(p.grad, by_p, rtol=1e-5, atol=1e-7)


@each_unordered
@pytest.mark.usefixtures("float64")
def test_divergence_does_not_depend_on_the_order_of_either_sample(make):
    divergence, (q, p) = make(3), draws(20, 30)
    permuted = evaluate(divergence, q[torch.randperm(20)], p[torch.randperm(30)])
    torch.testing.assert_close(permuted, evaluate(divergence, q, p))


@each_unordered
@pytest.mark.usefixtures("float64")
def test_divergence_does_not_depend_on_the_order_of_pairs(make):
    divergence, (q, p), order = make(3), draws(20, 20), torch.randperm(20)
    permuted = evaluate(divergence, q[order], p[order])
    torch.testing.assert_close(permuted, evaluate(divergence, q, p))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name.startswith(("mmd", "sli"))])
def test_divergence_does_not_depend_on_a_common_shift(name):
    divergence, (q, p) = DIVERGENCES[name](3), draws(20, 30)
    torch.testing.assert_close(evaluate(divergence, q + 100, p + 100), evaluate(divergence, q, p))


@each_divergence
def test_divergence_leaves_its_arguments_and_itself_alone(make):
    divergence, (q, p) = make(3), draws(6, 9)
    q_before, p_before, before = q.clone(), p.clone(), copy.deepcopy(vars(divergence))
    evaluate(divergence, q, p)
    assert torch.equal(q, q_before)
    assert torch.equal(p, p_before)
    assert vars(divergence).keys() == before.keys()
    assert all(p.grad is None for p in divergence.parameters())


@each_divergence
def test_divergence_grows_with_the_mean_shift(make):
    divergence, values = make(3), []
    for shift in (0.0, 1.0, 2.0, 4.0):
        inform(divergence, shift, 1.3)
        values.append(evaluate(divergence, *draws(300, 300, shift=shift)).item())
    assert values == sorted(values)
    assert values[3] > 2 * values[0]


@each_divergence
@pytest.mark.parametrize("sizes", [(6, 9), (6, 6)])
def test_divergence_can_be_traced_in_value_and_gradient(make, sizes):
    divergence = make(3)
    trained = list(divergence.parameters())

    def value_and_gradient(function, q, p):
        value = evaluate(function, q, p) if function is divergence else function(q, p)
        leaves = [q, *trained] if needs_density(divergence) else [q, p, *trained]
        return [value, *torch.autograd.grad(value, leaves)]

    def samples():
        return [x.requires_grad_() for x in draws(*sizes)]

    graph = make_fx(lambda q, p: evaluate(divergence, q, p))(*samples())
    other = samples()
    expected = value_and_gradient(divergence, *other)
    torch.manual_seed(1)
    torch.testing.assert_close(value_and_gradient(graph, *other), expected)


@each_divergence
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_divergence_can_be_copied_and_pickled(make, copied):
    divergence, (q, p) = make(3), draws(6, 9)
    other = copied(divergence)
    torch.testing.assert_close(evaluate(other, q, p), evaluate(divergence, q, p))
    assert repr(other) == repr(divergence)


@each_divergence
def test_following_the_negative_gradient_brings_q_to_p(make):
    """With a sign wrong (pythae's default weight is negative) the samples would flee."""
    divergence, shift = make(2), torch.tensor([1.5, -1.0], requires_grad=True)
    q, p = torch.randn(2, 200, 2)
    optimizer = torch.optim.Adam([shift], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        inform(divergence, shift.detach(), 1.0)
        evaluate(divergence, q + shift, p).backward()
        optimizer.step()
    assert shift.detach().norm() < 0.4


@each_of_samples
def test_a_learned_prior_follows_as_well(make):
    """The gradient by the prior's draws; Stein has the prior's parameters in log_prob instead."""
    divergence, shift = make(2), torch.tensor([-1.5, 1.0], requires_grad=True)
    q, p = torch.randn(2, 200, 2)
    optimizer = torch.optim.Adam([shift], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        inform(divergence, -shift.detach(), 1.0)  # as seen from the prior
        apart = shift - shift.detach()  # 0: the discriminator knows priors around 0 alone
        evaluate(divergence, q - shift.detach(), p + apart).backward()
        optimizer.step()
    assert shift.detach().norm() < 0.4


@pytest.mark.parametrize("name", [name for name in OF_SAMPLES if "adversarial" not in name])
def test_draws_in_half_precision_are_compared_in_full(name):
    divergence, (q, p) = DIVERGENCES[name](3), draws(40, 50)
    short = q.bfloat16().requires_grad_()
    expected = evaluate(divergence, short.detach().float(), p)
    with torch.autocast("cpu", torch.bfloat16):
        value = evaluate(divergence, short, p)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert short.grad.dtype == torch.bfloat16


# --- every error

two = torch.zeros(2, 3)
ERRORS = {
    "imq_empty": (lambda: IMQ(scales=()), ValueError, "Expected scales with at least one value"),
    "imq_zero": (lambda: IMQ(scales=(1.0, 0.0)), ValueError, "scales to be a positive number"),
    "rbf_empty": (lambda: RBF(bandwidths=()), ValueError, "bandwidths with at least one value"),
    "rbf_negative": (lambda: RBF(bandwidths=(-1.0,)), ValueError, "bandwidths to be a positive"),
    "rbf_nan": (lambda: RBF(bandwidths=(math.nan,)), ValueError, "bandwidths to be a positive"),
    "no_rows": (lambda: SlicedWasserstein()(two[:0], two), ValueError, "at least 1 row(s); got 0"),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, error, match):
    with pytest.raises(error, match=re.escape(match)):
        call()


BAD_SAMPLES = {
    "rank_one": (lambda x: x[0], ValueError, "_samples of shape B x D; got (3,). Try "),
    "rank_three": (lambda x: x[None], ValueError, "_samples of shape B x D; got (1, 4, 3)"),
    "no_features": (lambda x: x[:, :0], ValueError, "_samples of shape B x D; got (4, 0)"),
    "no_rows": (lambda x: x[:0], ValueError, "row(s)"),
    "integers": (lambda x: x.long(), TypeError, "to be a floating point tensor; got torch.int64"),
    "list": (lambda x: x.tolist(), TypeError, "to be a floating point tensor; got list"),
}


@each_divergence
@pytest.mark.parametrize(("spoil", "error", "match"), BAD_SAMPLES.values(), ids=BAD_SAMPLES.keys())
def test_divergence_refuses_bad_samples(make, spoil, error, match):
    divergence, good = make(3), torch.zeros(4, 3)
    with pytest.raises(error, match=re.escape(match)):
        divergence(spoil(good), log_standard_normal if needs_density(divergence) else good)
    if not needs_density(divergence):
        with pytest.raises(error, match=re.escape(match)):
            divergence(good, spoil(good))


@each_of_samples
def test_divergence_refuses_samples_of_different_widths(make):
    with pytest.raises(ValueError, match="of one width D; got 3 and 2"):
        make(3)(two, two[:, :2])
