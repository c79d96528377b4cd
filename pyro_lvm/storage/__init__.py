"""Fitted pairs in files, and back."""

from pyro_lvm.storage.saving import load, save

__all__ = ["load", "save"]
