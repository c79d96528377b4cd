"""Gradients that are taken at once, so that nothing has to be kept of what they are of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Gradients", "linear"]


class Gradients:
    """Sums of gradients by leaf tensors, of scalars that are differentiated when they come."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, value: Tensor, stops: Sequence[Tensor] = ()) -> list[Tensor]:
        """Differentiate a scalar by all leaf tensors that it depends on.

        Args:
            value: The scalar.
            stops: Leaf tensors whose gradients are not added, but returned.

        Returns:
            The gradients by ``stops``.
        """
        known = {id(stop) for stop in stops}
        leaves = [leaf for leaf in _leaves_of(value) if id(leaf) not in known]
        if not value.requires_grad:
            return [torch.zeros_like(stop) for stop in stops]
        gradients = torch.autograd.grad(
            value, [*leaves, *stops], retain_graph=True, materialize_grads=True
        )
        for leaf, gradient in zip(leaves, gradients, strict=False):
            _, total = self._sums.get(id(leaf), (leaf, None))
            self._sums[id(leaf)] = leaf, gradient if total is None else total + gradient
        return list(gradients[len(leaves) :])

    def pop(self, leaf: Tensor) -> Tensor:
        """The sum for a leaf, which is taken out."""
        _, total = self._sums.pop(id(leaf), (leaf, torch.zeros_like(leaf)))
        return total

    def surrogate(self, like: Tensor) -> Tensor:
        """Zero, with these gradients, of first order; of the dtype and device of another tensor."""
        terms = [linear(leaf, gradient) for leaf, gradient in self._sums.values()]
        return torch.stack(terms).sum() if terms else like.new_zeros(())


def linear(x: Tensor, gradient: Tensor) -> Tensor:
    """Zero, with this gradient by ``x``."""
    return ((x - x.detach()) * gradient.detach()).sum()


def _leaves_of(value: Tensor) -> list[Tensor]:
    """The tensors that accumulate a gradient when ``value`` is differentiated, each once."""
    found: dict[int, Tensor] = {}
    waiting: list[Any] = [value.grad_fn]
    seen: set[Any] = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        waiting.extend(parent for parent, _ in node.next_functions)
    return list(found.values())
