"""A pair to a file, and a file to a pair."""

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch

from pyro_lvm.configured import UnwritableError
from pyro_lvm.models.base import Model
from pyro_lvm.pair import Program, modules_of, untouched_random_state
from pyro_lvm.storage.configuration import read_records, write_records
from pyro_lvm.storage.files import read, write
from pyro_lvm.storage.inventory import Inventory, take_inventory
from pyro_lvm.storage.state import adopt_types, check_alike, put_back, values_of

__all__ = ["load", "save"]

Pair = Model | tuple[Program, Program | None]


def save(
    pair: Pair,
    path: str | os.PathLike,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write a fitted pair to a file, whole or not at all.

    The file has the values of all parameters and buffers, the modes of the modules, and, for our
    models, the arguments that they were made of: ``load`` builds these again. Any other pair,
    ``(model, guide)``, is run once, since only a run shows what it declares by ``pyro.param`` and
    ``pyro.module``; the run leaves buffers and random state as they were.

    Args:
        pair: One of our models, or ``(model, guide)``, the guide None if it samples nothing.
        path: The file. What was there before stays if this raises.
        args: Positional arguments to run the pair with, some data. Our models need none, unless
            their networks are functions that declare parameters.
        kwargs: Keyword arguments to run it with.

    Raises:
        TypeError: If ``pair`` is no pair.
        ValueError: If the pair does not take the arguments, or ``path`` can't be written to.

    Warns:
        UserWarning: If one of our models was made of something that can't be written, a function
            or a network of a class that is not `Configured`; ``load`` needs ``into`` then.
    """
    model, guide = _programs(pair)
    with untouched_random_state(tuple(args), dict(kwargs or {})):
        values = values_of(_inventory(model, guide, args, kwargs))
    write({**values, **_configuration(_whole(model, guide))}, path)


def load(
    path: str | os.PathLike,
    *,
    into: Pair | None = None,
    classes: Iterable[type] = (),
    device: str | torch.device = "cpu",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Read a pair that ``save`` has written.

    No code from the file is run. Of a file with one of our models that model is built, by our
    constructors and those of ``classes``, equal to the one that was saved to the last bit. For any
    other pair give one that you built: its parameters, buffers and modes are set if they have the
    names, shapes, types and constraints of the file, and if one differs, nothing is.

    Args:
        path: The file.
        into: The pair to load into, if it is not to be built.
        classes: Your own `Configured` classes that the file may build.
        device: Where a pair that is built is put; one that is given stays where it is.
        args: Positional arguments to run the pair with, as in ``save``.
        kwargs: Keyword arguments to run it with.

    Returns:
        The model that was built, or ``into``.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``into`` is no pair.
        ValueError: If the file is damaged or not of ``save``, has nothing to build the model from,
            names a class that is not known, or does not fit the pair.
    """
    if into is not None:
        _programs(into)
    contents = read(path, device)
    with _no_trace_of_errors(), untouched_random_state(tuple(args), dict(kwargs or {})):
        pair = _build(contents, classes, device) if into is None else into
        inventory = _inventory(*_programs(pair), args, kwargs)
        check_alike(inventory, contents)
        put_back(inventory, contents)
    return pair


def _programs(pair: Any) -> tuple[Program, Program | None]:
    if isinstance(pair, Model):
        return pair.model, pair.guide
    if isinstance(pair, tuple) and len(pair) == 2 and callable(pair[0]):
        return pair
    raise TypeError(
        f"Expected one of our models or a tuple (model, guide); got {type(pair).__name__}. "
        f"Try (model, None) for a model alone."
    )


def _whole(model: Program, guide: Program | None) -> Model | None:
    """The model of ours whose methods the pair are."""
    for module in modules_of(model):
        if isinstance(module, Model) and (module.model, module.guide) == (model, guide):
            return module
    return None


def _inventory(
    model: Program,
    guide: Program | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
) -> Inventory:
    run = _whole(model, guide) is None or bool(args) or bool(kwargs)
    return take_inventory(model, guide, tuple(args), dict(kwargs or {}), run=run)


def _configuration(model: Model | None) -> dict[str, Any]:
    if model is None:
        return {"configuration": None, "unwritable": "it is a pair of your own"}
    try:
        return {"configuration": write_records(model), "unwritable": None}
    except UnwritableError as error:
        warnings.warn(
            f"The values are saved, but not what the {type(model).__name__} was made of, because "
            f"of {error}. Load it by lvm.load(path, into=model) into one that you build alike.",
            stacklevel=3,
        )
        return {"configuration": None, "unwritable": f"it was made of {error}"}


def _build(
    contents: Mapping[str, Any], classes: Iterable[type], device: str | torch.device
) -> Model:
    if contents["configuration"] is None:
        raise ValueError(
            f"Expected a model that can be built from the file; got none, since "
            f"{contents['unwritable']}. Build the pair and write lvm.load(path, into=pair)."
        )
    model = read_records(contents["configuration"], classes)
    if not isinstance(model, Model):
        raise ValueError(f"Expected a model in the file; got {type(model).__name__}.")
    adopt_types(model, contents["modes"]["model"], device)
    model.state_dict()  # makes what is made late, by now in these types
    adopt_types(model, contents["modes"]["model"], device)
    return model


@contextmanager
def _no_trace_of_errors() -> Iterator[None]:
    """If the block raises, forget the parameters that a run in it has declared."""
    store = pyro.get_param_store()
    before = set(store.keys())
    try:
        yield
    except BaseException:
        for name in set(store.keys()) - before:
            del store[name]
        raise
