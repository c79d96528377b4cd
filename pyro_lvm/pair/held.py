"""Pairs whose runs have one and the same draw of the global latents."""

import torch
from pyro import poutine

from pyro_lvm.pair.programs import Program, device_of

__all__ = ["hold_globals"]


def hold_globals(
    model: Program,
    guide: Program,
    args: tuple = (),
    kwargs: dict | None = None,
    *,
    plate: str = "data",
) -> tuple[Program, Program]:
    """Let all runs of a pair have one draw of what lies outside of a plate, made here by the guide.

    Args:
        model: The model.
        guide: The guide; its auxiliary sites are held too.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        plate: Name of the data plate.

    Returns:
        Model and guide.
    """
    kwargs = kwargs or {}
    with torch.no_grad(), poutine.block(), device_of(args, kwargs):
        draws = poutine.trace(guide).get_trace(*args, **kwargs)
    for name, site in list(draws.nodes.items()):
        inside = any(frame.name == plate for frame in site.get("cond_indep_stack", ()))
        if site["type"] != "sample" or inside:
            draws.remove_node(name)
    return poutine.replay(model, trace=draws), poutine.replay(guide, trace=draws)
