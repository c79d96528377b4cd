"""What our objectives share: one estimate in all the forms that Pyro asks for."""

import itertools
from abc import abstractmethod
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import ELBO
from pyro.infer.elbo import ELBOModule
from pyro.infer.util import torch_item
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from pyro_lvm.infer.schedules import Schedule
from pyro_lvm.pair import PairStructure, Program, modules_of

__all__ = ["Call", "Objective"]

_count = itertools.count(1)


class Call(NamedTuple):
    """A pair and its arguments."""

    model: Program
    guide: Program | None
    args: tuple
    kwargs: dict


class Objective(ELBO):
    """A ``pyro.infer.ELBO`` that is one estimate, `_evaluate`, in several forms.

    Losses are negative objectives in nats over all data, to be minimised. What a pair is made of is
    looked at once for each kind of arguments, and kept.

    Args:
        divergence: A divergence that the objective compares samples by, or None.
        plate: Name of the data plate.
        **settings: As in ``pyro.infer.ELBO``.
    """

    def __init__(self, *, divergence: Any = None, plate: str = "data", **settings: Any) -> None:
        super().__init__(**settings)
        self.divergence, self.plate = divergence, plate
        self._prepared: dict[tuple, Any] = {}
        self._name: str | None = None

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules of the weights, by the names that weights have among the parts."""
        return {}

    def guide_of(self, model: Program, guide: Program | None) -> Program | None:
        """The guide that belongs to a model under this objective."""
        return guide

    def check_pair(
        self, model: Program, guide: Program | None, args: tuple = (), kwargs: dict | None = None
    ) -> PairStructure:
        """Refuse a pair that this objective has no meaning for, before any work starts.

        Returns:
            What the pair is made of.

        Raises:
            ValueError: What was expected, what came, which site, and the remedy.
        """
        return self._inspect(Call(model, guide, args, kwargs or {}))

    def __call__(self, model: Program, guide: Program) -> ELBOModule:
        """The loss of one pair as a module, which owns what the pair's bound methods belong to."""
        return _PairLoss(model, guide, self)

    def differentiable_loss(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> Tensor:
        """An estimate of the loss, in nats over all data, to be minimised by its gradient."""
        call = Call(model, guide, args, kwargs)
        return self._evaluate(call, differentiable=True, parts=False)[0]

    def loss_and_parts(
        self, model: Program, guide: Program, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts by name; the loss is differentiable if gradients are enabled.

        Returns:
            The loss, a scalar over all data, and the parts, which are per datum, in nats, and have
            no gradient: ``loss`` and what it is made of.
        """
        call = Call(model, guide, args, kwargs)
        return self._evaluate(call, differentiable=torch.is_grad_enabled(), parts=True)

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss, in nats over all data, without a gradient."""
        call = Call(model, guide, args, kwargs)
        with torch.no_grad():
            loss, _ = self._evaluate(call, differentiable=False, parts=False)
        return torch_item(loss)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> float:
        """An estimate of the loss; its gradient is added to that of the parameters."""
        self._declare_divergence()
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return torch_item(loss)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": {}, "_name": None}  # made again where it is needed

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError("The traces are drawn by the host.")

    @abstractmethod
    def _inspect(self, call: Call) -> PairStructure:
        """What `check_pair` does."""

    @abstractmethod
    def _evaluate(
        self, call: Call, *, differentiable: bool, parts: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over all data, with a gradient or not, and its parts if they are wanted."""

    def _prepared_for(self, call: Call) -> Any:
        """What `_prepare` makes of this pair and this kind of arguments, made once for each."""
        key = call.model, call.guide, _kinds(call.args, call.kwargs)
        if key not in self._prepared:
            if len(self._prepared) >= 16:  # programs made afresh for every call must not pile up
                self._prepared.clear()
            self._prepared[key] = self._prepare(self._inspect(call))
        return self._prepared[key]

    def _prepare(self, structure: PairStructure) -> Any:
        return structure

    def _declare_divergence(self) -> None:
        """Let what collects parameters, such as ``pyro.infer.SVI``, find the divergence's."""
        if am_i_wrapped() and isinstance(self.divergence, nn.Module):
            if self._name is None:
                self._name = f"divergence_{next(_count)}"
            pyro.module(self._name, self.divergence)


class _PairLoss(ELBOModule):
    """The loss of a pair as a module whose parameters are complete for bound methods too."""

    def __init__(self, model: Program, guide: Program, elbo: Objective) -> None:
        super().__init__(model, guide, elbo)
        owners = modules_of(model, guide, elbo.divergence, *elbo.schedules.values())
        self.owners = nn.ModuleList(owners)


def _kinds(args: tuple, kwargs: dict) -> tuple:
    """What decides about the structure of a run: which arguments are there, and their ranks.

    Those in lists and dicts count too (a label that is None), and so do flags and words.
    """
    leaves, layout = tree_flatten((args, kwargs))
    return layout, tuple(_kind(leaf) for leaf in leaves)


def _kind(leaf: Any) -> tuple:
    if isinstance(leaf, Tensor):
        return type(leaf), leaf.dim()
    return type(leaf), leaf if isinstance(leaf, bool | str) else None
