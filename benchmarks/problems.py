"""The pairs that are timed, and their data: ordinary Pyro programs with nothing of ours in them.

Each constructor returns a `Problem`. The same stories in other libraries are in `benchmarks.peers`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = [
    "FACTORS",
    "MIXTURE",
    "PROBLEMS",
    "REGRESSION",
    "SEMI_SUPERVISED",
    "VAE",
    "Networks",
    "Problem",
    "SemiSupervised",
    "factor_analysis",
    "mixture",
    "own_parameters",
    "regression",
    "semi_supervised_vae",
    "vae",
]

# sizes, for all libraries alike
VAE = {"features": 784, "hidden": 400, "latents": 20}
FACTORS = {"data": 1000, "batch": 100, "features": 8, "latents": 3}
MIXTURE = {"data": 1000, "batch": 100, "features": 8, "components": 6}
REGRESSION = {"data": 100, "features": 3}
SEMI_SUPERVISED = {"features": 784, "hidden": 400, "latents": 50, "classes": 10}


def own_parameters(step: Callable[[], Any]) -> Callable[[], Any]:
    """Give a step a param store of its own: programs that take turns share their names.

    ``store.scope()`` does this too, in a time that would be a part of what is measured.
    """
    store = pyro.get_param_store()
    own = vars(type(store)())

    def wrapped() -> Any:
        outer, store.__dict__ = store.__dict__, own
        try:
            return step()
        finally:
            store.__dict__ = outer

    return wrapped


@dataclass(frozen=True)
class Problem:
    """A pair, its arguments, the objective that a user of Pyro would take, and what it learns."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Tensor, ...]
    elbo: ELBO
    networks: nn.Module | None = None


class Networks(nn.Module):
    """The two networks of the VAE: ReLU, a log-variance for the latents, logits for the pixels."""

    def __init__(self, latents: int = VAE["latents"]) -> None:
        super().__init__()
        features, hidden = VAE["features"], VAE["hidden"]
        self.hidden = nn.Sequential(nn.Linear(features, hidden), nn.ReLU())
        self.loc, self.log_variance = nn.Linear(hidden, latents), nn.Linear(hidden, latents)
        self.decoder = nn.Sequential(
            nn.Linear(latents, hidden), nn.ReLU(), nn.Linear(hidden, features)
        )

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x)."""
        h = self.hidden(x)
        return self.loc(h), self.log_variance(h)


class SemiSupervised(nn.Module):
    """The three networks of Kingma et al. (2014), M2: q(y | x), q(z | x, y) and p(x | y, z)."""

    def __init__(self) -> None:
        super().__init__()
        features, hidden, latents, classes = SEMI_SUPERVISED.values()
        self.classifier = nn.Sequential(
            nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes)
        )
        self.encoder = nn.Sequential(
            nn.Linear(features + classes, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latents)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latents + classes, hidden), nn.ReLU(), nn.Linear(hidden, features)
        )

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x, y), for y one-hot."""
        return self.encoder(_side_by_side(x, y)).chunk(2, -1)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Logits of p(x | y, z)."""
        return self.decoder(_side_by_side(z, y))


def _side_by_side(x: Tensor, y: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
    return torch.cat([x.expand(*shape, -1), y.expand(*shape, -1)], -1)


def vae(batch_size: int = 128, device: str = "cpu", *, latents: int = VAE["latents"]) -> Problem:
    """A VAE 784-400-20 on random bits, as in Pyro's tutorial: ``pyro.module`` and one latent."""
    networks = Networks(latents).to(device)

    def model(x: Tensor) -> None:
        pyro.module("decoder", networks.decoder)
        with pyro.plate("data", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), latents), 1.0)
            z = pyro.sample("z", prior.to_event(1))
            logits = networks.decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        for name in ("hidden", "loc", "log_variance"):
            pyro.module(name, getattr(networks, name))
        with pyro.plate("data", len(x)):
            loc, log_variance = networks.encode(x)
            pyro.sample("z", dist.Normal(loc, (0.5 * log_variance).exp()).to_event(1))

    x = (torch.rand(batch_size, VAE["features"]) < 0.3).float().to(device)
    return Problem(model, guide, (x,), Trace_ELBO(max_plate_nesting=1), networks)


def semi_supervised_vae(batch_size: int = 100, device: str = "cpu") -> Problem:
    """M2 on random bits without labels: the label is enumerated in the guide."""
    networks = SemiSupervised().to(device)
    latents, classes = SEMI_SUPERVISED["latents"], SEMI_SUPERVISED["classes"]

    def model(x: Tensor) -> None:
        pyro.module("decoder", networks.decoder)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(classes)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(latents), 1.0).to_event(1))
            logits = networks.decode(z, y)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("classifier", networks.classifier)
        pyro.module("encoder", networks.encoder)
        with pyro.plate("data", len(x)):
            q_y = dist.OneHotCategorical(logits=networks.classifier(x))
            y = pyro.sample("y", q_y, infer={"enumerate": "parallel"})
            loc, log_variance = networks.encode(x, y)
            pyro.sample("z", dist.Normal(loc, (0.5 * log_variance).exp()).to_event(1))

    x = (torch.rand(batch_size, SEMI_SUPERVISED["features"]) < 0.3).float().to(device)
    return Problem(model, guide, (x,), TraceEnum_ELBO(max_plate_nesting=1), networks)


def factor_analysis(device: str = "cpu") -> Problem:
    """Global loadings and scale, local factors, a subsampled plate; a mean-field guide by hand."""
    n, batch, d, k = FACTORS.values()
    y = torch.randn(n, k, device=device) @ torch.randn(k, d, device=device)
    y = y + 0.5 * torch.randn_like(y)

    def plate(y: Tensor) -> pyro.plate:
        return pyro.plate("data", n, subsample_size=batch, device=y.device)

    def model(y: Tensor) -> None:
        zero = y.new_zeros(())
        loadings = pyro.sample("loadings", dist.Normal(zero, 1.0).expand([k, d]).to_event(2))
        scale = pyro.sample("scale", dist.Gamma(zero + 2.0, zero + 2.0))
        with plate(y) as index:
            z = pyro.sample("z", dist.Normal(zero, 1.0).expand([k]).to_event(1))
            loc = (z.unsqueeze(-2) @ loadings).squeeze(-2)
            pyro.sample("y", dist.Normal(loc, scale).to_event(1), obs=y[index])

    def free(name: str, y: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
        loc = pyro.param(f"{name}_loc", lambda: 0.1 * torch.randn(shape, device=y.device))
        scale = pyro.param(
            f"{name}_scale",
            lambda: torch.full(shape, 0.1, device=y.device),
            constraint=constraints.positive,
        )
        return loc, scale

    def guide(y: Tensor) -> None:
        pyro.sample("loadings", dist.Normal(*free("loadings", y, k, d)).to_event(2))
        pyro.sample("scale", dist.LogNormal(*free("scale", y)))
        loc, scale = free("z", y, n, k)
        with plate(y) as index:
            pyro.sample("z", dist.Normal(loc[index], scale[index]).to_event(1))

    return Problem(model, guide, (y,), Trace_ELBO(max_plate_nesting=1))


def mixture(device: str = "cpu") -> Problem:
    """A diagonal Gaussian mixture, its label enumerated, its parameters points."""
    n, batch, d, c = MIXTURE.values()
    x = torch.randn(n, d, device=device) + 4 * torch.randn(c, d, device=device)[torch.arange(n) % c]

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", lambda: x.new_ones(c) / c, constraint=constraints.simplex)
        loc = pyro.param("loc", lambda: torch.randn(c, d, device=x.device))
        scale = pyro.param("scale", lambda: x.new_ones(c, d), constraint=constraints.positive)
        with pyro.plate("data", n, subsample_size=batch, device=x.device) as index:
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x[index])

    def guide(x: Tensor) -> None:
        pass

    return Problem(model, guide, (x,), TraceEnum_ELBO(max_plate_nesting=1))


def regression(device: str = "cpu") -> Problem:
    """Linear regression with an ``AutoNormal`` over weights, bias and scale."""
    n, d = REGRESSION.values()
    x = torch.randn(n, d, device=device)
    y = x @ torch.tensor([1.0, -2.0, 0.5], device=device) + 0.3 * torch.randn(n, device=device)

    def model(x: Tensor, y: Tensor) -> None:
        zero = x.new_zeros(())
        weight = pyro.sample("weight", dist.Normal(zero, 1.0).expand([d]).to_event(1))
        bias = pyro.sample("bias", dist.Normal(zero, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(zero, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ weight + bias, scale), obs=y)

    return Problem(model, AutoNormal(model), (x, y), Trace_ELBO(max_plate_nesting=1))


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "vae, batch 128": vae,
    "vae, batch 512": partial(vae, 512),
    "factor analysis": factor_analysis,
    "mixture": mixture,
    "regression": regression,
}
"""Name -> constructor; every one takes ``device``."""
