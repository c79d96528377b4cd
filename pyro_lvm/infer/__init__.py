"""Objectives: subclasses of ``pyro.infer.ELBO`` for any (model, guide) pair."""

from pyro_lvm.infer.info_elbo import TraceInfo_ELBO

__all__ = ["TraceInfo_ELBO"]
