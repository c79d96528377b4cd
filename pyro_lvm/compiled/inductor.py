"""Inductor, with the random numbers of Python and the faster of two matrix products."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch._inductor
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

__all__ = ["Backend", "compile_graph"]

Backend = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Sequence[Tensor]]]
"""From a graph and its inputs to a function that runs it."""

_aten = torch.ops.aten
_LIBRARY = torch.library.Library("pyro_lvm", "DEF")
_LIBRARY.define("product(Tensor x, Tensor weight) -> Tensor")  # x weight^T, by oneDNN
_LEAST_PRODUCT = 10**6  # multiplications, some 10 us: to get into Python and out again takes 3 us


def compile_graph(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Compile a graph for inputs like these, without guards that look at them."""
    with _scatters_in_place():
        return torch._inductor.compile(graph, [*inputs], options=_options())


def _options() -> dict[str, Any]:
    return {
        "fallback_random": True,
        "emulate_precision_casts": True,  # half precision where a recording has it, as in Python
        "post_grad_custom_post_pass": _ProductsByOneDNN(),
    }


class _ProductsByOneDNN(CustomGraphPass):
    """Lets oneDNN multiply matrices in single precision on CPUs with AVX-512.

    torch leaves them to MKL, which does without AVX-512 on processors of other makers than Intel:
    there oneDNN takes half the time or less.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Replace what is large enough, in place."""
        for target in (_aten.mm.default, _aten.addmm.default) if _has_onednn() else ():
            for node in graph.find_nodes(op="call_function", target=target):
                if _is_large_enough(node):
                    _replace(graph, node)

    def uuid(self) -> Any:
        """What the cache of compiled graphs knows this by."""
        return get_hash_for_files((__file__,)), _has_onednn()


def _has_onednn() -> bool:
    onednn = torch.backends.mkldnn
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and onednn.is_available() and bool(onednn.enabled)


def _is_large_enough(node: fx.Node) -> bool:
    *_, x, y = (a.meta["val"] for a in node.args)  # type: ignore[union-attr]
    single_on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
    return single_on_cpu and x.numel() * y.shape[1] >= _LEAST_PRODUCT


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    """Compute x y, or beta b + alpha x y; the compiler fuses what is around the product."""
    *added, x, y = node.args

    def call(target: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(node):
            new = graph.call_function(target, args)
        values = (a.meta["val"] if isinstance(a, fx.Node) else a for a in args)
        new.meta["val"] = target(*values)
        return new

    weight = call(_aten.permute.default, y, [1, 0])
    result = call(torch.ops.pyro_lvm.product.default, x, weight)
    for name, factor in node.kwargs.items():  # those of addmm
        if name == "alpha":
            result = call(_aten.mul.Tensor, result, factor)
        else:  # beta; with 0, what is added may be anything
            added = [call(_aten.mul.Tensor, b, factor) for b in added] if factor else []
    for other in added:
        result = call(_aten.add.Tensor, result, other)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


@contextmanager
def _scatters_in_place() -> Iterator[None]:
    """Keep sums by index within their tensors (pytorch/pytorch issue 191837).

    Where a tile of numbers is read along one dimension and added up along another one by several
    threads, torch up to 2.13 at least counts the position in the tile twice, and writes behind the
    end of the tensor.
    """
    from torch._inductor import config
    from torch._inductor.codegen.cpp import CppTile2DKernel, CppVecKernel

    faulty = CppTile2DKernel.store

    def store(kernel: Any, name: str, index: Any, value: Any, mode: Any = None) -> None:
        by_threads = config.cpp.dynamic_threads or kernel.num_threads != 1
        if mode != "atomic_add" or not by_threads:
            return faulty(kernel, name, index, value, mode)
        if kernel.need_vec_transpose(kernel.rename_indexing(index)):
            return faulty(kernel, name, index, value, mode)
        return CppVecKernel.store(kernel, name, index, value, mode)  # it counts the position itself

    with mock.patch.object(CppTile2DKernel, "store", store):
        yield


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")


_LIBRARY.impl("product", _by_onednn, "CPU")
torch.library.register_fake("pyro_lvm::product", lambda x, weight: x.new_empty(len(x), len(weight)))
