"""What a run leaves behind."""

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
            reports them, and each of them as "validation/..." on the validation data.
        best_epoch: The epoch (from 0) whose parameters the pair now has: that of the least
            validation loss, or the last one without validation data; None if none was finished.
        stopped: Why the run ended.
        seconds: How long it took.
        num_parameters: How many numbers were trained.
        diagnosis: Where and why the loss was not finite; None if it always was.
    """

    history: dict[str, list[float]]
    best_epoch: int | None
    stopped: Stopped
    seconds: float
    num_parameters: int
    diagnosis: str | None = None

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
            values = ", ".join(f"{k} {v[self.best_epoch]:.3f}" for k, v in self.history.items())
            lines.append(f"  epoch {self.best_epoch}: {values} (nats per datum)")
        return "\n".join(lines)

    __repr__ = __str__
