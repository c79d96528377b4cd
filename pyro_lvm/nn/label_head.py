"""The head of a classifier."""

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_lvm.checks import check_positive
from pyro_lvm.configured import Configured
from pyro_lvm.nn.shapes import as_sizes, check_input

__all__ = ["LabelHead"]


class LabelHead(Configured, nn.Module):
    """One label per datum, ``p(y = c) = softmax(raw)_c``, for integers 0 to C - 1.

    The events of `CategoricalHead` are vectors of such values; this one has no event dimension, so
    that y has the shape of the batch and can be enumerated.

    Args:
        num_classes: C, at least 2.

    Raises:
        ValueError: If there are fewer than two classes.
        TypeError: If it is not an integer.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        (num_classes,) = as_sizes("num_classes", num_classes)
        check_positive("num_classes", num_classes, minimum=2)
        self.num_classes = num_classes
        # what a network has to make: the parameters of one value
        self.event_shape, self.params_per_value = (1,), num_classes

    def forward(self, raw: Tensor) -> dist.Distribution:
        """Turn raw network output into a distribution over labels.

        Args:
            raw: ``batch x C``.

        Returns:
            A Categorical with batch shape ``batch``.

        Raises:
            TypeError: If ``raw`` is not of a floating point type.
            ValueError: If ``raw`` ends in another size.
        """
        check_input("raw", raw, (self.num_classes,))
        return dist.Categorical(logits=raw)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return str(self.num_classes)
