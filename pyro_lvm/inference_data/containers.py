"""What differs between ArviZ 0.x and ArviZ 1, in one place."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Arrays", "Variable", "assemble", "import_arviz", "is_arviz_1", "to_numpy"]

Variable = tuple[tuple[str, ...], np.ndarray]  # dimensions, values
Arrays = dict[str, Variable]


def assemble(groups: Mapping[str, Arrays], attributes: Mapping[str, dict[str, Any]]) -> Any:
    """Groups of variables as ArviZ's container."""
    import xarray

    datasets = {
        name: xarray.Dataset(
            dict(arrays),
            coords={
                dim: np.arange(size)
                for dims, values in arrays.values()
                for dim, size in zip(dims, values.shape, strict=True)
            },
            attrs={"inference_library": "pyro_lvm", **attributes.get(name, {})},
        )
        for name, arrays in groups.items()
        if arrays
    }
    if is_arviz_1():
        return xarray.DataTree.from_dict(datasets)
    return import_arviz().InferenceData(**datasets)


def import_arviz() -> Any:
    """ArviZ, imported where it is used, without its announcement of version 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def is_arviz_1() -> bool:
    """Whether ArviZ has xarray's ``DataTree`` in place of its ``InferenceData``."""
    return int(import_arviz().__version__.split(".")[0]) >= 1


def to_numpy(value: Tensor) -> np.ndarray:
    """A tensor's values, wherever it is."""
    return value.detach().cpu().numpy()
