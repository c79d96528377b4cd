"""The VAE as a person writes it for speed: closed-form KL, logits, a fused optimiser."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.problems import Networks, vae

__all__ = ["vae_compiled", "vae_cuda_graph", "vae_eager"]

_WARM_UP = 3


def vae_eager(batch_size: int = 128, device: str = "cpu") -> Callable[[], Tensor]:
    """Plain PyTorch."""
    return _step(lambda loss: loss, batch_size, device)


def vae_compiled(batch_size: int = 128, device: str = "cpu") -> Callable[[], Tensor]:
    """The same loss through ``torch.compile``."""
    return _step(torch.compile, batch_size, device)


def vae_cuda_graph(batch_size: int = 128, device: str = "cuda") -> Callable[[], Tensor]:
    """Loss, gradient and update of plain PyTorch, captured as one CUDA graph."""
    networks = Networks().to(device)
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-3, fused=True, capturable=True)
    (x,) = vae(batch_size, device).args

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(networks, x)
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def _step(transform: Callable[..., Any], batch_size: int, device: str) -> Callable[[], Tensor]:
    networks = Networks().to(device)
    optimizer = torch.optim.Adam(networks.parameters(), lr=1e-3, fused=True)
    (x,) = vae(batch_size, device).args
    loss_of = transform(lambda x: _loss(networks, x))

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _loss(networks: Networks, x: Tensor) -> Tensor:
    loc, log_variance = networks.encode(x)
    z = loc + (0.5 * log_variance).exp() * torch.randn_like(loc)
    error = F.binary_cross_entropy_with_logits(networks.decoder(z), x, reduction="sum")
    return error - 0.5 * (1 + log_variance - loc.square() - log_variance.exp()).sum()
