"""What a run finds around it and leaves as it was: modes, devices, signals, loggers."""

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from pyro_lvm.pair import at_rest
from pyro_lvm.training.schedules import placed_parameters

if TYPE_CHECKING:
    from pyro_lvm.training.lightning import PairModule

__all__ = ["evaluating", "interrupted", "moved", "quiet_lightning"]


def interrupted(train: Callable[[], None]) -> bool:
    """Whether Ctrl-C ended a run. Lightning would leave the program, and ignore later signals."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if in_main_thread else None
    try:
        train()
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            return True
        raise
    except KeyboardInterrupt:
        return True
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)
    return False


@contextmanager
def evaluating(modules: list[nn.Module]) -> Iterator[torch.device | None]:
    """Modules in evaluation mode, as `at_rest` has them; yields where they are."""
    with at_rest(modules):
        yield next((p.device for p in placed_parameters(modules)), None)


@contextmanager
def moved(module: "PairModule", target: torch.device) -> Iterator[None]:
    """The pair's parameters on a device, and afterwards back where each was, ready to evaluate."""
    homes = {id(t): t.device for t in module.tensors.all}
    home = module.tensors.device  # of what comes later
    module.owners.train()
    try:
        for t in module.tensors.all:
            t.data = t.data.to(target)
        yield
    finally:
        for t in module.tensors.all:
            t.data = t.data.to(homes.get(id(t), home or t.device))
        for p in module.trained:
            p.grad = None  # of no use any more, and on the other device
        module.owners.eval()


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's remarks about devices, loggers, loaders and the end of the epochs."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*lightning.*")
        try:
            yield
        finally:
            logger.setLevel(level)
