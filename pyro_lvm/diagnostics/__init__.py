"""What is wrong with a pair, its objective or its fit, in plain words."""

from pyro_lvm.diagnostics.aggregate import Aggregate
from pyro_lvm.diagnostics.collapse import CollapseReport, collapse_report
from pyro_lvm.diagnostics.estimates import Estimate
from pyro_lvm.diagnostics.gaps import InferenceGaps, PerDatum, inference_gaps
from pyro_lvm.diagnostics.information import Information
from pyro_lvm.diagnostics.latent_dimensions import LatentSummary
from pyro_lvm.diagnostics.scale_audit import ScaleAudit, ScaleRow, audit_scale

__all__ = [
    "Aggregate",
    "CollapseReport",
    "Estimate",
    "InferenceGaps",
    "Information",
    "LatentSummary",
    "PerDatum",
    "ScaleAudit",
    "ScaleRow",
    "audit_scale",
    "collapse_report",
    "inference_gaps",
]
