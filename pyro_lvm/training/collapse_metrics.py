"""What the latents know, epoch by epoch, beside the loss."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from pyro_lvm.checks import check_count
from pyro_lvm.diagnostics import CollapseReport, collapse_report
from pyro_lvm.pair import no_guide, untouched_random_state
from pyro_lvm.training.lightning import PairModule

__all__ = ["CollapseMetrics"]


class CollapseMetrics(pl.Callback):
    """Adds what `collapse_report` measures on some data to the history of `fit`, after epochs.

        lvm.fit(model, guide, x, callbacks=[CollapseMetrics(x_valid, every=5)])

    They are called, all with ``latents/`` before their names,

    * ``active_units``: how many dimensions of the continuous latents are active;
    * ``mutual_information``: I_q(x; z), bound from below, nats;
    * ``aggregate_kl``: KL(q(z) || p(z)), bound from above, nats; the two add up to the mean KL;
    * ``log_det_covariance``: of q(z), 0 for that of a standard normal prior.

    Those that a pair does not have (no continuous latents, latents under a mask) are left out. In
    the epochs in between they are those measured last; before the first they are nan. Training goes
    on as it would without: random numbers and the modes of modules are as they were.

    Args:
        *args: Data to measure on, better held out, in the form of the pair's arguments. A thousand
            rows are plenty.
        every: Epochs from one measurement to the next.
        num_samples: Draws for each datum, at least 2.
        num_draws: Rows of the table of I(x; z), at most.
        threshold: Of the variance above which a unit is active.
        plate: Name of the data plate; that of the run if None.
        **kwargs: The pair's keyword arguments.

    Raises:
        ValueError: Before the first step, if the pair has no report on these data.
    """

    def __init__(
        self,
        *args: Any,
        every: int = 1,
        num_samples: int = 16,
        num_draws: int = 500,
        threshold: float = 0.01,
        plate: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_count("every", every)
        self.args, self.kwargs = args, kwargs
        self.every, self.plate = every, plate
        self.settings: dict[str, Any] = {
            "num_samples": num_samples,
            "num_draws": num_draws,
            "threshold": threshold,
        }
        self.last: dict[str, float] = {}

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Refuse data and pairs that there is no report on, before training starts."""
        assert isinstance(module, PairModule)
        self._measure(module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Add the numbers to the means of this epoch."""
        assert isinstance(module, PairModule)
        if module.diverged or not module.tensors.are_finite():
            return
        if (trainer.current_epoch + 1) % self.every == 0:
            self.last = module.processes.first(self._measure(module))
        values = {n: torch.tensor(v, dtype=torch.float64) for n, v in self.last.items()}
        module.means.add(values, size=1)

    def state_dict(self) -> dict[str, Any]:
        """What was measured last, for checkpoints."""
        return {"last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.last = dict(state_dict["last"])

    def _measure(self, module: PairModule) -> dict[str, float]:
        model, guide, *_ = module.given
        device = module.trained[0].device
        args = tuple(_on(device, a) for a in self.args)
        kwargs = {name: _on(device, a) for name, a in self.kwargs.items()}
        with untouched_random_state(args, kwargs):
            report = collapse_report(
                model,
                no_guide if guide is None else guide,
                *args,
                plate=self.plate or module.plate,
                progress=False,
                **self.settings,
                **kwargs,
            )
        return _numbers(report)


def _numbers(report: CollapseReport) -> dict[str, float]:
    found: dict[str, float] = {}
    if report.num_units:
        found["active_units"] = float(report.num_active)
    if report.information is not None:
        found["mutual_information"] = report.information.lower.value
        found["aggregate_kl"] = report.information.kl_upper.value
    if report.aggregate is not None:
        found["log_det_covariance"] = report.aggregate.log_det_covariance.value
    return {f"latents/{name}": value for name, value in found.items()}


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
