"""Checkpoint files: written as a whole or not at all, checked when they are read.

A file is what ``torch.save`` writes, followed by a mark and the SHA-256 of all that precedes it.
``torch.load`` ignores the end, so that a checkpoint can be opened without this package.
"""

import hashlib
import warnings
from pathlib import Path
from typing import IO, Any, cast

import torch

from pyro_lvm.storage.files import atomic, remove_parts

__all__ = [
    "CheckpointError",
    "best_path",
    "has_checkpoints",
    "newest",
    "path_at",
    "prune",
    "read",
    "write",
]

_MARK = b"pyro_lvm"
_TRAILER = len(_MARK) + hashlib.sha256().digest_size
_CHUNK = 1 << 20  # bytes that are hashed at a time


class CheckpointError(ValueError):
    """A checkpoint that can't be read."""


def path_at(directory: Path, step: int) -> Path:
    """The file of the checkpoint after so many steps."""
    return directory / f"step-{step:010d}.pt"


def best_path(directory: Path) -> Path:
    """The file with the best epoch's parameters."""
    return directory / "best.pt"


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a state made of dicts, lists, tensors, numbers and strings.

    Whatever happens meanwhile, ``path`` is either what it was or the new state as a whole.

    Raises:
        OSError: If it can't be written; nothing is left behind then.
    """
    with atomic(path) as file:
        _save(state, file)


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint, on the CPU; nothing but plain data is ever unpickled.

    Raises:
        CheckpointError: If the file is not what was written.
    """
    if not _is_whole(path):
        raise CheckpointError(
            f"Expected a checkpoint as it was written in {path}; got a truncated or altered file, "
            f"whose checksum does not agree. Delete it; the one before it is used instead."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler has many ways to refuse
        raise CheckpointError(
            f"Expected plain data (tensors, numbers, strings, lists, dicts) in {path}; got "
            f"{type(error).__name__}: {error}"
        ) from error


def has_checkpoints(directory: Path) -> bool:
    """Whether there are any, good or bad."""
    return bool(_newest_first(directory))


def newest(directory: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint in a directory that can be read; a warning names those that can't.

    Returns:
        Its file and its state; None if there is no checkpoint.

    Raises:
        CheckpointError: If there are checkpoints, and none of them can be read.
    """
    failures = []
    for path in _newest_first(directory):
        try:
            state = read(path)
        except CheckpointError as error:
            failures.append(error)
            continue
        for failure in failures:
            warnings.warn(f"{failure} Going on from {path.name}.", stacklevel=3)
        return path, state
    if failures:
        raise CheckpointError(
            f"Expected a checkpoint that can be read in {directory}; got {len(failures)}, none of "
            f"which can. Start afresh in another directory. {failures[0]}"
        )
    return None


def prune(directory: Path, keep: int = 2) -> None:
    """Delete all checkpoints but the newest ones, and what a killed run left half-written."""
    for path in _newest_first(directory)[keep:]:
        path.unlink(missing_ok=True)
    remove_parts(directory)


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(state: dict[str, Any], file: IO[bytes]) -> None:
    hashing = _Hashing(file)
    try:
        torch.save(state, cast(IO[bytes], hashing))  # it writes and flushes: all that torch needs
    except RuntimeError as error:
        # torch's own complaint hides that of the file system
        raise hashing.error or error from None
    file.write(_MARK + hashing.hash.digest())


def _is_whole(path: Path) -> bool:
    left = path.stat().st_size - _TRAILER
    if left <= 0:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
        return file.read() == _MARK + digest.digest()


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*.pt"), reverse=True)
