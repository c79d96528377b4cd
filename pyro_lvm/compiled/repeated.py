"""Functions that are run many times and differ in the random numbers that they draw alone.

What does not depend on them is computed once: of a pair that is sampled in chunks these are the
encoder, the parameters of q(z | x) and their logarithms; the draws, the decoder and the densities
are left. Python runs once, and the recording without it afterwards.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyro_lvm.compiled.inductor import compile_step
from pyro_lvm.compiled.recording import NotRecordable, difference, reason_of
from pyro_lvm.compiled.tracing import trace
from pyro_lvm.pair import untouched_random_state

__all__ = ["Repeated", "repeated"]

_aten = torch.ops.aten

Outputs = list[Tensor]


def repeated(function: Callable[[], Outputs], tensors: tuple[Tensor, ...] = ()) -> "Repeated":
    """Record a function of no arguments for many runs without gradients.

    The recording is compared with a run of the function under the same random numbers, whose state
    is as it was afterwards.

    Args:
        function: Returns tensors of floating point types. All that changes from run to run is what
            it draws from torch's generators.
        tensors: Some that it sees, on the devices whose generators it draws from.

    Returns:
        The function.

    Raises:
        NotRecordable: With the reason, if it is not, or not only, a function of tensors.
        Exception: What the function itself raises.
    """
    with torch.no_grad():
        with untouched_random_state(tensors):
            expected = function()
        with untouched_random_state(tensors):
            try:
                graph, constants = trace(lambda: function(), [], [])
                recording = Repeated(graph, constants)
            except Exception as error:
                raise NotRecordable(reason_of(error)) from error
        with untouched_random_state(tensors):
            found = recording()
    for ours, python in zip(found, expected, strict=True):
        reason = difference(ours.sum(), python.sum())
        if reason is not None:
            raise NotRecordable(reason)
    return recording


class Repeated:
    """A recorded function, in two parts: what is computed once, and what is computed in every run.

    Args:
        module: The recording, from ``constants`` to a list of tensors.
        constants: Tensors that the function uses.
    """

    def __init__(self, module: fx.GraphModule, constants: list[Tensor]) -> None:
        varying = _varying(module.graph)
        _check_shapes(varying)
        graph, kept = _without(module.graph, varying)
        _shorten(graph.graph)
        graph.recompile()
        self._graph, self._fixed = graph, _values(module, constants, kept)
        self._run: Callable[..., Any] = graph

    @torch.no_grad()
    def __call__(self) -> Outputs:
        """Run it with new random numbers."""
        return list(self._run(*self._fixed))

    @torch.no_grad()
    def compile(self) -> None:
        """Let Inductor compile what is left to run, which takes seconds.

        Raises:
            NotRecordable: With the reason, if it can't be compiled.
        """
        try:
            run = compile_step(self._graph, self._fixed)
            run(*self._fixed)
        except Exception as error:
            raise NotRecordable(reason_of(error)) from error
        self._run = run


def _varying(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on random numbers, or on what is changed in place."""
    changed = {node for op in graph.nodes for node in _changed_by(op)}
    varying: set[fx.Node] = set()
    for node in graph.nodes:
        tags = getattr(node.target, "tags", ())
        is_drawn = torch.Tag.nondeterministic_seeded in tags
        depends = not varying.isdisjoint(node.all_input_nodes)
        if node.op != "placeholder" and (is_drawn or depends or node in changed):
            varying.add(node)
        if any(True for _ in _changed_by(node)):
            varying.add(node)
    return varying


def _changed_by(node: fx.Node) -> Iterator[fx.Node]:
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


def _without(graph: fx.Graph, varying: set[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The varying part, and the nodes of the other one that it takes as arguments, in order."""
    (output,) = graph.find_nodes(op="output")
    needed = [i for node in graph.nodes if node in varying for i in node.all_input_nodes]
    needed += output.all_input_nodes
    kept = list(dict.fromkeys(node for node in needed if node not in varying))
    rest = fx.Graph()
    copies: dict[fx.Node, Any] = {n: rest.placeholder(f"fixed_{i}") for i, n in enumerate(kept)}
    for node in graph.nodes:
        if node in varying:
            copies[node] = rest.node_copy(node, copies.__getitem__)
    rest.output(fx.node.map_arg(output.args[0], copies.__getitem__))
    return fx.GraphModule(nn.Module(), rest), kept


def _shorten(graph: fx.Graph) -> None:
    """The log-probability of a Bernoulli with less to write: x l - softplus(l), of logits l."""
    for node in graph.find_nodes(op="call_function", target=_aten.neg.default):
        loss: Any = node.args[0]
        if loss.target is not _aten.binary_cross_entropy_with_logits.default or len(loss.users) > 1:
            continue
        logits, x, *rest = loss.args
        if len(rest) == 3 and rest[2] == 0 and rest[:2] == [None, None]:  # not reduced
            with graph.inserting_before(node):
                product = graph.call_function(_aten.mul.Tensor, (x, logits))
                softplus = graph.call_function(_aten.softplus.default, (logits,))
                log_prob = graph.call_function(_aten.sub_.Tensor, (product, softplus))
            node.replace_all_uses_with(log_prob)
            graph.erase_node(node)
            graph.erase_node(loss)


def _values(module: fx.GraphModule, constants: list[Tensor], kept: list[fx.Node]) -> list[Any]:
    """The values of some nodes that depend on nothing but constants."""
    graph, copies = fx.Graph(), {}
    wanted = set(kept)
    for node in reversed(list(module.graph.nodes)):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copies[node] = graph.placeholder(node.name)
        elif node in wanted:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in kept])
    with torch.no_grad():
        return list(fx.GraphModule(module, graph)(*constants))
