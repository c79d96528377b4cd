"""Objects as plain records of what they were made of, and back."""

import functools
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_lvm.configured import Configured, UnwritableError, arguments_of
from pyro_lvm.storage.vocabulary import CONFIGURED, DISTRIBUTIONS, HANDED_OVER

__all__ = ["Records", "read_records", "write_records"]

Records = list[dict[str, Any]]
"""One record ``{"class": name, "arguments": {...}}`` per object, the whole last.

An argument is a number, a string, a tensor, a list or tuple of arguments, or one of
``{"object": index}``, ``{"mapping": {...}}`` and ``{"name": ...}``.
"""

_PARTIAL = "functools.partial"


def write_records(value: Configured) -> Records:
    """Records of an object and of all that it was made of.

    Raises:
        UnwritableError: If an argument is a function, or of a class that a file can't name.
    """
    writer = _Writer()
    writer.refer(value)
    return writer.records


def read_records(records: Records, classes: Iterable[type] = ()) -> Any:
    """Build the object that records describe, from classes that are known or given.

    Args:
        records: The records.
        classes: Further classes that may be built, found by their ``__qualname__``.

    Raises:
        ValueError: If a record names another class, or arguments that its class does not take.
    """
    known = {**CONFIGURED, _PARTIAL: _partial}
    known |= {name: kind for kind, (name, _) in DISTRIBUTIONS.items()}
    known |= {kind.__qualname__: kind for kind in classes}
    objects: list[Any] = []
    for record in records:
        maker = _find(record["class"], known)
        arguments = {name: _read(value, objects) for name, value in record["arguments"].items()}
        objects.append(_make(record["class"], maker, arguments))
    return objects[-1]


class _Writer:
    """Records in the order in which objects can be built; what comes twice is written once."""

    def __init__(self) -> None:
        self.records: Records = []
        self._index: dict[int, int] = {}

    def refer(self, value: Any) -> dict[str, Any]:
        if id(value) not in self._index:
            name, parts = _take_apart(value)
            arguments = {key: self.write(key, part) for key, part in parts.items()}
            self._index[id(value)] = len(self.records)
            self.records.append({"class": name, "arguments": arguments})
        return {"object": self._index[id(value)]}

    def write(self, name: str, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            return value.detach().cpu().clone()  # a clone: of a view, the whole would be saved
        if isinstance(value, numbers.Real):  # one of NumPy's
            return int(value) if isinstance(value, numbers.Integral) else float(value)
        if isinstance(value, list | tuple):
            items = [self.write(name, item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, Mapping):
            return {"mapping": {key: self.write(f"{name}[{key!r}]", v) for key, v in value.items()}}
        if isinstance(value, Configured | functools.partial) or type(value) in DISTRIBUTIONS:
            return self.refer(value)
        return {"name": _name_of(name, value)}


def _take_apart(value: Any) -> tuple[str, dict[str, Any]]:
    """The name of an object's class, and its arguments."""
    if isinstance(value, functools.partial):
        return _PARTIAL, {"function": value.func, "args": value.args, "keywords": value.keywords}
    if type(value) in DISTRIBUTIONS:
        name, arguments = DISTRIBUTIONS[type(value)]
        held = {"base_distribution": "base_dist"}  # where an attribute has another name
        return name, {key: getattr(value, held.get(key, key)) for key in arguments}
    ours = {kind: name for name, kind in CONFIGURED.items()}
    return ours.get(type(value), type(value).__qualname__), arguments_of(value)


def _name_of(argument: str, value: Any) -> str:
    for name, known in HANDED_OVER.items():
        if value is known:
            return name
    raise UnwritableError(f"{argument}={value!s}")


def _read(value: Any, objects: Sequence[Any]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_read(item, objects) for item in value)
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "object":
        return objects[content]
    if tag == "mapping":
        return {key: _read(item, objects) for key, item in content.items()}
    return _find(content, HANDED_OVER)


def _find(name: str, known: Mapping[str, Any]) -> Any:
    if name not in known:
        last = name.rpartition(".")[-1]
        raise ValueError(
            f"Expected classes that are known or given; got {name!r}. If you trust the file, "
            f"write lvm.load(path, classes=[{last}]) with your own class {last}."
        )
    return known[name]


def _make(name: str, maker: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return maker(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected arguments that {name} takes; got {sorted(arguments)}: {error} If its "
            f"constructor has changed, build the pair yourself: lvm.load(path, into=pair)."
        ) from error


def _partial(function: Callable, args: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    return functools.partial(function, *args, **keywords)
