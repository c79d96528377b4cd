"""The IDX format, in which MNIST comes: arrays of bytes, each in a file of its own."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["read_idx"]


def read_idx(file: Path, ndim: int) -> Tensor:
    """The bytes of an IDX file: a magic number, the sizes (big-endian), then the values."""
    content = _read_bytes(file)
    header = 4 * (1 + ndim)
    magic = 0x0800 + ndim  # 08: unsigned bytes; then the rank
    if len(content) < header or int.from_bytes(content[:4], "big") != magic:
        raise ValueError(
            f"Expected {file} to begin with the IDX magic number {magic}; got "
            f"{int.from_bytes(content[:4], 'big')}. Fetch it again."
        )
    shape = np.frombuffer(content, ">u4", count=ndim, offset=4).tolist()
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"Expected {math.prod(shape)} values in {file} for its shape {tuple(shape)}; got "
            f"{len(content) - header}. Fetch it again."
        )
    return torch.tensor(np.frombuffer(content, np.uint8, offset=header)).reshape(shape)


def _read_bytes(file: Path) -> bytes:
    packed = file.with_name(f"{file.name}.gz")
    if file.is_file():
        return file.read_bytes()
    if not packed.is_file():
        raise FileNotFoundError(
            f"Expected {file} or {packed.name} beside it; got neither. The files of MNIST belong "
            f"in the folder MNIST/raw under the path that is given, as torchvision lays them out."
        )
    try:
        return gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"Expected {packed} to be gzipped; got: {error}. Fetch it again."
        ) from error
