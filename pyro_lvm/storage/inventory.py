"""Where the tensors of a pair are: in its modules, and in what a run of it declares."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_lvm.pair import Program, declared_by, modules_of, no_guide

__all__ = ["Inventory", "take_inventory"]


@dataclass(frozen=True)
class Inventory:
    """The tensors of a pair, themselves and not copies.

    Attributes:
        modules: "model", "guide" -> the module that the program belongs to, each module once.
        declared: Name -> the leaf tensor of a parameter that is declared elsewhere, by
            ``pyro.param`` or ``pyro.module``, and the buffers beside those.
        constraints: Name -> kind of the constraint of a declared parameter.
    """

    modules: dict[str, nn.Module]
    declared: dict[str, Tensor]
    constraints: dict[str, str]


def take_inventory(
    model: Program, guide: Program | None, args: tuple, kwargs: dict, *, run: bool
) -> Inventory:
    """List the tensors of a pair; without a run of it, those of its modules alone.

    Raises:
        ValueError: If the pair is to be run and does not take these arguments.
    """
    modules = _owners(model, guide)
    if not run:
        return Inventory(modules, {}, {})
    for program in (model, guide or no_guide):
        _check_arguments(program, args, kwargs)
    with _buffers_put_back() as called:
        leaves = declared_by(model, guide, args, kwargs)
    owned = {id(p) for module in modules.values() for p in module.parameters()}
    declared = {name: leaf for name, leaf in leaves.items() if id(leaf) not in owned}
    constraints = pyro.get_param_store()._constraints
    kinds = {n: type(constraints.get(n)).__name__.lstrip("_") for n in declared}
    return Inventory(modules, declared | _buffers_beside(declared, called), kinds)


def _owners(model: Program, guide: Program | None) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for role, program in (("model", model), ("guide", guide)):
        for module in modules_of(program):
            if all(module is not other for other in found.values()):
                found[role] = module
    return found


def _check_arguments(program: Program, args: tuple, kwargs: dict) -> None:
    try:
        inspect.signature(getattr(program, "forward", program)).bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"Expected args to run the pair on, since only a run shows what it declares; got "
            f"{len(args)}: {error}. Try args=(x,) with some data x."
        ) from error


@contextmanager
def _buffers_put_back() -> Iterator[list[nn.Module]]:
    """The modules that are called inside; what that does to their buffers is undone."""
    called: list[nn.Module] = []
    before: list[tuple[Tensor, Tensor]] = []

    def remember(module: nn.Module, _: Any) -> None:
        called.append(module)
        before.extend((b, b.detach().clone()) for b in module.buffers(recurse=False))

    hook = register_module_forward_pre_hook(remember)
    try:
        yield called
    finally:
        hook.remove()
        with torch.no_grad():
            for buffer, value in reversed(before):  # a module may be called more than once
                buffer.copy_(value)


def _buffers_beside(declared: dict[str, Tensor], called: list[nn.Module]) -> dict[str, Tensor]:
    """The buffers of layers that ``pyro.module`` declares, which leaves them out."""
    names = {id(leaf): name for name, leaf in declared.items()}
    found: dict[str, Tensor] = {}
    for module in called:
        for local, parameter in module.named_parameters(recurse=False):
            if id(parameter) in names:
                prefix = names[id(parameter)].removesuffix(local)
                buffers = module.named_buffers(recurse=False)
                found |= {prefix + name: buffer for name, buffer in buffers}
    return found
