"""IWAE and the semi-supervised VAE as a person writes them for speed, beside `by_hand`.

Each loss is a function of the networks and the data, and draws the noise that the Pyro program
draws: with the same seed it is that of the library in value and gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.problems import Networks, SemiSupervised

__all__ = ["Loss", "dreg", "iwae", "labels_summed_out", "steps"]

Loss = Callable[[Any, Tensor], Tensor]
Transform = Callable[[Callable], Callable]


def steps(loss: Loss, networks: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Steps of fused Adam on a loss."""
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-3, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(networks, x)
        value.backward()
        optimizer.step()
        return value

    return step


def iwae(num_particles: int, transform: Transform = torch.compile) -> Loss:
    """The importance weighted bound, whose gradient is the pathwise one."""

    def loss(networks: Networks, x: Tensor) -> Tensor:
        loc, log_variance = networks.encode(x)
        noise = torch.randn(num_particles, *loc.shape)
        z = loc + (0.5 * log_variance).exp() * noise  # K x B x D
        log_ratio = 0.5 * (noise.square() + log_variance - z.square()).sum(-1)
        log_weight = _log_likelihood(networks.decoder(z), x) + log_ratio
        return -_bound(log_weight)

    return transform(loss)


def dreg(num_particles: int, transform: Transform = torch.compile) -> Loss:
    """The same bound with the doubly reparameterised gradient, in one backward pass.

    A hook multiplies the gradient by z with the weights once more. It is set between two compiled
    functions, as it is Python.
    """

    @transform
    def draw(networks: Networks, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loc, log_variance = networks.encode(x)
        scale = (0.5 * log_variance).exp()
        z = loc + scale * torch.randn(num_particles, *loc.shape)
        return z, loc.detach(), scale.detach()

    @transform
    def score(
        networks: Networks, x: Tensor, z: Tensor, loc: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        log_ratio = 0.5 * (((z - loc) / scale).square() - z.square()).sum(-1) + scale.log().sum(-1)
        log_weight = _log_likelihood(networks.decoder(z), x) + log_ratio
        weights = log_weight.detach().softmax(0)
        surrogate = -(weights * log_weight).sum()
        return surrogate - (surrogate + _bound(log_weight)).detach(), weights[..., None]

    def loss(networks: Networks, x: Tensor) -> Tensor:
        z, loc, scale = draw(networks, x)
        value, weights = score(networks, x, z, loc, scale)
        z.register_hook(lambda gradient: weights * gradient)
        return value

    return loss


def labels_summed_out(transform: Transform = torch.compile) -> Loss:
    """The bound for data without a label: the mean over q(y | x) as a sum over all classes."""

    def loss(networks: SemiSupervised, x: Tensor) -> Tensor:
        log_q = networks.classifier(x).log_softmax(-1)  # B x C
        num_classes = log_q.shape[-1]
        loc, log_variance = networks.encode(x, torch.eye(num_classes)[:, None])  # C x B x D
        noise = torch.randn_like(loc)
        z = loc + (0.5 * log_variance).exp() * noise
        log_ratio = 0.5 * (noise.square() + log_variance - z.square()).sum(-1)
        logits = networks.decode(z, torch.eye(num_classes)[:, None])
        bound = _log_likelihood(logits, x) + log_ratio  # C x B
        return (log_q.exp() * (log_q + math.log(num_classes) - bound.mT)).sum()

    return transform(loss)


def _log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    error = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    return -error.sum(-1)


def _bound(log_weight: Tensor) -> Tensor:
    return (log_weight.logsumexp(0) - math.log(len(log_weight))).sum()
