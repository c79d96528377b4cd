"""Time this library beside others, and print ratios and times as Markdown.

    python -m benchmarks                                  # everything, some 35 minutes
    python -m benchmarks steps mixtures --rounds 7
    python -m benchmarks family objectives --out benchmarks/results  # writes objectives.md
    python -m benchmarks marginal --out benchmarks/results  # writes marginal.md
    python -m benchmarks growth --out benchmarks/results  # writes growth.md and growth.png there
    python -m benchmarks cuda --out benchmarks/results    # on a CUDA device; writes cuda.md

Whatever is compared takes turns, so that a busy machine is busy for all. Pyro's validation is off,
as NumPyro's is by default.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import torch

from benchmarks import growth
from benchmarks.epochs import epochs
from benchmarks.family import family
from benchmarks.marginal import marginal
from benchmarks.mixtures import mixtures
from benchmarks.objectives import objectives
from benchmarks.peers import PEERS, built, on_cuda
from benchmarks.report import Timed, ratios, times
from benchmarks.timing import interleaved, machine, versions

_PACKAGES = (
    "torch",
    "pyro-ppl",
    "lightning",
    "numpyro",
    "jax",
    "pythae",
    "scikit-learn",
    "pomegranate",
)
_OF_STEPS = """A ratio is the median of those within a round, in which all programs take turns.

Our steps are kernels and random draws that Python starts one after the other, some microseconds
each, ten steps in a call too. `numpyro_scan` runs a hundred steps as one loop of machine code: for
the smallest models that is all the difference."""
_OF_OBJECTIVES = """A ratio is the median of those within a round, in which all programs take turns.

`handwritten_onednn` is the hand-written loss through our compiler: beside it, what a pair costs
shows without what faster matrix products gain. In the largest batch, divergences over all pairs of
draws are compared in Python, in blocks, so that the whole step runs there."""
_OF_MARGINAL = """A ratio is the median of those within a round, in which all programs take turns.

`bare_loop` draws z, decodes and sums the likelihood, and is no estimate yet; it and pythae's
`get_nll` run in several sizes of their chunks, and the fastest of these is the one to be beside."""
_REMARKS = {"objectives": _OF_OBJECTIVES, "marginal": _OF_MARGINAL}
_OF_GROWTH = """Steepest is the largest factor in time over the factor in size between two
neighbours. Above 1 it is likely that of memory: what a step works on no longer fits into the
processor's caches.

![Time over size, beside lines that are linear](growth.png)"""


def steps(rounds: int) -> Iterator[Timed]:
    """A training step of each problem in all libraries."""
    for problem, peers in PEERS.items():
        yield Timed(problem, interleaved(built(peers), rounds=rounds), "pyro_svi")


def _mixtures(rounds: int) -> Iterator[Timed]:
    for num_data in (20_000, 100_000):
        yield from mixtures(num_data, min(rounds, 7))


def _cuda(rounds: int) -> Iterator[Timed]:
    for batch_size in (128, 512):
        steps = built(on_cuda(batch_size), device="cuda")
        title = f"vae on CUDA, batch {batch_size}"
        yield Timed(title, interleaved(steps, rounds=rounds), "pyro_svi")


_SECTIONS: dict[str, Callable[[int], Iterator[Timed]]] = {
    "steps": steps,
    "family": family,
    "objectives": objectives,
    "epochs": lambda rounds: iter([epochs(rounds=rounds)]),
    "mixtures": _mixtures,
    "marginal": marginal,
    "cuda": _cuda,
}
_PAGES = {
    "family": "objectives",
    "objectives": "objectives",
    "marginal": "marginal",
    "cuda": "cuda",
}
_ON_CPU = [*(name for name in _SECTIONS if name != "cuda"), "growth"]


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*_SECTIONS, "growth"]
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=15, help="how many times of each")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores to use")
    parser.add_argument("--out", type=Path, help="a folder to write into")
    settings = parser.parse_args()
    unknown = set(settings.sections) - set(names)
    if unknown:
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there are {names}")
    torch.set_num_threads(settings.threads)
    if hasattr(os, "sched_setaffinity"):  # for JAX, which has no number of threads to set
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings.threads])
    pyro.enable_validation(False)
    _run(settings.sections or _ON_CPU, settings.rounds, settings.out)


def _run(sections: list[str], rounds: int, out: Path | None) -> None:
    """Print results as they come, and write pages of them."""
    head = f"{machine()}\n\n{versions(*_PACKAGES)}"
    print(head, flush=True)
    pages: dict[str, list[Timed]] = {}
    for section in sections:
        for timed in _SECTIONS[section](rounds) if section in _SECTIONS else ():
            pages.setdefault(_PAGES.get(section, "cpu"), []).append(timed)
            print(f"\n{times(timed)}", flush=True)
    for page, found in pages.items():
        print(f"\n{ratios(found)}", flush=True)
        parts = ["# Times and ratios", head, "## Ratios", ratios(found), "## Remarks"]
        _write(out, page, [*parts, _REMARKS.get(page, _OF_STEPS), *map(times, found)])
    if "growth" in sections:
        grown = list(growth.growth())
        print(f"\n{growth.table(grown)}")
        _write(out, "growth", ["# Growth", head, growth.table(grown), _OF_GROWTH])
        if out is not None:
            growth.plot(grown, out / "growth.png")


def _write(out: Path | None, name: str, parts: list[str]) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
