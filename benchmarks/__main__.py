"""Time this library beside others, and print ratios and times as Markdown.

    python -m benchmarks                                  # everything, some 20 minutes
    python -m benchmarks steps mixtures --rounds 7
    python -m benchmarks growth --out benchmarks/results  # writes cpu.md and growth.png there
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
_REMARKS = """Our steps are kernels and random draws that Python starts one after the other, some
microseconds each, ten steps in a call too. `numpyro_scan` runs a hundred steps as one loop of
machine code: for the smallest models that is all the difference.

Growth: `steepest` is the largest factor in time over the factor in size between two neighbours. It
is above 1 where what a step works on no longer fits into the processor's caches."""


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
    "objectives": lambda rounds: iter([objectives(rounds=rounds)]),
    "epochs": lambda rounds: iter([epochs(rounds=rounds)]),
    "mixtures": _mixtures,
    "cuda": _cuda,
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
    text = _run(settings.sections or _ON_CPU, settings.rounds, settings.out)
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
        name = "cuda" if settings.sections == ["cuda"] else "cpu"
        (settings.out / f"{name}.md").write_text(text)


def _run(sections: list[str], rounds: int, out: Path | None) -> str:
    """Print results as they come; returns all of them as a page."""
    head = f"{machine()}\n\n{versions(*_PACKAGES)}"
    print(head, flush=True)
    found = []
    for section in sections:
        for timed in _SECTIONS[section](rounds) if section in _SECTIONS else ():
            found.append(timed)
            print(f"\n{times(timed)}", flush=True)
    parts = ["# Times and ratios", head]
    if found:
        parts += ["## Ratios of medians", ratios(found)]
        print(f"\n{parts[-1]}")
    if "growth" in sections:
        grown = list(growth.growth())
        parts += ["## Growth", growth.table(grown)]
        print(f"\n{parts[-1]}")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            growth.plot(grown, out / "growth.png")
            parts.append("![Time over size, beside lines that are linear](growth.png)")
    parts += ["## Remarks", _REMARKS]
    if found:
        parts += ["## Times", *map(times, found)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
