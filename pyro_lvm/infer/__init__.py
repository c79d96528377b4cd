"""Objectives: subclasses of ``pyro.infer.ELBO`` for any (model, guide) pair."""

from pyro_lvm.infer.implicit import ImplicitDivergence
from pyro_lvm.infer.info_elbo import TraceInfo_ELBO
from pyro_lvm.infer.iw_elbo import TraceIW_ELBO
from pyro_lvm.infer.schedules import CyclicSchedule, LinearSchedule, Schedule, SigmoidSchedule

__all__ = [
    "CyclicSchedule",
    "ImplicitDivergence",
    "LinearSchedule",
    "Schedule",
    "SigmoidSchedule",
    "TraceIW_ELBO",
    "TraceInfo_ELBO",
]
