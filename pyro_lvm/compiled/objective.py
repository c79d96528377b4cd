"""The loss of any objective for any pair: what training differentiates, and by whose rates."""

from collections.abc import Iterable
from typing import Any

import torch
from pyro.infer import ELBO, TraceGraph_ELBO
from torch import Tensor, nn

from pyro_lvm.pair import Program, device_of, modules_of, no_guide

__all__ = ["check_differentiable", "loss_and_parts", "modules_of_objective", "with_own_rates"]


def check_differentiable(elbo: object) -> None:
    """Refuse what is no objective, or one without a loss to differentiate.

    Raises:
        TypeError: If it is such.
    """
    has_loss = hasattr(elbo, "differentiable_loss") or isinstance(elbo, TraceGraph_ELBO)
    if not isinstance(elbo, ELBO) or not has_loss:
        name = elbo.__name__ if isinstance(elbo, type) else type(elbo).__name__
        raise TypeError(
            f"Expected elbo to be an instance of a pyro.infer.ELBO with a differentiable loss; got "
            f"{name}. Use TraceInfo_ELBO(), Trace_ELBO(), TraceEnum_ELBO() or the like."
        )


def loss_and_parts(
    elbo: ELBO,
    model: Program,
    guide: Program | None,
    args: tuple = (),
    kwargs: dict | None = None,
    *,
    parts: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of an objective, and its parts where it reports them.

    Args:
        elbo: An objective with a differentiable loss, or ``TraceGraph_ELBO``.
        model: The model.
        guide: The guide, or None.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        parts: Whether to ask for parts.

    Returns:
        The loss in nats over all data, a scalar, differentiable if gradients are enabled; and its
        parts by name, nats per datum.
    """
    programs, kwargs = (model, no_guide if guide is None else guide), kwargs or {}
    with device_of(args, kwargs):
        if parts and hasattr(elbo, "loss_and_parts"):
            return elbo.loss_and_parts(*programs, *args, **kwargs)
        if not torch.is_grad_enabled():
            return torch.as_tensor(elbo.loss(*programs, *args, **kwargs)), {}
        if hasattr(elbo, "differentiable_loss"):
            return elbo.differentiable_loss(*programs, *args, **kwargs), {}
        return _surrogate(elbo, *programs, args, kwargs), {}


def modules_of_objective(elbo: Any) -> list[nn.Module]:
    """The modules that belong to an objective: its divergence, and the schedules of its weights."""
    schedules = getattr(elbo, "schedules", {})
    return modules_of(getattr(elbo, "divergence", None), *schedules.values())


def with_own_rates(
    elbo: Any, parameters: Iterable[Tensor]
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Parameters for an optimiser, and a further group of those that have a rate of their own.

    A divergence with a ``learning_rate`` that is not None has one for its ``own_parameters``, which
    are all that it has if it does not say.
    """
    divergence: Any = getattr(elbo, "divergence", None)
    rate = getattr(divergence, "learning_rate", None)
    parameters = list(parameters)
    if rate is None:
        return parameters, []
    names = {id(p) for p in getattr(divergence, "own_parameters", None) or divergence.parameters()}
    own = [p for p in parameters if id(p) in names]
    rest = [p for p in parameters if id(p) not in names]
    return rest, [{"params": own, "lr": rate}] if own else []


def _surrogate(elbo: Any, model: Program, guide: Program, args: tuple, kwargs: dict) -> Tensor:
    """The loss of ``TraceGraph_ELBO``, whose gradient is that of another scalar."""
    value, surrogate = elbo._loss_and_surrogate_loss(model, guide, args, kwargs)
    return surrogate - (surrogate + value).detach()
