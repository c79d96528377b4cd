"""The values of a pair's tensors: copied, compared with those of a file, and put back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lvm.storage.inventory import Inventory

__all__ = ["adopt_types", "check_alike", "put_back", "values_of"]


def values_of(inventory: Inventory) -> dict[str, Any]:
    """Copies of all values, on the CPU and in plain containers, and the modes of the modules."""
    states = {role: module.state_dict() for role, module in inventory.modules.items()}
    for state in states.values():
        for name, value in state.items():
            state[name] = _copy(value)
    return {
        "states": states,
        "declared": {name: _copy(tensor) for name, tensor in inventory.declared.items()},
        "constraints": inventory.constraints,
        "modes": {role: _modes(module) for role, module in inventory.modules.items()},
    }


def check_alike(inventory: Inventory, values: Mapping[str, Any]) -> None:
    """Refuse values of other names, shapes, types or constraints than the pair has.

    Raises:
        ValueError: If there are any; it names them all.
    """
    states = {role: module.state_dict() for role, module in inventory.modules.items()}
    here = _described(states, inventory.declared, inventory.constraints)
    there = _described(values["states"], values["declared"], values["constraints"])
    changed = [name for name in here if there.get(name, here[name]) != here[name]]
    problems = {
        "only in the pair": [name for name in here if name not in there],
        "only in the file": [name for name in there if name not in here],
        "not alike": [f"{n}, {there[n]} in the file and {here[n]} in the pair" for n in changed],
    }
    if any(problems.values()):
        lines = [f"\n  {kind}: {'; '.join(names)}" for kind, names in problems.items() if names]
        raise ValueError(
            f"Expected a pair with the parameters and buffers of the file; got{''.join(lines)}\n"
            f"Build the pair as it was when it was saved. Nothing was loaded."
        )


def put_back(inventory: Inventory, values: Mapping[str, Any]) -> None:
    """Copy values that are alike into a pair, and set its modules to their modes."""
    for role, module in inventory.modules.items():
        module.load_state_dict(values["states"][role])
        training = values["modes"][role]["training"]
        for name, child in module.named_modules():
            child.training = training.get(name, child.training)
    with torch.no_grad():
        for name, tensor in inventory.declared.items():
            tensor.copy_(values["declared"][name])


def adopt_types(module: nn.Module, modes: Mapping[str, Any], device: str | torch.device) -> None:
    """Give the tensors of a new module a device, and the types that they had when it was saved.

    In place, since constraints and Pyro's param store hold on to the tensors themselves.
    """
    for name, tensor in _tensors(module).items():
        tensor.data = tensor.data.to(device, modes["dtypes"].get(name, tensor.dtype))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in modes["frozen"])


def _modes(module: nn.Module) -> dict[str, Any]:
    return {
        "training": {name: child.training for name, child in module.named_modules()},
        "dtypes": {name: tensor.dtype for name, tensor in _tensors(module).items()},
        "frozen": [name for name, p in module.named_parameters() if not p.requires_grad],
    }


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that are not in the ``state_dict`` included."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _described(
    states: Mapping[str, Mapping[str, Any]],
    declared: Mapping[str, Tensor],
    constraints: Mapping[str, str],
) -> dict[str, str]:
    """Name -> what has to be the same for a value to be copied."""
    return {
        f"{role}.{name}": _kind(value)
        for role, state in states.items()
        for name, value in state.items()
    } | {
        f"pyro.param {name!r}": f"{_kind(value)} {constraints.get(name, '')}".rstrip()
        for name, value in declared.items()
    }


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {value.dtype}"


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value
