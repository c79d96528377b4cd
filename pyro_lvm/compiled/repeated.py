"""Functions that are run many times and differ in the random numbers that they draw alone.

What does not depend on them is computed once: of a pair that is sampled in chunks these are the
encoder, the parameters of q(z | x) and their logarithms; the draws, the decoder and the densities
are left. Python runs once, and the recording without it afterwards.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from pyro_lvm.compiled.graphs import rest_of
from pyro_lvm.compiled.inductor import compile_graph
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
        self._rest = rest_of(module.graph, constants)
        _shorten(self._rest.module)
        self._run: Callable[..., Any] = self._rest.module

    @torch.no_grad()
    def __call__(self) -> Outputs:
        """Run it with new random numbers."""
        return list(self._run(*self._rest.inputs))

    @torch.no_grad()
    def compile(self) -> None:
        """Let Inductor compile what is left to run, which takes seconds.

        Raises:
            NotRecordable: With the reason, if it can't be compiled.
        """
        try:
            run = compile_graph(*self._rest)
            run(*self._rest.inputs)
        except Exception as error:
            raise NotRecordable(reason_of(error)) from error
        self._run = run


def _shorten(module: fx.GraphModule) -> None:
    """The log-probability of a Bernoulli with less to write: x l - softplus(l), of logits l."""
    graph = module.graph
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
    module.recompile()
