"""Recorded graphs made smaller: what never changes is computed once, and what does nothing goes.

A node changes from call to call if it depends on an input that does, on random numbers, or on what
is written in place; all others have one value for all calls.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

__all__ = ["Rest", "rest_of", "without_idle_nodes"]

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten.expand.default, _aten.alias.default, _aten.detach.default)


class Rest(NamedTuple):
    """What is left of a graph, ``module(*inputs, *changing)``."""

    module: fx.GraphModule
    inputs: list[Tensor]

    def run(self, *changing: Tensor) -> Any:
        """The graph's outputs, for the inputs that change."""
        return self.module.forward(*self.inputs, *changing)


def without_idle_nodes(graph: fx.Graph) -> fx.Graph:
    """A graph without draws that nobody uses, and views that are what they are views of.

    It is changed in place, and is for use without gradients.
    """
    graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    is_functional = not any(True for node in graph.nodes for _ in _written_by(node))
    for node in graph.nodes if is_functional else ():
        if _is_idle(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def rest_of(graph: fx.Graph, values: Sequence[Tensor], *, changing: Sequence[int] = ()) -> Rest:
    """A graph as a function of some of its inputs, all that does not change computed here.

    Args:
        graph: The graph.
        values: Its other inputs, in order.
        changing: The positions of the inputs that differ from call to call.

    Raises:
        ValueError: If the shape of a tensor depends on random numbers.
    """
    places = graph.find_nodes(op="placeholder")
    free = [places[i] for i in changing]
    fixed = zip((p for p in places if p not in free), values, strict=True)
    varying = _varying(graph, free)
    _check_shapes(varying)
    known = _known(graph, dict(fixed), varying)
    return _rest(graph, free, known)


def _is_idle(node: fx.Node) -> bool:
    if node.target is _aten.permute.default:
        return list(node.args[1]) == list(range(len(node.args[1])))  # type: ignore[arg-type]
    if node.target not in _VIEWS:
        return False
    mine, theirs = (_shape(n) for n in (node, node.args[0]))
    return mine is not None and mine == theirs


def _shape(node: Any) -> torch.Size | None:
    return getattr(node.meta.get("val"), "shape", None)


def _varying(graph: fx.Graph, free: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that differ from call to call."""
    written = {node for op in graph.nodes for node in _written_by(op)}
    varying = set(free)
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        is_drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        writes = any(True for _ in _written_by(node))
        depends = not varying.isdisjoint(node.all_input_nodes)
        if is_drawn or writes or depends or node in written:
            varying.add(node)
    return varying


def _written_by(node: fx.Node) -> Iterator[fx.Node]:
    """What an operation writes into, and the tensors that this is a view of."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    for argument, value in _arguments(node):
        info = argument.alias_info
        while info is not None and info.is_write and isinstance(value, fx.Node):
            yield value
            value = _base(value)


def _base(node: fx.Node) -> fx.Node | None:
    """What a node is a view of."""
    if getattr(node.target, "_schema", None) is None:
        return None
    views = (v for a, v in _arguments(node) if a.alias_info is not None)
    return next((v for v in views if isinstance(v, fx.Node)), None)


def _arguments(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """The arguments of an operation as its schema has them, and their values."""
    target: Any = node.target
    for i, argument in enumerate(target._schema.arguments):
        yield argument, node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)


def _check_shapes(varying: set[fx.Node]) -> None:
    for node in varying:
        if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
            if node.target is _aten.index.Tensor and not _by_mask(node):
                continue
            raise ValueError(f"the shape of a tensor depends on random numbers ({node.target})")


def _by_mask(node: fx.Node) -> bool:
    indices: Any = node.args[1]
    given = [i for i in indices if isinstance(i, fx.Node)]
    return any(i.meta["val"].dtype in (torch.bool, torch.uint8) for i in given)


@torch.no_grad()
def _known(
    graph: fx.Graph, values: Mapping[fx.Node, Any], varying: set[fx.Node]
) -> dict[fx.Node, Any]:
    """The values of all nodes that do not change."""
    known = dict(values)
    for node in graph.nodes:
        if node.op == "call_function" and node not in varying:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    return known


def _rest(graph: fx.Graph, free: Sequence[fx.Node], known: dict[fx.Node, Any]) -> Rest:
    """The nodes that are not known, with the values that they need as inputs."""
    rest, copies = fx.Graph(), {}
    inputs: list[Tensor] = []
    unknown = [n for n in graph.nodes if n not in known and n not in free]
    needed = {a for node in unknown for a in node.all_input_nodes if a in known}
    for node in (n for n in graph.nodes if n in needed):
        copies[node] = known[node]
        if isinstance(known[node], Tensor):
            copies[node] = rest.placeholder(f"known_{len(inputs)}")
            inputs.append(known[node])
    for i, node in enumerate(free):
        copies[node] = rest.placeholder(f"changing_{i}")
    for node in unknown:
        copies[node] = rest.node_copy(node, copies.__getitem__)
    return Rest(fx.GraphModule(nn.Module(), rest), inputs)
