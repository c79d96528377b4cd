"""Networks of several inputs, side by side in one vector."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pyro_lvm.configured import Configured
from pyro_lvm.nn.shapes import as_sizes, check_input

__all__ = ["Joined"]


class Joined(Configured, nn.Module):
    """A network of several inputs: each is flattened, and the network sees them side by side.

    An encoder q(z | x, y) of a label y with 10 values, and a decoder p(x | z, y):

        Joined(MLP(784 + 10, [400], head=NormalHead(20)), [784, 10])(x, y)
        Joined(MLP(20 + 10, [400], head=BernoulliHead(784)), [20, 10])(z, y)

    An input of integers is a label: an indicator vector of its class (one-hot), of the size that
    stands for it in ``in_shapes``. Batch shapes are broadcast against each other, such as draws of
    z, ``K x N``, and a label per datum, ``N``, or a label that is enumerated, ``C x 1``.

    Args:
        network: A module from ``batch x D`` to a distribution, where D is the size of all inputs
            together.
        in_shapes: Trailing shape of each input, or the number of classes of a label.

    Raises:
        ValueError: If there is no input, or a size is not positive.
        TypeError: If a size is not an integer.
    """

    def __init__(self, network: nn.Module, in_shapes: Sequence[int | Sequence[int]]) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"Expected network to be an nn.Module; got {network!r}.")
        if not isinstance(in_shapes, Sequence) or len(in_shapes) == 0:
            raise ValueError(f"Expected in_shapes with a shape for every input; got {in_shapes!r}.")
        self.network = network
        self.in_shapes = [as_sizes(f"in_shapes[{i}]", s) for i, s in enumerate(in_shapes)]

    @property
    def head(self) -> Any:
        """What ends the network, if it says so: it has the event shape."""
        return getattr(self.network, "head", None)

    def forward(self, *inputs: Tensor) -> Any:
        """Return the distribution at the inputs.

        Args:
            *inputs: ``batch x in_shapes[i]``, or integers ``batch`` for a label.

        Returns:
            What the network returns, with the batch shape of all inputs together.

        Raises:
            TypeError: If an input is neither of a floating point type nor of integers.
            ValueError: If there are more or fewer inputs than shapes, or an input does not end in
                its shape.
        """
        if len(inputs) != len(self.in_shapes):
            raise ValueError(
                f"Expected {len(self.in_shapes)} inputs, of shapes {self.in_shapes}; got "
                f"{len(inputs)}."
            )
        floating = next(
            (x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()), None
        )
        dtype = torch.get_default_dtype() if floating is None else floating.dtype
        vectors = [
            _as_vector(f"input {i}", x, shape, dtype)
            for i, (x, shape) in enumerate(zip(inputs, self.in_shapes, strict=True))
        ]
        batch = torch.broadcast_shapes(*(v.shape[:-1] for v in vectors))
        return self.network(torch.cat([v.expand(*batch, v.shape[-1]) for v in vectors], -1))

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"in_shapes={self.in_shapes}"


def _as_vector(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One input as ``batch x D``."""
    if isinstance(x, Tensor) and not x.is_floating_point() and x.dtype != torch.bool:
        if len(shape) != 1:
            raise ValueError(
                f"Expected {name} of shape batch x {' x '.join(map(str, shape))}; got integers, "
                f"which are labels. Give them a floating point type, or one number of classes."
            )
        return F.one_hot(x.long(), shape[0]).to(dtype)
    check_input(name, x, shape)
    return x.flatten(-len(shape))
