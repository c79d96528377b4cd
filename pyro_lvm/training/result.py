"""What a run leaves behind."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Fit", "Stopped"]

Stopped = Literal[
    "all epochs", "no improvement", "interrupted", "loss not finite", "a callback or setting"
]


@dataclass(frozen=True)
class Fit:
    """What a run leaves behind; the fitted parameters are in the pair itself.

    Attributes:
        history: Name -> one mean per epoch, in nats per datum: "loss", its parts as the objective
            reports them, and each of them as "validation/..." on the validation data. Weights that
            change, such as "kl_weight", are there as well, as they were in force, and what
            callbacks have measured, as "latents/...".
        best_epoch: The epoch (from 0) whose parameters the pair now has: that of the least
            validation loss, or the last one without validation data; None if none was finished.
        stopped: Why the run ended.
        seconds: How long it took.
        num_parameters: How many numbers were trained.
        diagnosis: Where and why the loss was not finite; None if it always was.
        weights: The names in the history that are weights, and no nats.
    """

    history: dict[str, list[float]]
    best_epoch: int | None
    stopped: Stopped
    seconds: float
    num_parameters: int
    diagnosis: str | None = None
    weights: tuple[str, ...] = ()

    @property
    def num_epochs(self) -> int:
        """Finished epochs."""
        return len(self.history.get("loss", []))

    def __str__(self) -> str:
        head = (
            f"{self.num_epochs} epochs in {self.seconds:.1f} s ({self.stopped}), "
            f"{self.num_parameters} parameters"
        )
        lines = [head] if self.diagnosis is None else [head, f"  {self.diagnosis}"]
        if self.best_epoch is not None:
            measured = [name for name in self.history if _is_measured(name)]
            others = {*self.weights, *measured}
            nats = self._shown(name for name in self.history if name not in others)
            lines.append(f"  epoch {self.best_epoch}: {nats} (nats per datum)")
            if self.weights:
                lines.append(f"  weights: {self._shown(self.weights)}")
            if measured:
                lines.append(f"  measured: {self._shown(measured)}")
        return "\n".join(lines)

    def _shown(self, names: Iterable[str]) -> str:
        """The values of the best epoch."""
        assert self.best_epoch is not None
        return ", ".join(f"{name} {self.history[name][self.best_epoch]:.3f}" for name in names)

    __repr__ = __str__


def _is_measured(name: str) -> bool:
    """Whether a name in a history is that of something else than a part of the loss."""
    return "/" in name and not name.startswith("validation/")
