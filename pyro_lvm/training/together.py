"""What a Lightning module does where several processes train it."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from pyro_lvm.training.processes import Processes
from pyro_lvm.training.tensors import PairTensors

__all__ = ["Together"]


class Together(pl.LightningModule):
    """A module whose parameters, ends and batches fit together in all processes.

    Attributes:
        processes: This process, among those of the trainer.
        goes_on_from: The checkpoint that the run goes on from; None for a new run.
        tensors: What training changes.
        num_data: The number of all training data.
    """

    tensors: PairTensors
    num_data: int

    def __init__(self) -> None:
        super().__init__()
        self.processes = Processes()
        self.goes_on_from: str | None = None

    @property
    def diverged(self) -> bool:
        """Whether a loss or a parameter was not finite."""
        raise NotImplementedError

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """The param store's too, so that Lightning averages their gradients over processes."""
        yield from super().named_parameters(*args, **kwargs)
        yield from self._outside(parameters=True)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Those of modules that the pair closes over, too."""
        yield from super().named_buffers(*args, **kwargs)
        yield from self._outside(parameters=False)

    def setup(self, stage: str) -> None:
        """Meet the other processes, and draw other random numbers than they do."""
        self.processes = Processes(together=self.trainer.world_size > 1)
        if self.processes.size > 1:
            shapes = {name: tuple(t.shape) for name, t in self.tensors.changing().items()}
            remedy = "All of them must make the same pair from the same data."
            self.processes.check_same("parameters and buffers", shapes, remedy)
            self.processes.check_same("number of data", self.num_data, remedy)
            remedy = "All machines must see the same checkpoint_dir."
            self.processes.check_same("checkpoint to go on from", self.goes_on_from, remedy)
            self.processes.draw_apart()

    def on_train_start(self) -> None:
        """Take this process's part of the batches."""
        self._share(self.trainer.train_dataloader)
        self._share(self.trainer.val_dataloaders)

    def on_validation_start(self) -> None:
        """Take this process's part of the batches."""
        self._share(self.trainer.val_dataloaders)

    def on_train_batch_end(self, *_: Any) -> None:
        """Come together after a step."""
        self.come_together()

    def on_validation_end(self) -> None:
        """Come together after validation, which may change buffers of what is closed over."""
        self.come_together()

    def no_step(self) -> Tensor | None:
        """What a step returns that changes nothing: Lightning knows None in one process alone."""
        if self.processes.size == 1 or not torch.is_grad_enabled():
            return None
        return torch.stack([0 * p.sum() for p in self.tensors.trained.values()]).sum()

    def on_after_backward(self) -> None:
        """Take no step where the run ends for a loss that is not finite."""
        if self.processes.size > 1 and self.diverged:
            for p in self.tensors.trained.values():
                p.grad = None

    def come_together(self) -> None:
        """Stop if one of the processes is to stop, and go on with the buffers of the first."""
        self.processes.copy_first(buffer for _, buffer in self.named_buffers())
        self.trainer.should_stop = self.processes.any(self.trainer.should_stop)

    def _share(self, loader: Any) -> None:
        if self.processes.size == 1:
            return
        if getattr(loader, "processes", self.processes) is not self.processes:
            remedy = "All of them must load the same data, from the same seed if they are drawn."
            self.processes.check_same(loader.name, loader.digest(), remedy)
            loader.share(self.processes)

    def _outside(self, *, parameters: bool) -> Iterator[tuple[str, Tensor]]:
        """The parameters, or the buffers, that no module of ours has."""
        if "tensors" not in self.__dict__:  # it is made late
            return
        for name, tensor in self.tensors.outside().items():
            if (name in self.tensors.loose) is parameters:
                yield name, tensor
