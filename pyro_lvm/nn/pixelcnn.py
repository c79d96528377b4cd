"""Images pixel by pixel: a convolutional network that sees no pixel before its time."""

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pyro_lvm.checks import check_count, check_positive
from pyro_lvm.configured import Configured
from pyro_lvm.distributions import Autoregressive
from pyro_lvm.nn.shapes import as_sizes, check_input

__all__ = ["PixelCNN"]


class PixelCNN(Configured, nn.Module):
    """Images whose pixels depend on those above and to the left (gated PixelCNN).

        log p(x | z) = sum_d log p(x_d | x_1, ..., x_(d-1), z),    row by row, from left to right

    An exact density without latents, and the strongest of decoders with them: so strong that it may
    leave z unused.

    Two stacks of convolutions run side by side. The vertical one sees the rows above, the
    horizontal one what is to the left in the same row and, through a 1 x 1 convolution, the
    vertical one, so that no earlier pixel is out of sight for good. Each of the ``layers`` adds
    ``kernel_size // 2`` pixels to how far they see, upwards and to the sides; the first one looks
    ``(first_kernel_size + 1) // 2`` up and to the left. A layer ends in a gate:

        y = tanh(W_1 * x + V_1 z) sigmoid(W_2 * x + V_2 z)

    with z the context, the same at all pixels, and the horizontal stack adds its layers up.

    Convolutions treat all pixels alike but those that see a border. Where images have their content
    in the middle, as digits do, ``position_bias`` gives the gates of the first layer a learned
    number at every pixel, ``W_1 * x + V_1 z + b_(row, column)``, and the network knows where it is.

    Images are of one channel. Those of shape ``(H, W)`` are flat events of ``H * W`` pixels, rows
    of data as they often come; those of ``(1, H, W)`` are images.

    Args:
        image_shape: ``(H, W)`` for flat images, or ``(1, H, W)``.
        channels: Channels of each stack.
        layers: Layers of both stacks.
        context_features: ``F``, the size of the context; None for images without one.
        num_categories: Levels of a pixel, 0 to K - 1: with 2 it is a Bernoulli, with more a
            categorical (whose input is the level as a number).
        kernel_size: Width of the convolutions, odd.
        first_kernel_size: That of the first layer.
        position_bias: Whether the first layer has a bias for every pixel, zero at the start.

    Raises:
        ValueError: If a size is not positive, there are several channels of the image, fewer than
            two levels, or a kernel's size is even.
        TypeError: If a size is not an integer.

    Reference:
        van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves and Kavukcuoglu 2016, "Conditional
        image generation with PixelCNN decoders", arXiv 1606.05328, section 2 and figure 2.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: int = 32,
        layers: int = 6,
        *,
        context_features: int | None = None,
        num_categories: int = 2,
        kernel_size: int = 3,
        first_kernel_size: int = 7,
        position_bias: bool = False,
    ) -> None:
        super().__init__()
        self.event_shape, self.height, self.width = _shapes(image_shape)
        for name, value in (("channels", channels), ("layers", layers)):
            check_count(name, value)
        if context_features is not None:
            check_count("context_features", context_features)
        (self.num_categories,) = as_sizes("num_categories", num_categories)
        check_positive("num_categories", num_categories, minimum=2)
        sizes = [_odd("first_kernel_size", first_kernel_size)]
        sizes += [_odd("kernel_size", kernel_size)] * (layers - 1)
        depth = [1, *[channels] * (layers - 1)]
        self.image_shape, self.context_features = tuple(image_shape), context_features
        self.blocks: Any = nn.ModuleList(
            _Block(fan_in, channels, size, context_features)
            for fan_in, size in zip(depth, sizes, strict=True)
        )
        at_pixels = torch.zeros(4 * channels, self.height, self.width)
        self.position_bias = nn.Parameter(at_pixels) if position_bias else None
        per_pixel = 1 if num_categories == 2 else num_categories
        self.readout = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(),
            nn.Conv2d(channels, per_pixel, 1),
        )

    def forward(self, context: Tensor | None = None) -> Autoregressive:
        """Return the distribution of images.

        Args:
            context: ``batch x F``; None if there is none.

        Returns:
            A distribution with batch shape ``batch``, ``()`` without a context, and event shape
            ``H * W`` or ``1 x H x W``.

        Raises:
            TypeError: If the context is not of a floating point type.
            ValueError: If it does not end in ``F``, is missing, or is none that the network has.
        """
        if (context is None) != (self.context_features is None):
            raise ValueError(
                f"Expected {_named(self.context_features)}; got {_named(context)}. Call the "
                f"network as it was built, or build it with{'out' if context is None else ''} "
                f"context_features."
            )
        if context is not None:
            check_input("context", context, (int(self.context_features or 0),))
        return Autoregressive(self, self.event_shape, self.num_categories, context=context)

    def logits(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """The raw numbers of all pixels given those before them, in one pass.

        Args:
            value: Images, ``B x event``.
            context: ``B x F``, or None.

        Returns:
            ``B x (H * W) x P``, with ``P`` one logit or K of them.
        """
        x = self._scaled(value).reshape(-1, 1, self.height, self.width)
        v = F.pad(x, (0, 0, 1, -1))  # what a pixel sees above it: one row down
        h = F.pad(x, (1, -1))  # and to the left of it: one column to the right
        for block, (of_v, of_h) in zip(self.blocks, self._biases(context), strict=True):
            raw = block.vertical(block.padded_above(v))
            h = block.across(block.padded_left(h), h, block.link(raw) + of_h)
            v = _gate(raw + of_v)
        return self.readout(h).flatten(2).mT

    def steps(
        self, num_values: int, context: Tensor | None = None
    ) -> Generator[Tensor, Tensor | None, None]:
        """The raw numbers of one pixel after the other, each from what was kept of the others.

        A layer keeps the rows above and the pixels to the left that its convolutions see. The
        vertical stack runs once for every row, the horizontal one for every pixel, and all pixels
        together cost what one pass over the image does.

        Args:
            num_values: ``B``, images side by side.
            context: ``B x F``, or None.

        Yields:
            ``B x P`` for the first pixel, and, when it is sent the pixel ``B``, for the next one.
        """
        zero = self.blocks[0].link.weight.new_zeros(())
        biases = self._biases(context)
        above = [zero.expand(num_values, *block.above(self.width)) for block in self.blocks]
        row = zero.expand(num_values, 1, 1, self.width)  # the one above the image
        for i in range(self.height):
            of_row = [(_at_row(of_v, i), _at_row(of_h, i)) for of_v, of_h in biases]
            row = yield from self._steps_of_a_row(self._from_above(row, above, of_row))

    def _biases(self, context: Tensor | None) -> list[tuple[Any, Any]]:
        """What the gates of every layer's two stacks get of the context, and of where they are.

        Those are numbers, or of shape ``B x gates x 1 x 1``, ``1 x gates x H x W``, or both.
        """
        biases = [block.biases(context) for block in self.blocks]
        if self.position_bias is not None:
            of_v, of_h = self.position_bias[None].chunk(2, 1)
            biases[0] = biases[0][0] + of_v, biases[0][1] + of_h
        return biases

    def _from_above(
        self, row: Tensor, above: list[Tensor], biases: list[tuple[Any, Any]]
    ) -> list[Tensor]:
        """What each layer's gates get of the rows so far, ``B x gates x 1 x W``, for the next row.

        Args:
            row: The last row, ``B x 1 x 1 x W``.
            above: What each layer has kept of the rows before; moves on by one.
            biases: What each layer's gates get of the context and the place.
        """
        links, v = [], row
        for i, (block, (of_v, of_h)) in enumerate(zip(self.blocks, biases, strict=True)):
            above[i] = torch.cat([above[i][:, :, 1:], block.padded_sides(v)], 2)
            raw = block.vertical(above[i])
            links.append(block.link(raw) + of_h)
            v = _gate(raw + of_v)
        return links

    def _steps_of_a_row(self, links: list[Tensor]) -> Generator[Tensor, Tensor | None, Tensor]:
        """The steps of one row, which is what is returned in the end, ``B x 1 x 1 x W``."""
        zero = torch.zeros_like(links[0][:, :1, :, :1])
        left = [zero.expand(-1, *block.left()) for block in self.blocks]
        pixels = [zero]  # the one to the left of the image
        for column in range(self.width):
            h = pixels[-1]
            for i, block in enumerate(self.blocks):
                left[i] = torch.cat([left[i][..., 1:], h], -1)
                h = block.across(left[i], h, links[i][..., column : column + 1])
            pixel: Any = yield self.readout(h)[..., 0, 0]
            pixels.append(self._scaled(pixel).reshape(-1, 1, 1, 1))
        return torch.cat(pixels[1:], -1)

    def _scaled(self, value: Tensor) -> Tensor:
        """Levels from -1 to 1: the 0 of the padding is none of two, so that borders are seen."""
        return value.to(self.blocks[0].link.weight.dtype) * (2 / (self.num_categories - 1)) - 1

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return (
            f"image_shape={self.image_shape}, context_features={self.context_features}, "
            f"num_categories={self.num_categories}, position_bias={self.position_bias is not None}"
        )


class _Block(nn.Module):
    """One layer of both stacks. Its convolutions do not pad: images are, and windows need not be.

    Args:
        in_channels: Channels of the input, the image's if this is the first layer.
        channels: Channels of either stack.
        kernel_size: Width of the vertical convolution; the horizontal one has the left half of it
            and the pixel itself, the vertical one as many rows.
        context_features: Size of the context, if any.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, context_features: int | None
    ) -> None:
        super().__init__()
        self.reach, self.in_channels = kernel_size // 2, in_channels
        gates = 2 * channels
        self.vertical = nn.Conv2d(in_channels, gates, (self.reach + 1, kernel_size))
        self.horizontal = nn.Conv2d(in_channels, gates, (1, self.reach + 1))
        self.link = nn.Conv2d(gates, gates, 1)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.context = (
            None if context_features is None else nn.Linear(context_features, 2 * gates, bias=False)
        )

    def across(self, window: Tensor, before: Tensor, from_above: Tensor) -> Tensor:
        """The horizontal stack's layer: what is to the left, and from above, and the layers so far.

        Args:
            window: ``B x in x h x (reach + w)``.
            before: ``B x in x h x w``.
            from_above: ``B x gates x h x w``.

        Returns:
            ``B x channels x h x w``.
        """
        new = self.mix(_gate(self.horizontal(window) + from_above))
        return before + new  # the first layer's input, one channel, is added to all

    def biases(self, context: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """V z of the gates of the vertical and of the horizontal stack, ``B x gates x 1 x 1``."""
        if self.context is None:
            return 0.0, 0.0
        vertical, horizontal = self.context(context)[..., None, None].chunk(2, 1)
        return vertical, horizontal

    def padded_sides(self, v: Tensor) -> Tensor:
        """What the vertical stack sees of its own row."""
        return F.pad(v, (self.reach, self.reach))

    def padded_above(self, v: Tensor) -> Tensor:
        """What the vertical stack sees of an image: its own row, and those above."""
        return F.pad(v, (self.reach, self.reach, self.reach, 0))

    def padded_left(self, h: Tensor) -> Tensor:
        """What the horizontal stack sees of an image: the pixel, and those to the left."""
        return F.pad(h, (self.reach, 0))

    def above(self, width: int) -> tuple[int, ...]:
        """The shape of the rows that the vertical stack sees at a time."""
        return self.in_channels, self.reach + 1, width + 2 * self.reach

    def left(self) -> tuple[int, ...]:
        """The shape of the pixels that the horizontal stack sees at a time."""
        return self.in_channels, 1, self.reach + 1


def _at_row(bias: Any, row: int) -> Any:
    """A bias at one row of the image, if it differs from row to row."""
    differs = isinstance(bias, Tensor) and bias.shape[2] > 1
    return bias[:, :, row : row + 1] if differs else bias


def _gate(raw: Tensor) -> Tensor:
    value, gate = raw.chunk(2, 1)
    return value.tanh() * gate.sigmoid()


def _shapes(image_shape: Sequence[int]) -> tuple[tuple[int, ...], int, int]:
    """The shape of an event, and the height and width of an image."""
    sizes = as_sizes("image_shape", image_shape)
    if len(sizes) not in (2, 3):
        raise ValueError(
            f"Expected image_shape with two sizes, H x W, for flat images, or three, 1 x H x W; "
            f"got {sizes}."
        )
    if len(sizes) == 3 and sizes[0] != 1:
        raise ValueError(
            f"Expected images of one channel; got {sizes[0]} in image_shape={sizes}. The channels "
            f"of a pixel would have to come one after the other: make them grey, or rows of "
            f"an image of {sizes[0] * sizes[1]} x {sizes[2]}."
        )
    event = (sizes[0] * sizes[1],) if len(sizes) == 2 else sizes
    return event, sizes[-2], sizes[-1]


def _odd(name: str, size: int) -> int:
    check_count(name, size)
    if size % 2 == 0:
        raise ValueError(f"Expected {name} to be odd; got {size}. Try {size + 1}.")
    return size


def _named(context: object) -> str:
    return "no context" if context is None else "a context"
