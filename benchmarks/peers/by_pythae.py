"""The VAE in pythae: its model, and the body of its trainer's loop."""

from collections.abc import Callable
from typing import Any

import torch
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor

from benchmarks import problems
from benchmarks.problems import Networks

__all__ = ["scored_vae", "vae"]


class _Encoder(BaseEncoder):
    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.hidden, self.loc, self.log_variance = (
            networks.hidden,
            networks.loc,
            networks.log_variance,
        )

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return ModelOutput(embedding=self.loc(h), log_covariance=self.log_variance(h))


class _Decoder(BaseDecoder):
    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.decoder = networks.decoder

    def forward(self, z: Tensor) -> Any:
        return ModelOutput(reconstruction=self.decoder(z).sigmoid())  # pythae takes probabilities


class _EncoderOf(BaseEncoder):
    """The network of one of our encoders, with a normal head."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Any:
        q = self.encoder(x).base_dist
        return ModelOutput(embedding=q.loc, log_covariance=2 * q.scale.log())


class _DecoderOf(BaseDecoder):
    """The network of one of our decoders, with a Bernoulli head."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.layers = decoder.layers

    def forward(self, z: Tensor) -> Any:
        return ModelOutput(reconstruction=self.layers(z).sigmoid())


def scored_vae(pair: Any) -> VAE:
    """Pythae's VAE with the networks of one of ours, to be scored."""
    config = VAEConfig(
        input_dim=pair.decoder.head.event_shape,
        latent_dim=pair.encoder.head.event_shape[0],
        reconstruction_loss="bce",
    )
    return VAE(config, _EncoderOf(pair.encoder), _DecoderOf(pair.decoder)).eval()


def vae(batch_size: int = 128, device: str = "cpu") -> Callable[[], Tensor]:
    """Forward, backward and step as in ``BaseTrainer.train_step``, with its optimiser's defaults.

    The trainer's data loader, callbacks and ``loss.item()`` are left out, in its favour.
    """
    networks = Networks().to(device)
    config = VAEConfig(
        input_dim=(problems.VAE["features"],),
        latent_dim=problems.VAE["latents"],
        reconstruction_loss="bce",
    )
    model = VAE(config, _Encoder(networks), _Decoder(networks)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    (x,) = problems.vae(batch_size, device).args
    model.train()

    def step() -> Tensor:
        loss = model({"data": x}, epoch=1, dataset_size=len(x), uses_ddp=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step
