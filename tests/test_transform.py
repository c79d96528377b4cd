"""fit(transform=...): training batches are drawn anew, and no others."""

import functools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.compiled.recording import settings_of
from pyro_lvm.training.transform import TransformedObjective

GREY = torch.tensor([0.1, 0.5, 0.8])
sgd = functools.partial(torch.optim.SGD, lr=0.5)


class Coin(nn.Module):
    """x ~ Bernoulli(p), pixel by pixel: the best p are the mean images."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(3))

    def model(self, x, *others):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=self.logits).to_event(1), obs=x)


def vae():
    torch.manual_seed(0)
    encoder = lvm.nn.MLP(3, [4], head=lvm.nn.NormalHead(2))
    decoder = lvm.nn.MLP(2, [4], head=lvm.nn.BernoulliHead(3))
    return lvm.VAE(encoder, decoder)


def grey(num=400):
    return GREY.expand(num, 3).clone()


@pytest.mark.parametrize("compile", [False, True])
def test_binary_images_are_drawn_afresh(compile):
    """One image of 400 alike would have p = 0 or 1 in the limit; draws of it have its greys."""
    coin = Coin()
    seen = []

    def transform(x):  # the negative, so that draws are told from the grey values themselves
        drawn = 1 - torch.bernoulli(x)
        seen.append(drawn)
        return drawn

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a fallback would be one
        fit = lvm.fit(
            coin.model,
            None,
            grey(),
            transform=transform,
            epochs=30,
            batch_size=100,
            optimizer=functools.partial(torch.optim.SGD, lr=0.2),
            seed=0,
            compile=compile,
        )
    error = (GREY * (1 - GREY) / 100 / 10).sqrt()  # the last steps weigh some thousand draws
    assert ((torch.sigmoid(-coin.logits) - GREY).abs() < 5 * error).all()
    entropy = dist.Bernoulli(GREY).entropy().sum()
    assert fit.history["loss"][-1] == pytest.approx(float(entropy), abs=0.1)
    if not compile:
        assert len(seen) > 100
        assert not torch.equal(seen[-1], seen[-2])


def test_validation_data_are_not_transformed():
    coin = Coin()
    x = grey(50)
    held_out = torch.bernoulli(x)
    with torch.no_grad():
        coin.logits += 0.3
    fit = lvm.fit(
        coin.model,
        None,
        x,
        transform=lambda x: torch.zeros_like(x),
        validation=held_out,
        epochs=1,
        optimizer=functools.partial(torch.optim.SGD, lr=0.0),
        seed=0,
    )
    logits = torch.full((3,), 0.3)
    expected = -dist.Bernoulli(logits=logits).log_prob(held_out).sum(-1).mean()
    assert fit.history["validation/loss"][0] == pytest.approx(float(expected), rel=1e-5)
    zeros = -dist.Bernoulli(logits=logits).log_prob(torch.zeros(3)).sum()
    assert fit.history["loss"][0] == pytest.approx(float(zeros), rel=1e-5)


def test_a_transform_sees_and_returns_all_tensors():
    coin = Coin()
    y = torch.arange(50)

    def transform(x, y):
        assert y.dtype == torch.int64
        return torch.bernoulli(x), y

    lvm.fit(coin.model, None, (grey(50), y), transform=transform, epochs=2, seed=0)
    assert not torch.equal(coin.logits, torch.zeros(3))


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceGraph_ELBO(), lvm.TraceInfo_ELBO()])
def test_an_objective_of_transformed_data_is_the_objective_of_these(elbo):
    pair, x = vae(), torch.rand(20, 3)
    torch.manual_seed(1)
    drawn = torch.bernoulli(x)
    expected = lvm.compiled.objective.loss_and_parts(elbo, pair.model, pair.guide, (drawn,))
    torch.manual_seed(1)
    wrapped = TransformedObjective(elbo, torch.bernoulli)
    found = lvm.compiled.objective.loss_and_parts(wrapped, pair.model, pair.guide, (x,))
    torch.testing.assert_close(found, expected)


def test_the_pair_sees_transformed_data_only():
    """Bytes become twice as many numbers, also where the pair is looked at before it is trained."""
    linear = nn.Linear(6, 1)

    def model(x):
        pyro.module("linear", linear)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(linear(x), 1.0).to_event(1), obs=x[:, :1])

    def doubled(x):
        return torch.cat([x, x], 1).float()

    x = torch.randint(256, (50, 3)).byte()
    fit = lvm.fit(model, None, x, transform=doubled, validation=doubled(x), epochs=2, seed=0)
    assert "validation/loss" in fit.history
    with pytest.raises(ValueError, match="validation data of the same shapes"):
        lvm.fit(model, None, x, transform=doubled, validation=x, epochs=2)


def test_what_is_changed_in_an_objective_counts_under_a_transform_too():
    elbo = lvm.TraceInfo_ELBO(alpha=0.5, lambda_=2.0, divergence=lvm.MMD())
    wrapped = TransformedObjective(elbo, torch.bernoulli)
    before = settings_of(wrapped, None)
    assert settings_of(wrapped, None) == before
    elbo.lambda_ = 3.0
    assert settings_of(wrapped, None) != before


def test_resumes_with_the_same_draws(tmp_path):
    whole, parts = Coin(), Coin()
    settings = {"transform": torch.bernoulli, "seed": 3, "optimizer": sgd, "batch_size": 30}
    lvm.fit(whole.model, None, grey(90), epochs=4, **settings)
    for epochs in (2, 4):
        lvm.fit(
            parts.model,
            None,
            grey(90),
            epochs=epochs,
            checkpoint_dir=tmp_path,
            resume=epochs == 4,
            **settings,
        )
    assert torch.equal(whole.logits, parts.logits)


@pytest.mark.parametrize(
    ("transform", "error", "match"),
    [
        (lambda x: x[:3], ValueError, "tensors of 50 data"),
        (lambda x: x.sum(), ValueError, "tensors of 50 data"),
        (lambda x: "x", TypeError, "what transform returns"),
        (lambda x: 2 * x, ValueError, "within the support"),
    ],
)
def test_refuses(transform, error, match):
    coin = Coin()
    with pytest.raises(error, match=match):
        lvm.fit(coin.model, None, grey(50), transform=transform, epochs=1, batch_size=50)
    assert torch.equal(coin.logits, torch.zeros(3))


def test_a_loss_that_is_not_finite_is_traced_in_transformed_data():
    coin, calls = Coin(), []

    def transform(x):
        calls.append(x)
        return torch.full_like(x, math.nan if len(calls) > 6 else 0.0)

    settings = {"transform": transform, "epochs": 9, "batch_size": 50, "compile": False}
    with pytest.warns(UserWarning, match="site 'x' of the model has a log-probability of nan"):
        fit = lvm.fit(coin.model, None, grey(50), **settings)
    assert fit.stopped == "loss not finite"
    assert coin.logits.isfinite().all()
