"""Discrete values whose entries come one after the other."""

from collections.abc import Generator
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["Autoregressive", "AutoregressiveNetwork"]


class AutoregressiveNetwork(Protocol):
    """What `Autoregressive` asks of a network, such as `nn.PixelCNN`.

    The ``D`` entries of a value are in the order of the flattened event. The raw numbers of an
    entry, ``P``, are those of its distribution given the entries before it: one logit of the value
    1 if there are two categories, and K unnormalised log-probabilities if there are more.
    """

    def logits(self, value: Tensor, context: Tensor | None) -> Tensor:
        """The raw numbers of all entries at once.

        Args:
            value: ``B x event``.
            context: ``B x F``, or None.

        Returns:
            ``B x D x P``.
        """

    def steps(
        self, num_values: int, context: Tensor | None
    ) -> Generator[Tensor, Tensor | None, None]:
        """The raw numbers of one entry after the other.

        Args:
            num_values: ``B``, how many values are drawn side by side.
            context: ``B x F``, or None.

        Yields:
            ``B x P``, of the first entry, and then, whenever it is sent an entry ``B``, of the next
            one given all that it was sent.
        """


class Autoregressive(TorchDistribution):
    """Discrete values of which each entry depends on those before it.

        log p(x | c) = sum_d log p(x_d | x_1, ..., x_(d-1), c)

    The factors are Bernoullis, or categoricals of K levels, whose parameters a network computes:
    of a whole value in one pass, which is `log_prob`, and entry by entry, which is `sample`. The
    network may keep what it has computed from one step to the next.

    Nothing is known of an entry but given those before it: neither mean nor variance has a closed
    form, and entries that are missing can't be left out.

    Args:
        network: From values and context to the parameters of all entries, and of one after the
            other.
        event_shape: The shape of a value; its entries are in the order of ``flatten``.
        num_categories: K; with 2 the values are 0.0 and 1.0, with more the integers below K.
        context: What the values depend on besides, ``batch x F``.
        batch_shape: The shape of the batch if there is no context.
        validate_args: As in torch.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 - torch's interface

    def __init__(
        self,
        network: AutoregressiveNetwork,
        event_shape: torch.Size | tuple[int, ...],
        num_categories: int = 2,
        *,
        context: Tensor | None = None,
        batch_shape: torch.Size | tuple[int, ...] = torch.Size(),  # noqa: B008
        validate_args: bool | None = None,
    ) -> None:
        self.network, self.num_categories, self.context = network, num_categories, context
        batch = torch.Size(batch_shape) if context is None else context.shape[:-1]
        super().__init__(batch, torch.Size(event_shape), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> Any:
        """Zeros and ones, or the integers below K."""
        binary = self.num_categories == 2
        of_one = (
            constraints.boolean
            if binary
            else constraints.integer_interval(0, self.num_categories - 1)
        )
        return constraints.independent(of_one, len(self.event_shape))

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "Autoregressive":
        """The same distribution over more batch dimensions."""
        return Autoregressive(
            self.network,
            self.event_shape,
            self.num_categories,
            context=self._context_of(torch.Size(batch_shape)),
            batch_shape=batch_shape,
            validate_args=self._validate_args,
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of values ``... x event``, nats; one pass of the network."""
        if self._validate_args:
            self._validate_sample(value)
        rows = value.shape[: value.dim() - len(self.event_shape)]
        batch = torch.broadcast_shapes(rows, self.batch_shape)
        own = rows if self.context is None else batch  # without a context all particles are alike
        flat = value.expand(own + self.event_shape).reshape(-1, *self.event_shape)
        raw = self.network.logits(flat, self._rows_of_context(own))  # B x D x P
        log_prob = self._entries(raw).log_prob(flat.flatten(1)).sum(-1)
        return log_prob.reshape(own).expand(batch)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws, ``sample_shape x batch x event``; as many steps of the network as entries."""
        shape = self._extended_shape(torch.Size(sample_shape))
        rows = shape[: len(shape) - len(self.event_shape)]
        steps = self.network.steps(rows.numel(), self._rows_of_context(rows))
        entries: list[Any] = [None]
        for _ in range(self.event_shape.numel()):
            entries.append(self._draw(steps.send(entries[-1])))
        return torch.stack(entries[1:], -1).reshape(shape)

    @property
    def mean(self) -> Tensor:
        """Not known.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(_no_moment("mean"))

    @property
    def variance(self) -> Tensor:
        """Not known.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(_no_moment("variance"))

    def _entries(self, raw: Tensor) -> Any:
        """The distributions of entries given those before them, ``... x P`` -> ``...``."""
        if self.num_categories == 2:
            return dist.Bernoulli(logits=raw.squeeze(-1), validate_args=False)
        return dist.Categorical(logits=raw, validate_args=False)

    def _draw(self, raw: Tensor) -> Tensor:
        """One entry by the inverse of its distribution function, ``B x P`` -> ``B``.

        One uniform number for an entry, however its parameters were computed.
        """
        uniform = torch.rand_like(raw[:, 0])
        if self.num_categories == 2:
            return (uniform < raw[:, 0].sigmoid()).to(raw.dtype)
        below = raw.softmax(-1).cumsum(-1) <= uniform.unsqueeze(-1)
        return below[:, :-1].sum(-1)  # the last level has what is left, whatever rounding says

    def _context_of(self, batch: torch.Size) -> Tensor | None:
        if self.context is None:
            return None
        return self.context.expand(batch + self.context.shape[-1:])

    def _rows_of_context(self, batch: torch.Size) -> Tensor | None:
        context = self._context_of(batch)
        return None if context is None else context.reshape(-1, context.shape[-1])


def _no_moment(name: str) -> str:
    return (
        f"Expected a distribution with a known {name}; got an autoregressive one, whose {name} has "
        f"no closed form. Take draws: .sample((100,)).mean(0), or .sample() in its place."
    )
