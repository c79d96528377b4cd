"""Lightning's strategies: which of them can train a pair, and where each process works."""

import os
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["check_strategy", "device_of_process", "distributed_settings"]


def distributed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a trainer, where "ddp" allows parameters that a step leaves without a gradient.

    A pair often has some, such as those of a branch that it does not take.
    """
    if settings.get("strategy") == "ddp" or _chooses_ddp(settings):
        return {**settings, "strategy": "ddp_find_unused_parameters_true"}
    return dict(settings)


def device_of_process(target: torch.device, settings: Mapping[str, Any]) -> torch.device:
    """The device of this process, if it is one of several on the CUDA devices of a machine."""
    devices = settings.get("devices", 1)
    if target.type != "cuda" or devices == 1:
        return target
    from lightning.pytorch.accelerators import CUDAAccelerator

    indices = CUDAAccelerator.parse_devices(-1 if devices == "auto" else devices) or [0]
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return torch.device("cuda", indices[local_rank % len(indices)])


def _chooses_ddp(settings: Mapping[str, Any]) -> bool:
    """Whether Lightning itself will choose "ddp", for the number of devices that is asked for."""
    devices = settings.get("devices", 1)
    several = len(devices) if isinstance(devices, list | tuple) else devices
    more_than_one = isinstance(several, int) and several > 1
    return settings.get("strategy", "auto") == "auto" and (
        more_than_one or settings.get("num_nodes", 1) > 1
    )


def check_strategy(trainer: Any) -> None:
    """Refuse a strategy of several processes that do not all come back from the fit.

    Raises:
        ValueError: If it is one.
    """
    from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    strategy = trainer.strategy
    if not isinstance(strategy, ParallelStrategy):
        return
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        got = "one whose processes are forked or spawned, and keep what they have trained"
    elif not isinstance(strategy, DDPStrategy):
        got = f"{type(strategy).__name__}, in which no process has all parameters"
    else:
        return
    raise ValueError(
        f"Expected a strategy that starts the script once for every process, 'ddp' or a "
        f"DDPStrategy(); got {got}. Write the fit into a script, and pass "
        f"trainer={{'strategy': 'ddp', 'devices': {trainer.num_devices}}}."
    )
