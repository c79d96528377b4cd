"""The head of a network that has no noise."""

from collections.abc import Callable, Sequence

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_lvm.nn.heads import Head

__all__ = ["DeltaHead"]


class DeltaHead(Head):
    """All of the probability at one point, ``x = activation(raw)``: a generator without noise.

    Args:
        event_shape: Shape of one event.
        activation: Makes the last activation, ``nn.Sigmoid`` for values in [0, 1] or ``nn.Tanh``
            for values in [-1, 1], without parentheses; none by default.

    Raises:
        ValueError: If a size is not positive.
        TypeError: If a size is not an integer, or the activation is not a maker of modules.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__(event_shape, params_per_value=1)
        made = None if isinstance(activation, nn.Module) else activation()
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"Expected activation to make an nn.Module when called; got {activation!r}. "
                f"Try nn.Sigmoid."
            )
        self.last = made

    def _per_value(self, params: Tensor) -> dist.Distribution:
        (raw,) = self._unpack(params)
        return dist.Delta(self.last(raw))

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"event_shape={self.event_shape}"
