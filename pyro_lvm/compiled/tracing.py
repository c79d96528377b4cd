"""From a Pyro program to the tensor operations that it comes down to.

A pair's loss is Python: handlers, traces, distributions. What it does with tensors is the same at
every step, so that one run shows it. ``make_fx`` records that run operation by operation, and the
recording is a function of its own, free of Python, that a compiler can work on.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_lvm.compiled.recordable import recordable
from pyro_lvm.pair import modules_of

__all__ = ["Footprint", "Graph", "footprint", "kind_of_tensor", "trace"]


class Footprint(NamedTuple):
    """The tensors that live on between the runs of a program, and the modules that it used.

    Attributes:
        parameters: Leaf tensors that require a gradient.
        states: Buffers, and parameters that are frozen.
        modules: All modules, theirs included.
        homes: For each of these tensors where it can be looked up: a function that returns it.
        kinds: What each of them was like.
    """

    parameters: list[Tensor]
    states: list[Tensor]
    modules: list[nn.Module]
    homes: list[Callable[[], Tensor | None]]
    kinds: list[Hashable]

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters and states."""
        return [*self.parameters, *self.states]

    def is_current(self) -> bool:
        """Whether the program would still find the same tensors, and as they were.

        A parameter can be frozen, and a module in another precision has the same parameters.
        """
        entries = zip(self.homes, self.tensors, self.kinds, strict=True)
        return all(home() is t and kind_of_tensor(t) == kind for home, t, kind in entries)


class Graph(NamedTuple):
    """A recorded function, ``module(*tensors, *constants, *arguments) -> list of tensors``."""

    module: fx.GraphModule
    constants: list[Tensor]


def kind_of_tensor(tensor: Tensor) -> Hashable:
    """What of a tensor a graph takes for granted: all but its values."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def footprint(run: Callable[[], Any], *programs: Any) -> Footprint:
    """Run a function, and find the tensors that live on behind it; buffers stay as they were.

    Modules are those that ``programs`` belong to and those that the run calls, closed over or not;
    parameters are theirs and what the run declares in Pyro's param store.

    Args:
        run: A function of no arguments.
        programs: Modules, or bound methods of some.

    Returns:
        The tensors and modules.
    """
    modules: dict[int, nn.Module] = {}
    buffers: list[tuple[Tensor, Tensor]] = []

    def meet(module: nn.Module, _: Any = None) -> None:
        for m in module.modules():
            if id(m) not in modules:
                modules[id(m)] = m
                buffers.extend((b, b.clone()) for b in m.buffers(recurse=False))

    for owner in modules_of(*programs):
        meet(owner)
    handle = register_module_forward_pre_hook(meet)
    try:
        with poutine.trace(param_only=True) as capture:
            run()
    finally:
        handle.remove()
        for buffer, value in buffers:
            buffer.copy_(value)
    return _footprint(list(modules.values()), list(capture.trace.nodes))


def trace(function: Callable[..., Any], tensors: Sequence[Tensor], arguments: Any) -> Graph:
    """Record a function of ``arguments`` that also meets ``tensors`` on its way.

    Other tensors that it meets are constants of the graph. In-place changes of tensors are made
    while it is recorded, and are in the graph.

    Args:
        function: From ``arguments`` to a flat list of tensors.
        tensors: Tensors that are to be inputs wherever the function finds them.
        arguments: Its arguments, tensors.

    Returns:
        The graph.

    Raises:
        Exception: If the function can't be recorded, most of all because its Python depends on the
            value of a tensor.
    """
    # one record of shapes for all operations: make_fx else sets up another one for each of them
    shapes = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with recordable(), tracing(shapes):
        module = make_fx(lambda _, given: function(*given))(list(tensors), tuple(arguments))
    graph = module.graph
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    _check_shapes(graph)
    return _flat(module, len(tensors))


def _check_shapes(graph: fx.Graph) -> None:
    """Refuse operations whose result has a shape that values decide on, as ``x[mask]`` has.

    What Python does with that shape is a constant of the graph, and wrong for other values.
    """
    changing: set[fx.Node] = set()  # what depends on inputs
    for node in graph.nodes:
        if node.op == "placeholder" or not changing.isdisjoint(node.all_input_nodes):
            changing.add(node)
        if torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
            continue
        asked = node.all_input_nodes
        if node.target is torch.ops.aten.index.Tensor:  # by numbers, as a rule; by a mask, else
            indices = (i for i in node.args[1] if isinstance(i, fx.Node))
            asked = [i for i in indices if i.meta["val"].dtype in (torch.bool, torch.uint8)]
        if not changing.isdisjoint(asked):
            raise ValueError(
                f"the shape of a tensor depends on values ({node.target}, as in x[mask]; "
                f"torch.where or a product with the mask has a fixed one)"
            )


def _footprint(modules: list[nn.Module], names: list[str]) -> Footprint:
    store = pyro.get_param_store()
    homes: dict[int, tuple[Tensor, Callable[[], Tensor | None]]] = {}
    for name in names:
        tensor = store._params.get(name)
        if tensor is not None:
            homes[id(tensor)] = tensor, _in_store(name)
    for module in modules:
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    homes.setdefault(id(tensor), (tensor, _in_table(table, name)))
    # parameters first; the sort is stable
    found = sorted(homes.values(), key=lambda entry: not entry[0].requires_grad)
    tensors = [tensor for tensor, _ in found]
    count = sum(t.requires_grad for t in tensors)
    homes_of = [home for _, home in found]
    kinds = [kind_of_tensor(t) for t in tensors]
    return Footprint(tensors[:count], tensors[count:], modules, homes_of, kinds)


def _in_store(name: str) -> Callable[[], Tensor | None]:
    store = pyro.get_param_store()
    return lambda: store._params.get(name)


def _in_table(table: dict[str, Any], name: str) -> Callable[[], Tensor | None]:
    return lambda: table.get(name)


def _flat(module: fx.GraphModule, num_tensors: int) -> Graph:
    """The same graph with its constants as inputs, behind ``num_tensors`` others."""
    graph, constants = fx.Graph(), []
    copies: dict[fx.Node, Any] = {}
    places = module.graph.find_nodes(op="placeholder")
    for i, node in enumerate(places):
        if i == num_tensors:
            constants = _lift(module, graph, copies)
        copies[node] = graph.placeholder(f"input_{i}")
    if len(places) == num_tensors:
        constants = _lift(module, graph, copies)
    for node in module.graph.nodes:
        if node not in copies and node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    (outputs,) = module.graph.find_nodes(op="output")
    graph.output(fx.node.map_arg(tuple(outputs.args[0]), copies.__getitem__))
    return Graph(fx.GraphModule(nn.Module(), graph), constants)


def _lift(module: fx.GraphModule, graph: fx.Graph, copies: dict[fx.Node, Any]) -> list[Tensor]:
    lifted: list[Tensor] = []
    for node in module.graph.find_nodes(op="get_attr"):
        copies[node] = graph.placeholder(f"constant_{len(lifted)}")
        lifted.append(getattr(module, str(node.target)))
    return lifted
