"""Heads: the last step of a network, from raw numbers to a distribution."""

import math
from collections.abc import Sequence
from typing import Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pyro_lvm.checks import check_positive
from pyro_lvm.configured import Configured
from pyro_lvm.distributions import ContinuousBernoulli
from pyro_lvm.nn.shapes import as_sizes, check_input, raw_shape

__all__ = ["BernoulliHead", "CategoricalHead", "ContinuousBernoulliHead", "Head", "NormalHead"]


class Head(Configured, nn.Module):
    """What the heads share: sizes, the check of the input, and the event dimensions."""

    def __init__(self, event_shape: int | Sequence[int], params_per_value: int) -> None:
        super().__init__()
        self.event_shape = as_sizes("event_shape", event_shape)
        self.params_per_value = params_per_value

    def forward(self, raw: Tensor) -> dist.Distribution:
        """Turn raw network output into a distribution.

        Args:
            raw: ``batch x (params_per_value * event_shape[0]) x event_shape[1:]``.

        Returns:
            A distribution with batch shape ``batch`` and event shape ``event_shape``.

        Raises:
            TypeError: If ``raw`` is not of a floating point type.
            ValueError: If ``raw`` ends in other sizes.
        """
        check_input("raw", raw, raw_shape(self))
        # batch x params_per_value x event_shape
        sizes = (self.params_per_value, self.event_shape[0])
        params = raw.unflatten(-len(self.event_shape), sizes)
        return self._per_value(params).to_event(len(self.event_shape))

    def _per_value(self, params: Tensor) -> dist.Distribution:
        raise NotImplementedError

    def _unpack(self, params: Tensor) -> tuple[Tensor, ...]:
        return params.unbind(-len(self.event_shape) - 1)  # each batch x event_shape

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"event_shape={self.event_shape}"


class NormalHead(Head):
    """Independent normals, ``prod_d N(x_d; loc_d, scale_d^2)``.

    The location is the first half of the raw output. The scale is one of

    * ``"learned"``: ``floor + softplus(r)`` with ``r`` the second half of the raw output;
    * ``"shared"``: ``floor + softplus(r)`` with ``r`` a free parameter of shape ``event_shape``,
      the same for every input, such that the scale is 1 at the start (or barely above ``floor``
      where that is 1 or more);
    * a number: that number, and no floor.

    Softplus and not ``exp``, since its slope is at most 1 and it can't overflow: one large raw
    value gives a wide normal, not an infinite one. The floor bounds the density, and so the
    likelihood of continuous data, from above: with ``floor=0`` a scale can shrink to nothing around
    a datum.

    Args:
        event_shape: Shape of one event.
        scale: Where the standard deviation comes from.
        floor: Least standard deviation when it is learned, in the units of the event.

    Raises:
        ValueError: If a size or a fixed scale is not positive, the floor is negative, or ``scale``
            is an unknown word.
        TypeError: If a size is not an integer, or ``scale`` is neither a word nor a number.
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        scale: Literal["learned", "shared"] | float = "learned",
        floor: float = 1e-4,
    ) -> None:
        super().__init__(event_shape, params_per_value=2 if scale == "learned" else 1)
        _check_scale(scale)
        check_positive("floor", floor, minimum=0.0)
        self.scale = scale
        self.floor = floor
        if scale == "shared":
            start = _inverse_softplus(max(1.0 - floor, 1e-3))
            self.raw_scale = nn.Parameter(torch.full(self.event_shape, start))

    def _per_value(self, params: Tensor) -> dist.Distribution:
        loc, *rest = self._unpack(params)
        return dist.Normal(loc, self._scale(loc, *rest))

    def _scale(self, loc: Tensor, raw: Tensor | None = None) -> Tensor:
        if isinstance(self.scale, str):
            return self.floor + F.softplus(self.raw_scale if raw is None else raw)
        return loc.new_full((), self.scale)  # filled on the device: no copy from the host

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"event_shape={self.event_shape}, scale={self.scale!r}, floor={self.floor}"


class BernoulliHead(Head):
    """Independent Bernoullis, ``p(x_d = 1) = sigmoid(raw_d)``, for binary values.

    Args:
        event_shape: Shape of one event.

    Raises:
        ValueError: If a size is not positive.
        TypeError: If a size is not an integer.
    """

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape, params_per_value=1)

    def _per_value(self, params: Tensor) -> dist.Distribution:
        (logits,) = self._unpack(params)
        return dist.Bernoulli(logits=logits)


class CategoricalHead(Head):
    """Independent categoricals, ``p(x_d = k) = softmax(raw_d)_k``, for values 0 to K - 1.

    Each value of the event has its own K probabilities (256 for grey levels of a byte), and events
    hold integers: a discrete likelihood, whose log-probabilities are not to be compared with the
    log-densities of a continuous one.

    Args:
        event_shape: Shape of one event.
        num_categories: K, at least 2.

    Raises:
        ValueError: If a size is not positive, or there are fewer than two categories.
        TypeError: If a size is not an integer.
    """

    def __init__(self, event_shape: int | Sequence[int], num_categories: int) -> None:
        (num_categories,) = as_sizes("num_categories", num_categories)
        check_positive("num_categories", num_categories, minimum=2)
        super().__init__(event_shape, params_per_value=num_categories)
        self.num_categories = num_categories

    def _per_value(self, params: Tensor) -> dist.Distribution:
        logits = params.movedim(-len(self.event_shape) - 1, -1)  # batch x event_shape x K
        return dist.Categorical(logits=logits)

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"event_shape={self.event_shape}, num_categories={self.num_categories}"


class ContinuousBernoulliHead(Head):
    """Independent continuous Bernoullis, for grey values in [0, 1].

        p(x_d) = exp(l_d x_d) l_d / (exp(l_d) - 1),    l = raw

    The normalised form of the Bernoulli that is often put on grey values, and so a density, whose
    log may be compared with that of other densities. Value, mean, draws and their gradients are
    exact at every logit, 0 and the largest ones included. (``pyro.distributions`` has this
    distribution too, in terms of a probability that float32 rounds: from ``|l| = 16`` on, where
    black and white pixels lead, its density no longer integrates to 1 and its gradient has the
    wrong limit.)

    Args:
        event_shape: Shape of one event.

    Raises:
        ValueError: If a size is not positive.
        TypeError: If a size is not an integer.

    Reference:
        Loaiza-Ganem and Cunningham 2019, "The continuous Bernoulli", arXiv 1907.06845; their
        parameter is ``sigmoid(l)``.
    """

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape, params_per_value=1)

    def _per_value(self, params: Tensor) -> dist.Distribution:
        (logits,) = self._unpack(params)
        return ContinuousBernoulli(logits)


def _check_scale(scale: str | float) -> None:
    if isinstance(scale, str):
        if scale not in ("learned", "shared"):
            raise ValueError(
                f"Expected scale to be 'learned', 'shared' or a positive number; got {scale!r}."
            )
    elif not isinstance(scale, (int, float)):
        raise TypeError(
            f"Expected scale to be 'learned', 'shared' or a positive number; got "
            f"{type(scale).__name__}."
        )
    else:
        check_positive("scale", scale)


def _inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))
