"""What a (model, guide) pair is made of: its sites and plates, and its parameters.

A pair is any two callables with the same arguments: functions with ``pyro.param`` or
``pyro.module``, ``PyroModule`` objects, bound methods, ``poutine``-wrapped programs. No guide
(``None``) stands for one that samples nothing.
"""

from pyro_lvm.pair.given import Given
from pyro_lvm.pair.held import hold_globals
from pyro_lvm.pair.masks import Masks, masked
from pyro_lvm.pair.parameters import declared_by, modules_of, parameters_of
from pyro_lvm.pair.plates import data_plate, hold_subsamples, plate_size
from pyro_lvm.pair.programs import (
    Program,
    at_rest,
    device_of,
    no_guide,
    untouched_random_state,
)
from pyro_lvm.pair.structure import PairStructure, inspect_pair
from pyro_lvm.pair.unmasked import unmasked

__all__ = [
    "Given",
    "Masks",
    "PairStructure",
    "Program",
    "at_rest",
    "data_plate",
    "declared_by",
    "device_of",
    "hold_globals",
    "hold_subsamples",
    "inspect_pair",
    "masked",
    "modules_of",
    "no_guide",
    "parameters_of",
    "plate_size",
    "unmasked",
    "untouched_random_state",
]
