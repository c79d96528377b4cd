"""The modules and parameters of programs."""

import functools
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import _context_wrap
from torch import Tensor, nn

from pyro_lvm.pair.programs import Program, device_of, no_guide, untouched_random_state

__all__ = ["declared_by", "modules_of", "parameters_of"]


def modules_of(*programs: Any) -> list[nn.Module]:
    """The modules that programs belong to: themselves, or the owners of bound methods.

    Modules that a plain function closes over can't be seen from outside; `parameters_of` finds what
    such a function declares by ``pyro.module`` or ``pyro.param`` when it is run.
    """
    modules: list[nn.Module] = []
    for program in programs:
        while isinstance(program, functools.partial):
            # a handler of Pyro's holds the program that it wraps as an argument
            program = program.args[1] if program.func is _context_wrap else program.func
        owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
        if isinstance(owner, nn.Module) and not any(owner is m for m in modules):
            modules.append(owner)
    return modules


def parameters_of(
    model: Program, guide: Program | None, args: tuple = (), kwargs: dict | None = None
) -> list[Tensor]:
    """All leaf tensors that training the pair changes, each once.

    They are the parameters of the modules that the pair belongs to, then what a run of the pair
    declares by ``pyro.param`` and ``pyro.module`` (unconstrained, as an optimiser needs them).

    Args:
        model: The model.
        guide: The guide, or None.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.

    Returns:
        The parameters that require a gradient, in a fixed order.
    """
    declared = declared_by(model, guide, args, kwargs).values()
    owned = [p for module in modules_of(model, guide) for p in module.parameters()]
    unique = {id(p): p for p in [*owned, *declared] if p.requires_grad}
    return list(unique.values())


def declared_by(
    model: Program, guide: Program | None, args: tuple = (), kwargs: dict | None = None
) -> dict[str, Tensor]:
    """What a run of the pair declares: name -> unconstrained leaf tensor, the guide's first.

    These are parameters from ``pyro.param`` and ``pyro.module``, and those of a ``PyroModule`` that
    the run has read. The arguments are those of `parameters_of`.
    """
    guide = no_guide if guide is None else guide
    kwargs = kwargs or {}
    with (
        poutine.trace(param_only=True) as capture,
        poutine.block(hide_types=["sample"]),
        untouched_random_state(args, kwargs),
        device_of(args, kwargs),
        torch.enable_grad(),
    ):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        poutine.replay(model, trace=guide_trace)(*args, **kwargs)
    return {name: _unconstrained(site["value"]) for name, site in capture.trace.nodes.items()}


def _unconstrained(value: Tensor) -> Tensor:
    """The leaf tensor behind a parameter's value, as SVI finds it."""
    unconstrained = getattr(value, "unconstrained", None)
    return value if unconstrained is None else unconstrained()
