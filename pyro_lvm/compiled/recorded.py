"""Functions of tensors without the Python that made them, where they can be recorded."""

import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, fx

from pyro_lvm.compiled.graphs import Rest, rest_of, without_idle_nodes
from pyro_lvm.compiled.inductor import compile_graph
from pyro_lvm.compiled.recording import reason_of
from pyro_lvm.compiled.tracing import trace
from pyro_lvm.pair import untouched_random_state

__all__ = ["Recorded"]

Function = Callable[..., Sequence[Tensor]]
OfOne = Callable[[Tensor], Sequence[Tensor]]

# Numbers that a graph writes in all of its calls: some ten seconds, as long as it is compiled.
_WORTH_COMPILING = 2e10


class Recorded:
    """A function of a tensor that is called again and again, next to others that stay.

    For each shape of its arguments it is run once and recorded, operation by operation, and the
    recording is compared with the function elsewhere. What does not depend on the first argument is
    computed once, and what is called often is compiled. If a function can't be recorded, a warning
    says why, once, and it runs as it is.

    Args:
        function: From tensors to tensors, without randomness.

    Attributes:
        reason: Why it is not recorded; None if it is, or has not been called.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.reason: str | None = None
        self._graphs: dict[Hashable, tuple[fx.Graph, list[Tensor]]] = {}
        self._compiled: dict[Hashable, Callable[..., Sequence[Tensor]] | None] = {}

    def given(self, example: Tensor, others: Sequence[Tensor], num_calls: int = 1) -> OfOne:
        """The function of its first argument alone, which has the shape of an example.

        Args:
            example: A first argument.
            others: The other arguments.
            num_calls: How often it is going to be called.
        """
        key = tuple(t.shape for t in (example, *others))
        if key not in self._graphs and self.reason is None:
            self._record(key, example, others)
        if self.reason is not None:
            return lambda x: self.function(x, *others)
        graph, constants = self._graphs[key]
        rest = rest_of(graph, [*constants, *others], changing=[len(constants)])
        if num_calls * _numbers(rest.module.graph) < _WORTH_COMPILING:
            return rest.run
        if key not in self._compiled:
            self._compiled[key] = _compiled(rest, example)
        run = self._compiled[key]
        return rest.run if run is None else lambda x: run(*rest.inputs, x)

    def _record(self, key: Hashable, example: Tensor, others: Sequence[Tensor]) -> None:
        with untouched_random_state((example,)):
            elsewhere = example + 0.1 * torch.randn_like(example)
            reference = self.function(elsewhere, *others)
            try:
                module, constants = trace(self.function, [], (example, *others))
                graph = without_idle_nodes(module.graph)
                rest = rest_of(graph, [*constants, *others], changing=[len(constants)])
                result = rest.run(elsewhere)
            except Exception as error:
                self._give_up(reason_of(error))
                return
        if _agree(result, reference):
            self._graphs[key] = graph, constants
        else:
            self._give_up("values or gradients of the recording differ from those of Python")

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        warnings.warn(f"The densities are not recorded, but run in Python: {reason}.", stacklevel=2)


def _compiled(rest: Rest, example: Tensor) -> Callable[..., Sequence[Tensor]] | None:
    """What runs a graph faster; None if there is no compiler, or if it does something else."""
    with untouched_random_state((example,)):
        try:
            run = compile_graph(rest.module, [*rest.inputs, example])
            return run if _agree(run(*rest.inputs, example), rest.run(example)) else None
        except Exception:  # a compiler fails in its own ways
            return None


def _numbers(graph: fx.Graph) -> int:
    """How many numbers the nodes of a graph have in all, which is about what it costs."""
    values = (node.meta.get("val") for node in graph.nodes)
    return sum(value.numel() for value in values if isinstance(value, Tensor))


def _agree(results: Sequence[Tensor], references: Sequence[Tensor]) -> bool:
    """Whether results differ by no more than rounding, relative to the largest entry."""
    return all(_are_close(a, b) for a, b in zip(results, references, strict=True))


def _are_close(value: Tensor, reference: Tensor) -> bool:
    # the square root of the precision is room for sums in another order, and for nothing else
    precision = torch.finfo(reference.dtype).eps ** 0.5
    size = torch.where(reference.isfinite(), reference, 0.0).abs().amax()
    error = precision * (1e-3 + float(size))
    return torch.allclose(value, reference, rtol=0.0, atol=error, equal_nan=True)
