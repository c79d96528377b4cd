"""Classes whose instances remember the arguments that made them."""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

__all__ = ["Configured", "Forgotten", "UnwritableError", "arguments_of"]


class Configured:
    """A base of modules that can be built again from what they were made of.

    A constructor needs nothing for it: those of all subclasses are wrapped, and the arguments of
    the outermost one are kept. An attribute that has the name of an argument has to be something
    that the constructor takes for it. Your own networks get this by
    ``class Net(lvm.Configured, nn.Module)``.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", _remembering(vars(cls)["__init__"]))  # noqa: B010


class Forgotten(str):
    """What an argument looked like that was not kept: a function."""

    __slots__ = ()


class UnwritableError(TypeError):
    """An argument that can't be written down, and so not be built again."""


def arguments_of(instance: Configured) -> dict[str, Any]:
    """The constructor's arguments by name.

    An attribute with the name of an argument comes before what was given, so that a network that
    was replaced since counts as it is now.

    Raises:
        UnwritableError: If the constructor was given arguments that have no name.
    """
    args, kwargs = vars(instance).get("_arguments", ((), {}))
    signature = inspect.signature(type(instance))
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()  # they may change, and what was made by them does not
    given = bound.arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL and given.pop(name):
            raise UnwritableError(f"*{name} of {type(instance).__name__}")
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name)
    held = vars(instance) | vars(instance).get("_modules", {})
    return {name: held.get(name, value) for name, value in given.items()}


def _remembering(init: Callable) -> Callable:
    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self).__init__ is wrapper:  # not when a subclass calls its parent's
            kept = tuple(map(_keep, args)), {name: _keep(v) for name, v in kwargs.items()}
            vars(self)["_arguments"] = kept
        init(self, *args, **kwargs)

    return wrapper


def _keep(value: Any) -> Any:
    """A lambda that were kept would keep its owner from being pickled."""
    return Forgotten(repr(value)) if isinstance(value, FunctionType | MethodType) else value
