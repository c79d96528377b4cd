"""Networks that end in a head."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_lvm.configured import Configured
from pyro_lvm.nn.shapes import as_image_shape, as_sizes, check_input, raw_shape

__all__ = ["MLP", "ConvDecoder", "ConvEncoder"]


class MLP(Configured, nn.Module):
    """A fully connected network that returns a distribution.

    Linear layers with an activation after each but the last, on the flattened input.

    Args:
        in_shape: Trailing shape of the input.
        hidden: Widths of the hidden layers; none for a linear map.
        head: What turns the raw output into a distribution.
        activation: Makes the activation of one layer, ``nn.ReLU`` say, without parentheses.

    Raises:
        ValueError: If a size is not positive.
        TypeError: If a size is not an integer, the head has no ``event_shape`` or
            ``params_per_value``, or the activation is not a maker of modules.
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        hidden: Sequence[int],
        *,
        head: nn.Module,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.in_shape = as_sizes("in_shape", in_shape)
        self.raw_shape = raw_shape(head)
        widths = [math.prod(self.in_shape), *as_sizes("hidden", hidden, least=0)]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), _activate(activation)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(self.raw_shape)))
        self.head = head

    def forward(self, x: Tensor) -> dist.Distribution:
        """Return the distribution at ``x``.

        Args:
            x: ``batch x in_shape``.

        Returns:
            A distribution with batch shape ``batch`` and the event shape of the head.

        Raises:
            TypeError: If ``x`` is not of a floating point type.
            ValueError: If ``x`` does not end in ``in_shape``.
        """
        check_input("x", x, self.in_shape)
        raw = self.layers(x.flatten(-len(self.in_shape)))
        return self.head(raw.unflatten(-1, self.raw_shape))


class ConvEncoder(Configured, nn.Module):
    """Images to a distribution: strided convolutions, then one linear layer.

    Every convolution (3 x 3, stride 2, padding 1) turns H x W into ceil(H / 2) x ceil(W / 2), so
    any H and W will do.

    Args:
        in_shape: C x H x W of one image.
        channels: Channels after each convolution, at least one.
        head: What turns the raw output into a distribution.
        activation: Makes the activation of one layer, ``nn.ReLU`` say, without parentheses.

    Raises:
        ValueError: If ``in_shape`` does not have three sizes, or a size is not positive.
        TypeError: If a size is not an integer, the head has no ``event_shape`` or
            ``params_per_value``, or the activation is not a maker of modules.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        channels: Sequence[int],
        *,
        head: nn.Module,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.in_shape = as_image_shape("in_shape", in_shape)
        self.raw_shape = raw_shape(head)
        depth = [self.in_shape[0], *as_sizes("channels", channels)]
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(depth):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1), _activate(activation)]
        smallest = _halvings(self.in_shape[1:], len(depth) - 1)[-1]
        fan_in, fan_out = depth[-1] * math.prod(smallest), math.prod(self.raw_shape)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(fan_in, fan_out))
        self.head = head

    def forward(self, x: Tensor) -> dist.Distribution:
        """Return the distribution at ``x``.

        Args:
            x: ``batch x C x H x W``.

        Returns:
            A distribution with batch shape ``batch`` and the event shape of the head.

        Raises:
            TypeError: If ``x`` is not of a floating point type.
            ValueError: If ``x`` does not end in ``in_shape``.
        """
        check_input("x", x, self.in_shape)
        raw = self.layers(x.reshape(-1, *self.in_shape))
        return self.head(raw.reshape(x.shape[:-3] + self.raw_shape))


class ConvDecoder(Configured, nn.Module):
    """Vectors to a distribution over images: one linear layer, then upsampling convolutions.

    The mirror of :class:`ConvEncoder`: the sizes are those of its halvings, backwards, so any H and
    W will do. The linear layer makes ``channels[0] x h x w``, and each of the ``len(channels)``
    transposed convolutions doubles h and w. Their kernel, 4 x 4, is a multiple of the stride, so
    that every pixel is made from equally many weights (Odena et al. 2016, "Deconvolution and
    checkerboard artifacts").

    Args:
        in_features: Size of the vectors.
        channels: Channels before each convolution, at least one.
        head: What turns the raw output into a distribution; its event shape is C x H x W.
        activation: Makes the activation of one layer, ``nn.ReLU`` say, without parentheses.

    Raises:
        ValueError: If the head's event shape does not have three sizes, or a size is not positive.
        TypeError: If a size is not an integer, the head has no ``event_shape`` or
            ``params_per_value``, or the activation is not a maker of modules.
    """

    def __init__(
        self,
        in_features: int,
        channels: Sequence[int],
        *,
        head: nn.Module,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.in_shape = as_sizes("in_features", in_features)
        raw = raw_shape(head)
        as_image_shape("event_shape of the head", cast(Any, head.event_shape))
        depth = [*as_sizes("channels", channels), raw[0]]
        sizes = _halvings(raw[1:], len(depth) - 1)[::-1]  # from the smallest up
        first = (depth[0], *sizes[0])
        layers: list[nn.Module] = [
            nn.Linear(self.in_shape[0], math.prod(first)),
            nn.Unflatten(-1, first),
        ]
        for fan_in, fan_out, size in zip(depth[:-1], depth[1:], sizes[1:], strict=True):
            layers += [_activate(activation), _upsample(fan_in, fan_out, size)]
        self.layers = nn.Sequential(*layers)
        self.head = head

    def forward(self, z: Tensor) -> dist.Distribution:
        """Return the distribution at ``z``.

        Args:
            z: ``batch x in_features``.

        Returns:
            A distribution with batch shape ``batch`` and event shape C x H x W.

        Raises:
            TypeError: If ``z`` is not of a floating point type.
            ValueError: If ``z`` does not end in ``in_features``.
        """
        check_input("z", z, self.in_shape)
        raw = self.layers(z.reshape(-1, *self.in_shape))
        return self.head(raw.reshape(z.shape[:-1] + raw.shape[1:]))


def _upsample(fan_in: int, fan_out: int, size: tuple[int, ...]) -> nn.Module:
    """A transposed convolution to H x W from ceil(H / 2) x ceil(W / 2).

    From n pixels a side it makes 2 n + 2 - 2 padding + output_padding: 2 n with (1, 0) and, where
    the size is odd, 2 n - 1 with (2, 1).
    """
    odd = (size[0] % 2, size[1] % 2)
    padding = (1 + odd[0], 1 + odd[1])
    return nn.ConvTranspose2d(fan_in, fan_out, 4, stride=2, padding=padding, output_padding=odd)


def _halvings(size: tuple[int, ...], times: int) -> list[tuple[int, ...]]:
    """``size`` and what is left of it after each halving, rounded up."""
    sizes = [size]
    for _ in range(times):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    return sizes


def _activate(activation: Callable[[], nn.Module]) -> nn.Module:
    layer = None if isinstance(activation, nn.Module) else activation()
    if not isinstance(layer, nn.Module):
        raise TypeError(
            f"Expected activation to make an nn.Module when called; got {activation!r}. "
            f"Try nn.ReLU, or functools.partial(nn.LeakyReLU, 0.2)."
        )
    return layer
