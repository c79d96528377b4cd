"""Graphs by Inductor: which matrix products it takes, and that they are right."""

import shutil

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_lvm.compiled.inductor import _ProductsByOneDNN, compile_graph

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() != "AVX512", reason="no AVX-512: MKL is as good"
    ),
]

SIZES = {"M": 120, "K": 300, "N": 200}


def products_in(graph):
    """How many products are left to oneDNN once the pass has seen a graph."""
    _ProductsByOneDNN()(graph.graph)
    graph.recompile()
    return len(
        graph.graph.find_nodes(op="call_function", target=torch.ops.pyro_lvm.product.default)
    )


def matrices(dtype=torch.float32, divide=1):
    torch.manual_seed(0)
    m, k, n = (size // divide for size in SIZES.values())
    return torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)


CALLS = {
    "x y": lambda x, y: x @ y,
    "b + x y": lambda x, y: torch.addmm(y[0], x, y),
    "x^T y^T": lambda x, y: y.T @ x.T,
    "x y^T of a transposed": lambda x, y: x @ y.T.contiguous().T,
    "3 b - 2 x y": lambda x, y: torch.addmm(y[0], x, y, beta=3, alpha=-2),
    "nothing added": lambda x, y: torch.addmm(y[0] / 0, x, y, beta=0),
    "b + x y, a matrix": lambda x, y: torch.addmm(x[:, :1].expand(-1, y.shape[1]), x, y),
}


@pytest.mark.parametrize("name", CALLS)
def test_large_products_are_onednn_s(name):
    x, y = matrices()
    graph = make_fx(CALLS[name], tracing_mode="fake")(x, y)
    assert products_in(graph) == 1
    exact = CALLS[name](x.double(), y.double())
    torch.testing.assert_close(graph(x, y).double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("dtype", "divide"), [(torch.float64, 1), (torch.float32, 4)])
def test_others_are_left_alone(dtype, divide):
    x, y = matrices(dtype, divide)
    graph = make_fx(lambda x, y: torch.addmm(y[0], x, y), tracing_mode="fake")(x, y)
    assert products_in(graph) == 0


def test_onednn_can_be_switched_off():
    graph = make_fx(lambda x, y: x @ y, tracing_mode="fake")(*matrices())
    with torch.backends.mkldnn.flags(enabled=False):
        assert products_in(graph) == 0


def test_losses_and_gradients():
    """A network whose products are large."""
    torch.manual_seed(0)
    linear = nn.Linear(SIZES["K"], SIZES["N"])
    x = torch.randn(SIZES["M"], SIZES["K"])

    def loss(x, weight, bias):
        return torch.tanh(nn.functional.linear(x, weight, bias)).square().sum()

    parameters = list(linear.parameters())
    expected = torch.autograd.grad(loss(x, *parameters), parameters)

    def gradients(x, *values):
        values = [v.detach().requires_grad_() for v in values]
        with torch.enable_grad():
            return list(torch.autograd.grad(loss(x, *values), values))

    with torch.no_grad():
        inputs = [x, *parameters]
        run = compile_graph(make_fx(gradients, tracing_mode="fake")(*inputs), inputs)
        torch.testing.assert_close(tuple(run(*inputs)), expected, rtol=1e-4, atol=1e-4)


def test_sums_by_index_stay_within_their_tensor():
    """Several threads add up what is read along the other dimension (pytorch issue 191837)."""

    def sums(x, weights):
        rows = torch.arange(x.shape[1])
        return [x.new_zeros(x.shape[1], len(x)).index_add(0, rows, x.exp().T * weights)]

    x, weights = torch.randn(1000, 32), torch.randn(32, 1000)
    graph = make_fx(sums, tracing_mode="fake")(x, weights)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (result,) = compile_graph(graph, [x, weights])(x, weights)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(result, sums(x, weights)[0])
