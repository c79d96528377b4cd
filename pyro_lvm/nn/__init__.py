"""Networks whose ``forward`` returns a distribution, and the heads that end them.

An encoder ``x -> q(z | x)`` and a decoder ``z -> p(x | z)`` are both an ``nn.Module`` that returns
a ``pyro.distributions`` distribution: parameters, ``.to()`` and ``state_dict`` come from the
module, everything else from the distribution. No base class is demanded, so any module that returns
a distribution is as good as those below. A head is the last step, raw numbers to distribution, and
any module with an ``event_shape``, a ``params_per_value`` and a ``forward(raw)`` is one.

Shapes: ``batch`` is any number of leading dimensions, ``num_particles x N`` among them.
"""

from pyro_lvm.nn.delta import DeltaHead
from pyro_lvm.nn.heads import (
    BernoulliHead,
    CategoricalHead,
    ContinuousBernoulliHead,
    NormalHead,
)
from pyro_lvm.nn.joined import Joined
from pyro_lvm.nn.label_head import LabelHead
from pyro_lvm.nn.networks import MLP, ConvDecoder, ConvEncoder
from pyro_lvm.nn.pixelcnn import PixelCNN
from pyro_lvm.nn.spectral import spectral_normalization
from pyro_lvm.nn.vamp_prior import VampPrior

__all__ = [
    "MLP",
    "BernoulliHead",
    "CategoricalHead",
    "ContinuousBernoulliHead",
    "ConvDecoder",
    "ConvEncoder",
    "DeltaHead",
    "Joined",
    "LabelHead",
    "NormalHead",
    "PixelCNN",
    "VampPrior",
    "spectral_normalization",
]
