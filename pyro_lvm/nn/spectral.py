"""Spectral normalisation of whole networks."""

from typing import TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

__all__ = ["spectral_normalization"]

Network = TypeVar("Network", bound=nn.Module)


def spectral_normalization(network: Network) -> Network:
    """Divide the weight of every linear and convolutional layer by its largest singular value.

        W / sigma(W),    sigma(W) = max_h |W h| / |h|

    With activations of slope at most 1, ``nn.LeakyReLU`` among them, a network of linear layers
    then changes by no more than its input does: as a discriminator it has a slope of 1 at most.
    sigma is found by one power iteration per pass in training mode (torch's ``spectral_norm``).

    Args:
        network: A network, which is changed in place. Layers that are normalised already stay so.

    Returns:
        The network.

    Reference:
        Miyato et al. 2018, "Spectral normalization for generative adversarial networks", arXiv
        1802.05957.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | _ConvNd) and not is_parametrized(layer, "weight"):
            spectral_norm(layer)
    return network
