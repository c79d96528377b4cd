"""Times of several programs that take turns, so that a busy machine is busy for all of them."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["ManySteps", "interleaved", "machine", "table", "versions"]

Step = Callable[[], Any]


@dataclass(frozen=True)
class ManySteps:
    """A call that takes several training steps."""

    call: Step
    num_steps: int

    def __call__(self) -> Any:
        """Take them, and return the losses."""
        return self.call()


def interleaved(
    steps: Mapping[str, Step], *, rounds: int = 15, seconds: float = 0.1, warm_up: int = 5
) -> dict[str, list[float]]:
    """Milliseconds per step of each program, one value per round.

    In every round each program is called as often as takes it some ``seconds``, and the next round
    starts one program later. What a call returns is waited for at the end of its turn, not in it,
    as a training loop would do.

    Args:
        steps: Name -> what takes a training step when it is called, or `ManySteps`.
        rounds: How many values.
        seconds: The least time of one turn.
        warm_up: Calls before anything is timed, compilation among them.

    Returns:
        Name -> milliseconds per step.
    """
    calls: dict[str, int] = {}
    for name, step in steps.items():
        _turn(step, warm_up)
        calls[name] = max(1, round(seconds * warm_up / _turn(step, warm_up)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for first in range(rounds):
        for name in names[first % len(names) :] + names[: first % len(names)]:
            taken = _turn(steps[name], calls[name])
            num_steps = calls[name] * getattr(steps[name], "num_steps", 1)
            times[name].append(1e3 * taken / num_steps)
    return times


def table(times: Mapping[str, Sequence[float]], baseline: str | None = None) -> str:
    """Medians with quartiles in milliseconds, and their ratios to the baseline's, fastest first."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    unit = medians[baseline] if baseline else min(medians.values())
    width = max(map(len, times))
    lines = [f"{'':{width}}  {'ms':>8}  {'quartiles':>17}  {'ratio':>6}"]
    for name in sorted(times, key=medians.__getitem__):
        low, _, high = statistics.quantiles(times[name], n=4)
        lines.append(
            f"{name:{width}}  {medians[name]:8.3f}  {low:8.3f} {high:8.3f}  "
            f"{medians[name] / unit:6.2f}"
        )
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores, threads and accelerator."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        cpu = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), cpu)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    threads = torch.get_num_threads()
    return ", ".join([f"{cpu}, {os.cpu_count()} cores, torch threads: {threads}", *devices])


def versions(*packages: str) -> str:
    """Python's version, and those of the packages that are there."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def _turn(step: Step, calls: int) -> float:
    """Seconds that so many calls take."""
    start = time.perf_counter()
    for _ in range(calls):
        result = step()
    _wait(result)
    return time.perf_counter() - start


def _wait(result: Any) -> None:
    if hasattr(result, "block_until_ready"):  # JAX returns before it has computed
        result.block_until_ready()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
