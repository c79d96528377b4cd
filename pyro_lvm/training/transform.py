"""Data that are drawn anew whenever they are trained on."""

from collections.abc import Callable
from typing import Any

from pyro.infer import ELBO
from torch import Tensor

from pyro_lvm.compiled.objective import loss_and_parts
from pyro_lvm.infer.schedules import Schedule
from pyro_lvm.pair import Program
from pyro_lvm.training.sources import as_batch

__all__ = ["Transform", "TransformedObjective", "transformed"]

Transform = Callable[..., Any]


def transformed(transform: Transform | None, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a pair sees of a training batch.

    Raises:
        TypeError: If the transform returns something other than tensors.
        ValueError: If it returns another number of data.
    """
    if transform is None:
        return batch
    seen = as_batch(transform(*batch), "what transform returns")
    if any(t.dim() == 0 or len(t) != len(batch[0]) for t in seen):
        raise ValueError(
            f"Expected transform to return tensors of {len(batch[0])} data, as many as it was "
            f"given; got shapes {[tuple(t.shape) for t in seen]}."
        )
    return seen


class TransformedObjective(ELBO):
    """An objective of data that are transformed first, by the same random numbers in one call.

    Args:
        elbo: The objective.
        transform: From the tensors of a batch to what model and guide are called with.
    """

    def __init__(self, elbo: ELBO, transform: Transform) -> None:
        super().__init__()
        self.elbo, self.transform = elbo, transform

    @property
    def divergence(self) -> Any:
        """The objective's own."""
        return getattr(self.elbo, "divergence", None)

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The objective's own."""
        return getattr(self.elbo, "schedules", {})

    def loss_and_parts(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the parts that the objective reports."""
        return self._evaluate(model, guide, args, kwargs, parts=True)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss, to be minimised by its gradient."""
        return self._evaluate(model, guide, args, kwargs, parts=False)[0]

    loss = differentiable_loss  # loss_and_parts asks the objective which of its own is meant

    def _evaluate(
        self, model: Program, guide: Program, args: tuple, kwargs: dict, *, parts: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        seen = transformed(self.transform, args)
        return loss_and_parts(self.elbo, model, guide, seen, kwargs, parts=parts)

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError("The traces are drawn by the objective.")
