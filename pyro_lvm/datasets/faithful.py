"""The Old Faithful geyser: two numbers for each eruption, in two clusters."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_lvm.checks import check_data
from pyro_lvm.datasets.checks import check_file

__all__ = ["old_faithful"]


def old_faithful(path: str | Path) -> Tensor:
    """Eruptions of the Old Faithful geyser, from ``path/faithful/faithful.csv``.

    Args:
        path: The folder that holds ``faithful``.

    Returns:
        ``272 x 2`` (float64): duration of an eruption, waiting time to the next, in minutes.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is not a header and 272 rows of two numbers.
    """
    file = Path(path) / "faithful" / "faithful.csv"
    check_file(file, "faithful/faithful.csv")
    try:
        x = np.genfromtxt(file, delimiter=",", skip_header=1, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"Expected 272 rows of two numbers in {file}; got: {error}") from error
    if x.shape != (272, 2):
        raise ValueError(f"Expected 272 rows of two numbers in {file}; got {x.shape}.")
    return check_data(str(file), torch.from_numpy(x))
