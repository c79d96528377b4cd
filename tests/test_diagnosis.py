"""Losses that are not finite: which batch, which site and which data they come from."""

import math
import re
import warnings

import lightning.pytorch as pl
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.distributions import constraints

from pyro_lvm.infer import TraceInfo_ELBO
from pyro_lvm.training import fit, lightning
from pyro_lvm.training.diagnosis import first_not_finite

pytestmark = pytest.mark.usefixtures("float64")


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def diverged(*args, match, **settings):
    """A run that must end with one warning, which says what its diagnosis says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(*args, **settings)
    ours = [str(w.message) for w in caught if "The pair has the parameters" in str(w.message)]
    assert len(ours) == 1
    assert ours[0].startswith(run.diagnosis)
    assert run.stopped == "loss not finite"
    assert run.diagnosis in str(run)
    assert re.search(match, run.diagnosis), run.diagnosis
    return run


# ---------------------------------------------------------------------------- where


def shrinking(x):
    """x ~ U(0, high): the largest likelihood is at the largest datum, and beyond it is none."""
    high = pyro.param("high", torch.tensor(3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Uniform(0.0, high), obs=x)


def first_failure(x, *, batch_size, rate, seed):
    """Epoch, batch and datum of the first infinite loss, by hand."""
    pyro.set_rng_seed(seed)
    high, epoch = 3.0, 0
    while True:
        batches = torch.randperm(len(x)).split(batch_size)
        for index, rows in enumerate(batches):
            beyond = [int(i) for i in rows if x[i] >= high]
            if beyond:
                return epoch, index, beyond
            high -= rate / high  # the gradient of log(high)
        epoch += 1


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_batch_and_datum(seed, at_once, monkeypatch):
    """Also where losses are only looked at when an epoch ends, as on a device."""
    monkeypatch.setattr(lightning, "is_at_hand", lambda loss: at_once)
    x = torch.rand(12, generator=torch.Generator().manual_seed(seed)) * 2
    epoch, batch, data = first_failure(x, batch_size=4, rate=0.08, seed=seed)
    where = f"{len(data)} of 4 data, datum {data[0]} the first" if data[1:] else f"datum {data[0]}"
    what = f"site 'x' of the model has a log-probability of -inf at {where}"
    match = rf"^The loss was (nan|inf) in epoch {epoch}, batch {batch}: {what}\.$"
    settings = {"epochs": 99, "batch_size": 4, "optimizer": sgd(0.08), "seed": seed}
    run = diverged(shrinking, None, x, match=match, **settings)
    assert run.num_epochs == epoch + 1
    assert epoch - 2 <= run.best_epoch < epoch  # the one before may be bad for the first data


def test_long_epochs_are_looked_at_in_between(monkeypatch):
    monkeypatch.setattr(lightning, "is_at_hand", lambda loss: False)
    monkeypatch.setattr(lightning, "_SEEN_TOGETHER", 3)
    steps = []

    class Count(pl.Callback):
        def on_train_batch_end(self, *_):
            steps.append(1)

    x = torch.linspace(0.1, 2.9, 40)
    epoch, batch, _ = first_failure(x, batch_size=2, rate=0.3, seed=0)
    assert epoch == 0
    settings = {"epochs": 99, "batch_size": 2, "optimizer": sgd(0.3), "seed": 0}
    match = rf"epoch 0, batch {batch}: site 'x'"
    diverged(shrinking, None, x, match=match, callbacks=[Count()], **settings)
    assert batch < len(steps) <= batch + 3 < 20


def test_validation_data():
    x = torch.linspace(0.1, 1.0, 10)
    valid = torch.cat([x[:7], torch.tensor([2.0]), x[7:]])
    run = diverged(
        shrinking,
        None,
        x,
        epochs=99,
        optimizer=sgd(0.5),
        validation=valid,
        match=r"epoch 5, validation batch 0: site 'x' of the model .* -inf at datum 7\.$",
    )
    assert run.best_epoch == 4
    assert run.history["validation/loss"][5] == math.inf


def test_the_draws_are_those_of_the_step():
    """A draw beyond the bound is so rare that no other draw would show it."""

    def model(x):
        shift = pyro.param("shift", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Uniform(z - 3.7 + 0 * shift, z + 3.7), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.zeros(20)
    settings = {"epochs": 2000, "batch_size": 20, "optimizer": sgd(0.1), "seed": 2}
    run = diverged(model, guide, x, match="site 'x' of the model .* -inf at datum", **settings)
    assert run.num_epochs > 5


# ---------------------------------------------------------------------------- what


def vae(**settings):
    encoder, decoder = nn.Linear(3, 2), nn.Linear(2, 3)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), scale).to_event(1))

    return encoder, decoder, model, guide


@pytest.mark.parametrize(
    ("spoilt", "match"),
    [
        (
            "encoder",
            r"\('encoder\$\$\$weight'\); site 'z' of the guide has the parameter loc = nan at 5",
        ),
        (
            "decoder",
            r"\('decoder\$\$\$weight'\); site 'x' of the model has the parameter loc = nan at 5",
        ),
        (
            "scale",
            r"\('scale'\); site 'z' of the guide has the parameter scale = nan$|scale = nan at",
        ),
    ],
)
def test_parameters_that_an_optimiser_spoils(spoilt, match):
    encoder, decoder, model, guide = vae()
    before = decoder.weight.detach().clone()

    class Spoiling(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            store = dict(pyro.get_param_store().named_parameters())
            {"encoder": encoder.weight, "decoder": decoder.weight, "scale": store["scale"]}[
                spoilt
            ].data.fill_(math.nan)
            return loss

    x = torch.randn(10, 3)
    settings = {"epochs": 3, "batch_size": 5, "optimizer": lambda p: Spoiling(p, lr=0.1)}
    diverged(
        model, guide, x, match="epoch 0, batch 1: parameters are not finite.*" + match, **settings
    )
    assert torch.equal(decoder.weight, before)


def test_a_divergence_is_not_blamed_on_a_site():
    calls = []

    def divergence(q, p):
        calls.append(1)
        return q.mean() * (math.inf if len(calls) > 6 else 1.0)

    _, _, model, guide = vae()
    elbo = TraceInfo_ELBO(lambda_=2.0, divergence=divergence)
    diverged(model, guide, torch.randn(10, 3), elbo=elbo, epochs=9, match="every site is finite")


def test_a_run_without_failure_says_nothing():
    _, _, model, guide = vae()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = fit(model, guide, torch.randn(10, 3), epochs=2)
    assert run.diagnosis is None


# ---------------------------------------------------------------------------- one call


def blank(x):
    pass


def culprit(model, guide, *args, **settings):
    return first_not_finite(model, guide, args, **settings)


def test_finite_pairs_have_no_culprit():
    _, _, model, guide = vae()
    state = torch.get_rng_state()
    assert culprit(model, guide, torch.randn(4, 3)) is None
    assert not torch.equal(torch.get_rng_state(), state)


def test_rows_along_other_plates_and_events():
    x = torch.ones(4, 3, 2)
    x[1, 2, 0] = x[3, 0, 1] = -1.0

    def model(x):
        with pyro.plate("rows", 4, dim=-2), pyro.plate("data", 3, dim=-1):
            pyro.sample("x", dist.Uniform(torch.zeros(2), 2.0).to_event(1), obs=x)

    assert culprit(model, blank, x).rows == [0, 2]
    assert culprit(model, blank, x, plate="rows").rows == [1, 3]
    assert culprit(model, blank, x, plate="none").rows == []


def test_masked_data_are_not_blamed():
    x = torch.tensor([1.0, -1.0, 1.0])

    def model(x):
        with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("x", dist.Uniform(0.0, 2.0), obs=x)

    assert culprit(model, blank, x) is None


def test_a_parameter_comes_before_the_value_and_the_guide_before_the_model():
    def program(x):
        with pyro.plate("data", 3):
            pyro.sample("fine", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(torch.tensor([0.0, math.nan, 0.0]), 1.0))

    found = culprit(program, program, torch.zeros(3))
    assert found.reason == "site 'z' of the guide has the parameter loc = nan"
    assert found.rows == [1]
    found = culprit(program, blank, torch.zeros(3))
    assert found.reason.startswith("site 'z' of the model")


def test_a_program_that_raises():
    def model(x):
        pyro.sample("fine", dist.Normal(0.0, 1.0))
        raise ValueError("what a distribution says\nand where")

    found = culprit(model, blank, torch.zeros(3))
    expected = "the model raises ValueError after site 'fine': what a distribution says"
    assert found == (expected, [])
