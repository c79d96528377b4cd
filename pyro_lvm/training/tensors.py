"""The tensors that training a pair changes: parameters, early and late, and buffers."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_lvm.training.discovery import called_modules
from pyro_lvm.training.schedules import placed_parameters

__all__ = ["PairTensors"]


class PairTensors:
    """Parameters and buffers of a pair by name, wherever they live.

    They are those of the modules that the pair belongs to ("owners."), what else it declares in
    Pyro's param store ("param_store."), and the buffers of modules that it closes over, calls, and
    declares by ``pyro.module`` ("called.").

    Args:
        owners: The modules that the pair belongs to.
        declare: Runs the pair once, on a device if it is given one, and returns what it declares.

    Attributes:
        groups: What is trained, by name; parameters that came later are in groups of their own.
        loose: Parameters that none of the owners has, by name.
        first_values: The values with which the later ones came.
    """

    def __init__(
        self, owners: nn.Module, declare: Callable[[torch.device | None], Iterable[Tensor]]
    ) -> None:
        self.owners, self._declare = owners, declare
        self.groups: list[dict[str, Tensor]] = []
        self.loose: dict[str, Tensor] = {}
        self.first_values: dict[str, Tensor] = {}
        self._called: list[nn.Module] = []
        self.groups = [self._find()]

    @property
    def trained(self) -> dict[str, Tensor]:
        """All parameters that are trained, each once."""
        return {name: p for group in self.groups for name, p in group.items()}

    @property
    def all(self) -> list[Tensor]:
        """All tensors of the pair, frozen ones too."""
        return [*self.owners.parameters(), *self.owners.buffers(), *self.outside().values()]

    @property
    def device(self) -> torch.device | None:
        """Where the pair is, if it has tensors."""
        others = [*self.owners.buffers(), *self.outside().values()]
        return next((t.device for t in (*placed_parameters([self.owners]), *others)), None)

    def changing(self) -> dict[str, Tensor]:
        """All that training changes: what is trained, and buffers."""
        return {**self.trained, **dict(self.owners.named_buffers("owners")), **self._buffers()}

    def outside(self) -> dict[str, Tensor]:
        """What none of the owners has."""
        return {**self.loose, **self._buffers()}

    def not_finite(self) -> list[str]:
        """What the trained ones that are not finite are called in the pair."""
        return [_in_pair(n) for n, p in self.trained.items() if not torch.isfinite(p).all()]

    def are_finite(self) -> bool:
        """Whether all that is trained is finite."""
        return not self.not_finite()

    def take_in(self, names: Iterable[str]) -> list[Tensor]:
        """Take in what has got into the param store by these names, or into the owners, since.

        Returns:
            The new parameters.
        """
        store = dict(pyro.get_param_store().named_parameters())
        group = self._new(store[name] for name in names if name in store)
        if group:
            self.groups.append(group)
            self.first_values.update({n: p.detach().clone() for n, p in group.items()})
        return list(group.values())

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Give all that changes these values.

        What they lack came later, and gets the value with which it came.
        """
        values = {**self.first_values, **values}
        for name, target in self.changing().items():
            if name in values:
                target.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """What is known of the parameters beside their values."""
        names = [list(group) for group in self.groups]
        return {"groups": names, "first_values": self.first_values}

    def lacks(self, state: Mapping[str, Any]) -> bool:
        """Whether some of the parameters of a state are not known."""
        return not set().union(*state["groups"]) <= set(self.trained)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sort the same parameters into the same groups, in the same order."""
        trained = self.trained
        self.groups = [{n: trained[n] for n in names} for names in state["groups"]]
        self.first_values = {n: v.to(trained[n].device) for n, v in state["first_values"].items()}

    def find_again(self, state: Mapping[str, Any]) -> None:
        """Take in what a run of the pair declares now, and what the param store has of a state."""
        self.groups.append(self._find())
        self.take_in(n.removeprefix("param_store.") for names in state["groups"] for n in names)

    def _find(self) -> dict[str, Tensor]:
        """Run the pair, and return what it has that is not trained yet."""
        with called_modules() as called:
            declared = list(self._declare(self.device))
        new = self._new(declared)
        loose = {id(p) for p in self.loose.values()}
        self._called = [m for m in called if any(id(p) in loose for p in m.parameters())]
        return new

    def _new(self, declared: Iterable[Tensor]) -> dict[str, Tensor]:
        owned = dict(self.owners.named_parameters("owners"))
        known = {id(p) for p in (*owned.values(), *self.loose.values())}
        names = {id(p): name for name, p in pyro.get_param_store().named_parameters()}
        for p in declared:
            if id(p) not in known:
                self.loose[f"param_store.{names.get(id(p), len(self.loose))}"] = p
        trained = {id(p) for p in self.trained.values()}
        found = {**owned, **self.loose}
        return {n: p for n, p in found.items() if p.requires_grad and id(p) not in trained}

    def _buffers(self) -> dict[str, Tensor]:
        """The buffers of modules that the pair closes over, calls and trains."""
        owned = {id(b) for b in self.owners.buffers()}
        found = nn.ModuleList(self._called).named_buffers("called")
        return {name: b for name, b in found if id(b) not in owned}


def check_same_tensors(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse the state of another pair.

    Args:
        mine: The state of this module.
        theirs: That of a checkpoint.

    Raises:
        ValueError: If names or shapes differ.
    """
    here, there = _shapes(mine), _shapes(theirs)
    different = [
        f"'{name}' {there.get(name, 'missing')} instead of {here.get(name, 'none')}"
        for name in {**here, **there}
        if here.get(name) != there.get(name)
    ]
    if different:
        raise ValueError(
            f"Expected a checkpoint of this pair; got one with {', '.join(different[:5])}"
            f"{' and more' * (len(different) > 5)}. Use the pair that it was written for; what "
            f"that pair declares only in a later call must be declared before."
        )


def _in_pair(name: str) -> str:
    """What a pair calls the tensor that has a name here."""
    name = re.sub(r"^(owners\.\d+|called\.\d+|param_store)\.", "", name)
    return name.removesuffix("_unconstrained")


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    tensors = {**state, **state.get("_extra_state", {})}
    return {name: tuple(t.shape) for name, t in tensors.items() if isinstance(t, Tensor)}
