"""Recorded graphs made smaller: what never changes is computed once, and what does nothing goes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

__all__ = ["Rest", "of_first", "without_idle_nodes"]

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.expand.default, _aten.alias.default, _aten.detach.default)


class Rest(NamedTuple):
    """What is left of a graph, ``module(*inputs, first)``."""

    module: fx.GraphModule
    inputs: list[Tensor]

    def run(self, first: Tensor) -> Any:
        """The graph's outputs."""
        return self.module.forward(*self.inputs, first)


def without_idle_nodes(graph: fx.Graph) -> fx.Graph:
    """A graph without draws that nobody uses, and views that are what they are views of.

    It is changed in place, and is for use without gradients.
    """
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    for node in graph.nodes if _is_functional(graph) else ():
        if _is_idle(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def of_first(graph: fx.Graph, values: Sequence[Tensor], first: int) -> Rest:
    """A graph as a function of one of its inputs, all that does not depend on it computed here.

    Args:
        graph: The graph.
        values: Its other inputs, in order.
        first: The position of that one.
    """
    places = graph.find_nodes(op="placeholder")
    free = places.pop(first)
    known: dict[fx.Node, Any] = dict(zip(places, values, strict=True))
    if _is_functional(graph):
        _compute(graph, known)
    return _rest(graph, free, known)


def _is_functional(graph: fx.Graph) -> bool:
    """Whether no node changes a tensor in place, which would have to be fresh in every call."""
    schemas = (getattr(node.target, "_schema", None) for node in graph.nodes)
    return not any(schema is not None and schema.is_mutable for schema in schemas)


def _is_idle(node: fx.Node) -> bool:
    if node.target is _aten.permute.default:
        return list(node.args[1]) == list(range(len(node.args[1])))  # type: ignore[arg-type]
    if node.target not in _VIEWS:
        return False
    mine, theirs = (_shape(n) for n in (node, node.args[0]))
    return mine is not None and mine == theirs


def _shape(node: Any) -> torch.Size | None:
    return getattr(node.meta.get("val"), "shape", None)


def _compute(graph: fx.Graph, known: dict[fx.Node, Any]) -> None:
    """Add the values of all nodes that depend on nothing else."""
    for node in graph.nodes:
        if node.op == "call_function" and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)


def _rest(graph: fx.Graph, free: fx.Node, known: dict[fx.Node, Any]) -> Rest:
    """The nodes that are not known, with the values that they need as inputs."""
    rest, copies = fx.Graph(), {}
    inputs: list[Tensor] = []
    unknown = [n for n in graph.nodes if n not in known and n is not free]
    needed = {a for node in unknown for a in node.all_input_nodes if a in known}
    for node in (n for n in graph.nodes if n in needed):
        copies[node] = known[node]
        if isinstance(known[node], Tensor):
            copies[node] = rest.placeholder(f"known_{len(inputs)}")
            inputs.append(known[node])
    copies[free] = rest.placeholder("first")
    for node in unknown:
        copies[node] = rest.node_copy(node, copies.__getitem__)
    return Rest(fx.GraphModule(nn.Module(), rest), inputs)
