"""What is wrong with a pair, its objective or its fit, in plain words."""

from pyro_lvm.diagnostics.scale_audit import ScaleAudit, ScaleRow, audit_scale

__all__ = ["ScaleAudit", "ScaleRow", "audit_scale"]
