"""Losses and training steps of pairs as compiled graphs of tensor operations.

A pair's loss is recorded once, and the recording is compiled: as a loss that any training loop
differentiates (`compile`), or with gradient and update as whole steps (`CompiledStep`).
"""

from pyro_lvm.compiled.loss import CompiledLoss, compile
from pyro_lvm.compiled.step import CompiledStep

__all__ = ["CompiledLoss", "CompiledStep", "compile"]
