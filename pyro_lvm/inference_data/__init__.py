"""From pairs to ArviZ: posteriors with their groups, and comparisons of log p(x).

ArviZ 0.x holds groups in an ``InferenceData``, ArviZ 1 in xarray's ``DataTree``. Here they are
plain datasets until they are handed over.
"""

from pyro_lvm.inference_data.comparison import compare
from pyro_lvm.inference_data.posterior import to_arviz
from pyro_lvm.inference_data.summaries import summarize

__all__ = ["compare", "summarize", "to_arviz"]
