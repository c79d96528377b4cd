"""What our models share: a name of their own in Pyro's param store."""

import itertools
from typing import Any

from pyro.nn import PyroModule

from pyro_lvm.configured import Configured

__all__ = ["Model"]

_count = itertools.count(1)


class Model(Configured, PyroModule):
    """A ``PyroModule`` whose parameters no other model of the process shares by accident.

    Pyro identifies parameters by name. Each model here gets a root name of its own, and so does one
    that was copied deeply or unpickled: it starts from equal values and is trained apart. Its
    ``state_dict`` is complete before the first run too.
    """

    def __init__(self) -> None:
        super().__init__(_new_name(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        old_name, new_name = self._pyro_name, _new_name(self)
        for module in self.modules():
            if isinstance(module, PyroModule):
                module._pyro_name = new_name + module._pyro_name.removeprefix(old_name)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._set_up_guide()
        super()._save_to_state_dict(*args, **kwargs)

    def _set_up_guide(self) -> None:
        """Make the parameters that a guide would make at its first run, if there are any."""


def _new_name(model: Model) -> str:
    return f"{type(model).__name__.lower()}_{next(_count)}"
