"""What the benchmarks have found, as Markdown: ratios first, and the times that they come from."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.timing import table

__all__ = ["RATIOS", "Ratio", "Timed", "ratios", "times"]


@dataclass(frozen=True)
class Timed:
    """Milliseconds of several programs that did the same.

    Attributes:
        title: What they did.
        times: Name -> one value per round.
        baseline: The one that ratios in the table refer to.
    """

    title: str
    times: dict[str, list[float]]
    baseline: str

    def ratio(self, ours: str, theirs: str) -> float:
        """The median of the ratios within a round, whose programs meet the same machine."""
        pairs = zip(self.times[ours], self.times[theirs], strict=True)
        return statistics.median(a / b for a, b in pairs)


@dataclass(frozen=True)
class Ratio:
    """A comparison, and the most that we want it to be.

    Attributes:
        title: Of the `Timed`, or its beginning.
        ours: A name in it.
        theirs: Another one.
        wanted: The largest ratio that is good enough.
    """

    title: str
    ours: str
    theirs: str
    wanted: float


_STEP, _STEPS = "pyro_lvm_step", "pyro_lvm_10_steps"
RATIOS = [
    *(
        Ratio(f"vae, batch {size}", _STEP, theirs, wanted)
        for size in (128, 512)
        for theirs, wanted in {
            "handwritten_compiled": 1.10,
            "pyro_svi": 0.5 if size == 128 else 1.0,
            "numpyro_jit": 1.0,
            "pythae": 1.0,
        }.items()
    ),
    *(
        Ratio(title, ours, theirs, wanted)
        for title in ("factor analysis", "mixture")
        for ours in (_STEP, _STEPS)
        for theirs, wanted in {"numpyro_jit": 0.5, "numpyro_scan": 0.6, "pyro_svi": 0.15}.items()
    ),
    *(
        Ratio("regression", ours, theirs, wanted)
        for ours in (_STEP, _STEPS)
        for theirs, wanted in {"numpyro_jit": 1.0, "pyro_svi": 0.1}.items()
    ),
    *(
        Ratio(title, _STEP, theirs, wanted)
        for title in ("IWAE, pathwise", "IWAE, DReG", "semi-supervised")
        for theirs, wanted in {
            "handwritten_compiled": 1.15,
            "handwritten_onednn": 1.15,
            "pyro_svi": 1.0,
        }.items()
    ),
    Ratio("objectives, batch 512", "MMD", "ELBO", 1.25),
    Ratio("an epoch", "fit", "bare_loop", 1.10),
    Ratio("SVI, 20,000", _STEP, "pyro_svi", 0.2),
    Ratio("EM, 20,000", "pyro_lvm", "scikit-learn", 0.25),
    Ratio("EM, 20,000", "pyro_lvm", "pomegranate", 0.5),
    Ratio("importance sampling", "pyro_lvm", "bare_loop", 1 / 0.7),
    Ratio("importance sampling", "pyro_lvm", "pythae", 1 / 2.5),
    Ratio("vae on CUDA, batch 128", _STEP, "handwritten_cuda_graph", 1.10),
    Ratio("vae on CUDA, batch 128", _STEP, "pyro_svi", 0.1),
]
"""What is compared."""


def ratios(found: Sequence[Timed]) -> str:
    """A table of the ratios that can be made of what was found."""
    lines = ["| what | ours | beside | ratio | wanted |", "|---|---|---|---|---|"]
    for ratio in RATIOS:
        for timed in found:
            if timed.title.startswith(ratio.title) and {ratio.ours, ratio.theirs} <= set(
                timed.times
            ):
                value = timed.ratio(ratio.ours, ratio.theirs)
                wanted = f"<= {ratio.wanted:.3g}{'' if value <= ratio.wanted else ', missed'}"
                names = f"{ratio.ours} | {ratio.theirs}"
                lines.append(f"| {timed.title} | {names} | {value:.2f} | {wanted} |")
    return "\n".join(lines)


def times(timed: Timed) -> str:
    """A table of medians and quartiles."""
    return f"{timed.title}, ms\n\n```\n{table(timed.times, timed.baseline)}\n```"
