"""NumPyro: ``svi.update`` jitted, optimiser and all; and many of them under one ``lax.scan``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.example_libraries import stax
from numpyro.contrib.funsor import config_enumerate
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, init_to_median
from numpyro.infer.autoguide import AutoNormal

from benchmarks.problems import FACTORS, MIXTURE, REGRESSION, VAE
from benchmarks.timing import ManySteps

__all__ = [
    "factor_analysis",
    "factor_analysis_scan",
    "mixture",
    "mixture_scan",
    "regression",
    "regression_scan",
    "vae",
    "vae_mean_field",
]

_SCANNED = 100  # steps in one call


def vae(batch_size: int = 128) -> Callable[[], Any]:
    """With ``Trace_ELBO``."""
    return _jitted(*_vae(batch_size), Trace_ELBO())


def vae_mean_field(batch_size: int = 128) -> Callable[[], Any]:
    """With the KL in closed form."""
    return _jitted(*_vae(batch_size), TraceMeanField_ELBO())


def factor_analysis() -> Callable[[], Any]:
    """A step in a call."""
    return _jitted(*_factor_analysis(), Trace_ELBO())


def factor_analysis_scan() -> ManySteps:
    """A hundred steps in a call."""
    return _scanned(*_factor_analysis(), Trace_ELBO())


def mixture() -> Callable[[], Any]:
    """A step in a call."""
    return _jitted(*_mixture(), TraceEnum_ELBO())


def mixture_scan() -> ManySteps:
    """A hundred steps in a call."""
    return _scanned(*_mixture(), TraceEnum_ELBO())


def regression() -> Callable[[], Any]:
    """A step in a call."""
    return _jitted(*_regression(), Trace_ELBO())


def regression_scan() -> ManySteps:
    """A hundred steps in a call."""
    return _scanned(*_regression(), Trace_ELBO())


def _jitted(model: Callable, guide: Callable, args: tuple, elbo: Any) -> Callable[[], Any]:
    svi, state = _start(model, guide, args, elbo)
    update = jax.jit(svi.update)

    def step() -> Any:
        nonlocal state
        state, loss = update(state, *args)
        return loss

    return step


def _scanned(model: Callable, guide: Callable, args: tuple, elbo: Any) -> ManySteps:
    svi, state = _start(model, guide, args, elbo)

    @jax.jit
    def many(state: Any, *args: Any) -> Any:
        return jax.lax.scan(lambda s, _: svi.update(s, *args), state, length=_SCANNED)

    def call() -> Any:
        nonlocal state
        state, losses = many(state, *args)
        return losses

    return ManySteps(call, _SCANNED)


def _start(model: Callable, guide: Callable, args: tuple, elbo: Any) -> tuple[SVI, Any]:
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), elbo)
    return svi, svi.init(_key(1), *args)


def _key(seed: int) -> Any:
    return jax.random.PRNGKey(seed)


def _vae(batch_size: int) -> tuple[Callable, Callable, tuple]:
    features, hidden, latents = VAE.values()
    encoder = stax.serial(
        stax.Dense(hidden),
        stax.Relu,
        stax.FanOut(2),
        stax.parallel(stax.Dense(latents), stax.Dense(latents)),
    )
    decoder = stax.serial(stax.Dense(hidden), stax.Relu, stax.Dense(features))

    def model(x: Any) -> None:
        decode = numpyro.module("decoder", decoder, (len(x), latents))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latents), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        encode = numpyro.module("encoder", encoder, (len(x), features))
        loc, log_variance = encode(x)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(0.5 * log_variance)).to_event(1))

    x = jax.random.bernoulli(_key(0), 0.3, (batch_size, features)).astype(jnp.float32)
    return model, guide, (x,)


def _factor_analysis() -> tuple[Callable, Callable, tuple]:
    n, batch, d, k = FACTORS.values()
    keys = jax.random.split(_key(0), 3)
    y = jax.random.normal(keys[0], (n, k)) @ jax.random.normal(keys[1], (k, d))
    y = y + 0.5 * jax.random.normal(keys[2], (n, d))

    def plate() -> Any:
        return numpyro.plate("data", n, subsample_size=batch)

    def model(y: Any) -> None:
        loadings = numpyro.sample("loadings", dist.Normal(0.0, 1.0).expand([k, d]).to_event(2))
        scale = numpyro.sample("scale", dist.Gamma(2.0, 2.0))
        with plate() as index:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([k]).to_event(1))
            numpyro.sample("y", dist.Normal(z @ loadings, scale).to_event(1), obs=y[index])

    def free(name: str, *shape: int) -> tuple[Any, Any]:
        start = 0.1 * jax.random.normal(_key(2), shape)
        width = jnp.full(shape, 0.1)
        return (
            numpyro.param(f"{name}_loc", start),
            numpyro.param(f"{name}_scale", width, constraint=constraints.positive),
        )

    def guide(y: Any) -> None:
        numpyro.sample("loadings", dist.Normal(*free("loadings", k, d)).to_event(2))
        numpyro.sample("scale", dist.LogNormal(*free("scale")))
        loc, scale = free("z", n, k)
        with plate() as index:
            numpyro.sample("z", dist.Normal(loc[index], scale[index]).to_event(1))

    return model, guide, (y,)


def _mixture() -> tuple[Callable, Callable, tuple]:
    n, batch, d, c = MIXTURE.values()
    keys = jax.random.split(_key(0), 3)
    centres = 4 * jax.random.normal(keys[1], (c, d))
    x = jax.random.normal(keys[0], (n, d)) + centres[jnp.arange(n) % c]
    start = jax.random.normal(keys[2], (c, d))

    @config_enumerate
    def model(x: Any) -> None:
        weights = numpyro.param("weights", jnp.ones(c) / c, constraint=constraints.simplex)
        loc = numpyro.param("loc", start)
        scale = numpyro.param("scale", jnp.ones((c, d)), constraint=constraints.positive)
        with numpyro.plate("data", n, subsample_size=batch) as index:
            z = numpyro.sample("z", dist.Categorical(weights))
            numpyro.sample("x", dist.Normal(loc[z], scale[z]).to_event(1), obs=x[index])

    def guide(x: Any) -> None:
        pass

    return model, guide, (x,)


def _regression() -> tuple[Callable, Callable, tuple]:
    n, d = REGRESSION.values()
    keys = jax.random.split(_key(0), 2)
    x = jax.random.normal(keys[0], (n, d))
    y = x @ jnp.array([1.0, -2.0, 0.5]) + 0.3 * jax.random.normal(keys[1], (n,))

    def model(x: Any, y: Any) -> None:
        weight = numpyro.sample("weight", dist.Normal(0.0, 1.0).expand([d]).to_event(1))
        bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ weight + bias, scale), obs=y)

    return model, AutoNormal(model, init_loc_fn=init_to_median), (x, y)  # Pyro's start
