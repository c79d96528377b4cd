"""Sums, products and expectations of packed log-probabilities.

A packed tensor has no dimensions of size 1, and a name for each dimension that it has: one letter
per plate and per enumerated site (Pyro's ``_pyro_dims``).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import opt_einsum
import torch
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.rings import LogRing
from torch import Tensor

__all__ = ["Factor", "expectation", "named", "names", "sum_out", "sum_to"]


class Factor(NamedTuple):
    """One site's log-probability in a product of several.

    Attributes:
        log_prob: Packed, with the mask applied and without the scale.
        scale: The user's scale.
        plates: The names of the plates around the site.
    """

    log_prob: Tensor
    scale: float | Tensor
    plates: frozenset[str]


def names(term: Any) -> str:
    """The names of a packed tensor's dimensions."""
    return term._pyro_dims


def named(term: Any, dims: str) -> Tensor:
    """The tensor, with names for its dimensions."""
    term._pyro_dims = dims
    return term


def sum_to(term: Tensor, kept: set) -> Tensor:
    """Sum over all dimensions but the named ones."""
    positions = [i for i, name in enumerate(names(term)) if name not in kept]
    result = term.sum(positions) if positions else term[...]
    return named(result, "".join(name for name in names(term) if name in kept))


def sum_out(factors: Sequence[Factor], sums: set[str]) -> list[Tensor]:
    """Log of the sum, over enumerated sites, of the product of factors: packed terms to be added.

    Sums are taken inside the plates that they belong to (tensor variable elimination, Obermeyer et
    al. 2019). The factors' common scale stays outside the logarithm.

    Raises:
        ValueError: If the factors have no scalar scale in common.
    """
    if not factors:
        return []
    scale = _common_scale(factors)
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    sizes: dict[str, int] = {}
    for factor in factors:
        dims = names(factor.log_prob)
        sizes.update(zip(dims, factor.log_prob.shape, strict=True))
        # a tensor object of its own, as the contraction tells them apart by identity
        tree.setdefault(factor.plates, []).append(named(factor.log_prob[...], dims))
    contracted = contract_tensor_tree(tree, set(sums), ring=LogRing(dim_to_size=sizes))
    return [packed.scale_and_mask(t, scale=scale) for terms in contracted.values() for t in terms]


def expectation(term: Tensor, probabilities: Mapping[str, Tensor]) -> Tensor:
    """Sum of a packed term times probabilities, over the dimensions that these are named by."""
    if not probabilities:
        return term
    # -inf where there is no mass counts as nothing, not as nan
    finite = term.clamp(min=torch.finfo(term.dtype).min)
    inputs = [names(term), *(names(p) for p in probabilities.values())]
    output = "".join(sorted(set("".join(inputs)) - set(probabilities)))
    equation = f"{','.join(inputs)}->{output}"
    return named(opt_einsum.contract(equation, finite, *probabilities.values()), output)


def _common_scale(factors: Sequence[Factor]) -> float | Tensor:
    """One scale outside the sum; with several there is no density to take the logarithm of."""
    scales = [f.scale for f in factors]
    if any(isinstance(s, Tensor) and s.dim() > 0 for s in scales):
        raise ValueError(
            "Expected a scalar poutine.scale around sites that an enumerated one touches; got a "
            "tensor with one scale per element."
        )
    different = sorted({float(s) for s in scales})
    if len(different) > 1:
        raise ValueError(
            f"Expected one poutine.scale around an enumerated site and the sites that depend on "
            f"it; got {different}. A KL weight and an exact sum exclude each other: sample the "
            f"site in the guide, or give all of them the same scale."
        )
    return scales[0]
