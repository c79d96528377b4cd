"""Time to estimate log p(x) by importance sampling, beside a bare loop and pythae.

The VAE is that of Burda et al. (2016): 784-200-200-50 with Bernoulli pixels. `bare_loop` draws z,
decodes and sums the likelihood, and nothing else: no log p(z) and log q(z | x), no logarithm of a
mean, no errors. It and pythae run in several sizes of their chunks, of which the fastest counts.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import pyro_lvm as lvm
from benchmarks.report import Timed
from benchmarks.timing import ManySteps, interleaved

__all__ = ["marginal"]

NUM_SAMPLES = 1000
NUM_DATA = 1000
UNIT = 100
"""Data per step: a step is so many images times ``NUM_SAMPLES``."""
BARE_CHUNKS = (1, 2, 4, 8, 32)
PYTHAE_BATCHES = (100, 250, 1000)


def marginal(rounds: int = 5) -> Iterator[Timed]:
    """Times of an estimate.

    Args:
        rounds: How many times of each, at most five.
    """
    vae, x = _vae()
    units = NUM_DATA // UNIT
    score = _ours(vae, x)
    programs: dict[str, Callable[[], Any]] = {"pyro_lvm": ManySteps(score, units)}
    for chunk in BARE_CHUNKS:
        loop = _bare_loop(vae, x, chunk)
        programs[f"bare_loop, {chunk} at once"] = ManySteps(lambda loop=loop: loop().sum(), units)
    programs |= _pythae(vae, x[:UNIT])
    check(vae, x[:UNIT])
    times = interleaved(programs, rounds=min(rounds, 5), warm_up=1)
    fastest = {
        kind: _fastest({n: t for n, t in times.items() if n.startswith(kind)})
        for kind in ("bare_loop", "pythae")
        if any(n.startswith(kind) for n in times)
    }
    yield Timed("importance sampling, 100 images x 1000 samples", {**times, **fastest}, "pyro_lvm")


def _fastest(times: dict[str, list[float]]) -> list[float]:
    return min(times.values(), key=lambda values: sorted(values)[len(values) // 2])


def _vae() -> tuple[lvm.VAE, Tensor]:
    torch.manual_seed(0)
    encoder = lvm.nn.MLP(784, [200, 200], activation=nn.Tanh, head=lvm.nn.NormalHead(50))
    decoder = lvm.nn.MLP(50, [200, 200], activation=nn.Tanh, head=lvm.nn.BernoulliHead(784))
    with torch.no_grad():  # near the prior, which is near the posterior of a decoder at its start
        encoder.layers[-1].weight.mul_(0.1)
        encoder.layers[-1].bias[50:].fill_(math.log(math.e - 1))
    return lvm.VAE(encoder, decoder), (torch.rand(NUM_DATA, 784) < 0.13).float()


def _ours(vae: lvm.VAE, x: Tensor) -> Callable[[], Tensor]:
    def score() -> Tensor:
        return lvm.marginal.importance_sampling(
            vae.model, vae.guide, x, num_samples=NUM_SAMPLES, progress=False
        ).log_prob

    return score


def _bare_loop(vae: lvm.VAE, x: Tensor, chunk: int) -> Callable[[], Tensor]:
    """Draws, decoder and likelihood: log p(x | z) of all samples, ``K x N``."""
    encoder, decoder = vae.encoder, vae.decoder

    @torch.no_grad()
    def loop() -> Tensor:
        q = encoder(x).base_dist
        found = []
        for start in range(0, NUM_SAMPLES, chunk):
            size = min(chunk, NUM_SAMPLES - start)
            z = q.loc + q.scale * torch.randn(size, *q.loc.shape)
            logits = decoder.layers(z)
            lost = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
            found.append(-lost.sum(-1))
        return torch.cat(found)

    return loop


def check(vae: lvm.VAE, x: Tensor) -> None:
    """Compare the estimate with one by hand, which has draws of its own.

    Raises:
        AssertionError: If they differ by more than five standard errors.
    """
    ours = lvm.marginal.importance_sampling(vae.model, vae.guide, x, num_samples=NUM_SAMPLES)
    with torch.no_grad():
        q = vae.encoder(x)
        z = q.sample((NUM_SAMPLES,))
        log_weight = vae.decoder(z).log_prob(x) - q.log_prob(z)
        log_weight = log_weight + torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    by_hand = log_weight.logsumexp(0) - math.log(NUM_SAMPLES)
    error = 2**0.5 * ours.std_error
    assert ((ours.log_prob - by_hand).abs() < 5 * error).all()


def _pythae(vae: lvm.VAE, x: Tensor) -> dict[str, Callable[[], Any]]:
    try:
        from benchmarks.peers import by_pythae
    except ImportError:
        return {}
    model = by_pythae.scored_vae(vae)
    return {
        f"pythae, {size} at once": lambda size=size: model.get_nll(
            x, n_samples=NUM_SAMPLES, batch_size=size
        )
        for size in PYTHAE_BATCHES
    }
