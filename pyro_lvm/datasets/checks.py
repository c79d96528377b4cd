"""Checks that the data sets share: a file is there, rows have the right width."""

from pathlib import Path

from torch import Tensor

from pyro_lvm.checks import check_data

__all__ = ["check_features", "check_file"]


def check_file(file: Path, layout: str) -> None:
    """Refuse a file that is missing, and say where under the user's path it belongs.

    Raises:
        FileNotFoundError: If it is missing.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected the file {layout} under the path that is given; there is no {file}."
        )


def check_features(x: Tensor, num_features: int) -> None:
    """Refuse what is not ``N x num_features``.

    Raises:
        TypeError: If ``x`` is no tensor of a floating point type.
        ValueError: If it has another shape or is not finite.
    """
    check_data("x", x, ndim=2, floating=True)
    if x.shape[1] != num_features:
        raise ValueError(f"Expected x of shape N x {num_features}; got {tuple(x.shape)}.")
