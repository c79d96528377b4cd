"""Plain values and tensors in one file: written whole or not at all, read without running code."""

import os
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["atomic", "read", "remove_parts", "write"]

_FORMAT, _VERSION = "pyro_lvm pair", 1
_PART = ".part"
_A_FILE = "a file that lvm.save has written"


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A file to write to that takes its place at ``path`` once it is complete and on the disk.

    If the block raises, what was at ``path`` stays there. If the process is killed in it, the part
    that was written stays beside it, see `remove_parts`.

    Raises:
        OSError: If it can't be written.
    """
    target = Path(path).resolve()  # a link stays one
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_PART}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_parts(directory: Path) -> None:
    """Delete what killed processes left half-written in a folder that nobody writes to now."""
    for part in directory.glob(f".*{_PART}"):
        part.unlink(missing_ok=True)


def write(contents: dict[str, Any], path: str | os.PathLike) -> None:
    """Write plain values and tensors.

    Raises:
        ValueError: If ``path`` can't be written to, or there are values that could not be read.
    """
    target = Path(path).resolve()
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"Expected the path of a file in an existing folder; got {path}.")
    with atomic(path) as file:
        torch.save({"format": _FORMAT, "version": _VERSION, **contents}, file)
        file.flush()
        read(file.name)  # what can't be read never takes the place of what can


def read(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what `write` has written, with all tensors on ``device``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, not written by `write`, or written by a later version.
    """
    _check_whole(path)
    try:
        contents = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # there is no end to what a damaged file makes of a parser
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"Expected {_A_FILE}; got {path}: {first_line}") from error
    if not isinstance(contents, dict) or contents.get("format") != _FORMAT:
        raise ValueError(
            f"Expected {_A_FILE}; got {path}, written otherwise. If it holds a state_dict, use "
            f"torch.load and load_state_dict."
        )
    if contents["version"] > _VERSION:
        raise ValueError(
            f"Expected a file of format version {_VERSION} at most; got {contents['version']} in "
            f"{path}. Update pyro_lvm."
        )
    return contents


def _check_whole(path: str | os.PathLike) -> None:
    """Refuse a damaged file; torch does not compare the checksums that it writes."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb"):  # raises if it is not there
            raise ValueError(f"Expected {_A_FILE}; got {path}, cut short or of another kind.")
    try:
        with zipfile.ZipFile(path) as file:
            # torch takes an entry for a folder by its attributes, and has no values then
            folders = (entry.filename for entry in file.infolist() if entry.external_attr)
            damaged = file.testzip() or next(folders, None)
    except Exception as error:
        raise ValueError(f"Expected {_A_FILE}; got {path}, damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"Expected {_A_FILE}; got {path}, damaged in {damaged!r}.")


def _sync_directory(directory: Path) -> None:
    """Make a renaming last; systems that can't open a directory have no need to."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
