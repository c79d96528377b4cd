"""Fit a VAE to a file that is larger than the memory that the fit takes.

Five megabytes by default; ``--rows 8000000`` makes a file of 2 GB.
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import pyro_lvm as lvm

FEATURES, LATENTS = 64, 4
NOISE = 0.5
PIECE = 1 << 16  # rows that are mapped together, 16 MB


class MappedRows(Dataset):
    """The rows of a file of float32 numbers, read when they are asked for.

    The file is mapped piece by piece, and only while a batch is read. The system maps the
    neighbours of a row with it, so that a mapping of all rows that is kept for long, or that many
    rows are read from, comes to hold the whole file.
    """

    def __init__(self, path: Path, features: int) -> None:
        self.path, self.features = path, features
        self.num_rows = path.stat().st_size // (4 * features)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> Tensor:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> Tensor:
        """Several rows, ``B x features``."""
        wanted = np.asarray(rows)
        batch = np.empty((len(rows), self.features), np.float32)
        for piece in np.unique(wanted // PIECE):
            here = wanted // PIECE == piece
            batch[here] = self.mapped(piece * PIECE)[wanted[here] - piece * PIECE]
        return torch.from_numpy(batch)

    def mapped(self, start: int) -> np.memmap:
        """A piece of the file, ``PIECE x features`` or what is left of it."""
        shape = (min(PIECE, self.num_rows - start), self.features)
        offset = int(start) * 4 * self.features
        return np.memmap(self.path, np.float32, "r", offset=offset, shape=shape)


def write_rows(path: Path, rows: int) -> None:
    """Rows x = A z + noise, of which only a part is in memory at a time."""
    generator = np.random.default_rng(0)
    loading = generator.normal(size=(LATENTS, FEATURES)) / 2
    with path.open("wb") as file:
        for start in range(0, rows, 100_000):
            z = generator.normal(size=(min(100_000, rows - start), LATENTS))
            x = z @ loading + NOISE * generator.normal(size=(len(z), FEATURES))
            x.astype(np.float32).tofile(file)


def peak_memory() -> float:
    """The most memory that this process has had so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.f32"
        write_rows(path, options.rows)
        before = peak_memory()
        torch.manual_seed(0)
        encoder = lvm.nn.MLP(FEATURES, [64], head=lvm.nn.NormalHead(LATENTS))
        decoder = lvm.nn.MLP(LATENTS, [64], head=lvm.nn.NormalHead(FEATURES))
        vae = lvm.VAE(encoder, decoder)
        fit = lvm.fit(
            vae.model,
            vae.guide,
            MappedRows(path, FEATURES),
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=0,
        )
        print(fit)
        print(f"{path.stat().st_size / 1e6:.0f} MB of data")
        print(f"{peak_memory():.0f} MB of memory at most, {peak_memory() - before:.0f} for the fit")


if __name__ == "__main__":
    main()
