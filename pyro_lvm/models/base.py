"""What our models share: a name of their own in Pyro's param store."""

import itertools
from typing import Any

from pyro.nn import PyroModule

__all__ = ["Model"]

_count = itertools.count(1)


class Model(PyroModule):
    """A ``PyroModule`` whose parameters no other model of the process shares by accident.

    Pyro identifies parameters by name. Each model here gets a root name of its own, and so does one
    that was copied deeply or unpickled: it starts from equal values and is trained apart.
    """

    def __init__(self) -> None:
        super().__init__(_new_name(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        old_name, new_name = self._pyro_name, _new_name(self)
        for module in self.modules():
            if isinstance(module, PyroModule):
                module._pyro_name = new_name + module._pyro_name.removeprefix(old_name)


def _new_name(model: Model) -> str:
    return f"{type(model).__name__.lower()}_{next(_count)}"
