"""fit: every kind of pair, histories and gradients by hand, early ends, and what is refused."""

import inspect
import logging.handlers
import math
import os
import random
import signal
import threading
import time
import warnings

import lightning.pytorch as pl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import NUM_DATA, PROBLEMS, Problem
from pyro.infer import (
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_lvm.divergences import MMD
from pyro_lvm.infer import TraceInfo_ELBO
from pyro_lvm.marginal import exact
from pyro_lvm.models import GaussianMixture
from pyro_lvm.pair import inspect_pair, parameters_of
from pyro_lvm.training import Batches, fit
from pyro_lvm.training.lightning import PairModule

pytestmark = pytest.mark.usefixtures("float64")


def adam(lr):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def still(parameters):
    """An optimiser that leaves everything as it is."""
    return torch.optim.SGD(parameters, lr=0.0)


def transposed(problem):
    """A problem whose data run along the second dimension, with the data first."""
    (x,) = problem.args
    return Problem(lambda x: problem.model(x.T), lambda x: problem.guide(x.T), (x.T,))


ARGUMENTS = {n: p for n, p in PROBLEMS.items() if n != "global_and_local"}  # has its data inside
DATA_SECOND = ("nested_masked", "topics", "guide_chain", "masked_mixture")


def problem_of(name):
    return transposed(ARGUMENTS[name]()) if name in DATA_SECOND else ARGUMENTS[name]()


class LinearVAE(PyroModule):
    """A small VAE: three features, two latents, the scale of the guide constrained."""

    def __init__(self, features=3, dropout=0.0, norm=False):
        super().__init__()
        middle = [nn.BatchNorm1d(features)] if norm else []
        self.encoder = nn.Sequential(*middle, nn.Dropout(dropout), nn.Linear(features, 2))
        self.decoder = nn.Linear(2, features)
        self.scale = PyroParam(torch.ones(2), constraint=constraints.positive)

    @pyro_method
    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x[:, :2]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    @pyro_method
    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.scale).to_event(1))


def linear_vae(**settings):
    pyro.clear_param_store()  # Pyro knows the parameters of two such modules by the same names
    torch.manual_seed(5)
    return LinearVAE(**settings)


def data(num=20, features=3, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, features, generator=generator) + torch.tensor([2.0, 0.0, -1.0])


def values_of(pair):
    return [t.detach().clone() for t in (*pair.parameters(), *pair.buffers())]


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class PlantedMixture:
    """A mixture that is far too rich for its training data; its loss is deterministic."""

    def __init__(self):
        generator = torch.Generator().manual_seed(2)
        self.train = torch.randn(12, 2, generator=generator)
        self.valid = torch.randn(60, 2, generator=generator)
        pyro.set_rng_seed(1)
        self.mixture = GaussianMixture(6, 2, "diagonal", floor=0.02).initialize(self.train)
        self.pair = self.mixture.model, self.mixture.guide

    def loss(self, x):
        return -exact(*self.pair, x).mean


# ---------------------------------------------------------------------------- pairs and objectives


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_kind_of_pair_is_fitted(name):
    problem = problem_of(name)
    parameters_of(problem.model, problem.guide, problem.args)  # declares them

    def bound():
        pyro.set_rng_seed(4)
        elbo = TraceInfo_ELBO(num_particles=200, vectorize_particles=True)
        return elbo.loss(problem.model, problem.guide, *problem.args) / NUM_DATA

    before = bound()
    run = fit(problem.model, problem.guide, problem.args, epochs=40, optimizer=adam(0.05), seed=0)
    assert bound() < before - 0.005  # the same draws before and after
    assert run.stopped == "all epochs"
    assert run.best_epoch == 39
    trained = parameters_of(problem.model, problem.guide, problem.args)
    assert run.num_parameters == sum(p.numel() for p in trained)


OBJECTIVES = {
    "mmd": ("modules", lambda: TraceInfo_ELBO(alpha=0.5, lambda_=3.0, divergence=MMD())),
    "trace": ("score_function", Trace_ELBO),
    "trace_vectorized": (
        "modules",
        lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    ),
    "mean_field": ("normal_normal", TraceMeanField_ELBO),
    "enum_model": ("mixture", lambda: TraceEnum_ELBO(max_plate_nesting=1)),
    "enum_guide": ("semi_supervised", TraceEnum_ELBO),
    "graph": ("score_function", TraceGraph_ELBO),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name):
    problem_name, elbo = OBJECTIVES[name]
    problem = problem_of(problem_name)
    settings = {"epochs": 60, "batch_size": 3, "optimizer": adam(0.05), "seed": 0}
    run = fit(problem.model, problem.guide, problem.args, elbo=elbo(), **settings)
    loss = run.history["loss"]
    assert sum(loss[-15:]) / 15 < sum(loss[:5]) / 5 - 0.02
    assert ("reconstruction" in run.history) is isinstance(elbo(), TraceInfo_ELBO)


def test_no_guide_is_one_that_samples_nothing():
    problem = PROBLEMS["mixture"]()
    run = fit(problem.model, None, problem.args, epochs=5, optimizer=adam(0.1))
    assert run.history["loss"][-1] < run.history["loss"][0]


def test_autoguides_of_global_latents():
    """The guide's parameters are made when it is first run: before the optimiser asks for them."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    x = 3.0 + data(200)[:, 1]
    guide = AutoNormal(model)
    fit(model, guide, x, epochs=150, batch_size=50, optimizer=adam(0.03), seed=0)
    assert guide.median(x)["mean"] == pytest.approx(float(x.mean()), abs=0.1)
    # the posterior of all 200 data, not of the 50 in a batch
    scale = guide.quantiles([0.8413], x)["mean"] - guide.median(x)["mean"]
    assert float(scale) == pytest.approx(1 / math.sqrt(200), rel=0.25)


# ---------------------------------------------------------------------------- history and scale


def test_history_is_the_objective_per_datum():
    problem = PROBLEMS["mixture"]()
    expected = -float(problem.log_prob.mean())
    for batch_size in (6, 4, 1):  # batches of 6; of 3 and 3; of 1
        run = fit(
            problem.model,
            problem.guide,
            problem.args,
            epochs=3,
            batch_size=batch_size,
            optimizer=still,
            validation=problem.args[0][:4],
        )
        assert run.history["loss"] == pytest.approx([expected] * 3)
        assert run.history["reconstruction"] == pytest.approx([-expected] * 3)
        held_out = -float(problem.log_prob[:4].mean())
        assert run.history["validation/loss"] == pytest.approx([held_out] * 3)
        assert run.num_epochs == 3


def test_mean_over_unequal_batches_is_weighted_by_their_size():
    """Seven data in batches of 3, 3 and 1."""
    mixture = GaussianMixture(2, 3)
    x = data(7).square()
    expected = -exact(mixture.model, mixture.guide, x).mean
    loader = DataLoader(TensorDataset(x), batch_size=3)
    for elbo in (TraceInfo_ELBO(), TraceEnum_ELBO()):
        run = fit(mixture.model, mixture.guide, loader, elbo=elbo, epochs=2, optimizer=still)
        assert run.history["loss"] == pytest.approx([expected] * 2)


def test_parts_add_up_to_the_loss():
    pair = linear_vae()
    elbo = TraceInfo_ELBO(alpha=0.25, lambda_=3.0, divergence=MMD())
    run = fit(pair.model, pair.guide, data(), elbo=elbo, epochs=4, batch_size=7, validation=data(9))
    names = ["loss", "reconstruction", "kl[z]", "divergence"]
    assert set(run.history) == {*names, *(f"validation/{n}" for n in names)}
    for prefix in ("", "validation/"):
        loss, reconstruction, kl, divergence = (run.history[prefix + n] for n in names)
        for epoch in range(4):
            total = -reconstruction[epoch] + 0.75 * kl[epoch] + 2.25 * divergence[epoch]
            assert loss[epoch] == pytest.approx(total)
    assert all(type(v) is float for values in run.history.values() for v in values)


class Fixed(dist.Normal):
    """A normal distribution whose draw is always at loc + scale / 2: objectives without noise."""

    def rsample(self, sample_shape=()):
        return (self.loc + 0.5 * self.scale).expand(self._extended_shape(sample_shape))

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Fixed, _instance))


def global_and_local(fixed=Fixed):
    """mean ~ N(0, 3), z_i ~ N(mean, 1), x_i ~ N(z_i, 0.5)."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.1))
        scale = pyro.param("scale", torch.tensor(0.2), constraint=constraints.positive)
        slope = pyro.param("slope", torch.tensor(0.5))
        pyro.sample("mean", fixed(loc, scale))
        with pyro.plate("data", len(x)):
            pyro.sample("z", fixed(slope * x, scale))

    return model, guide


@pytest.mark.parametrize(
    "elbo", [Trace_ELBO, TraceInfo_ELBO, lambda: TraceInfo_ELBO(alpha=-0.5, lambda_=1.5)]
)
def test_gradients_of_minibatches_average_to_that_of_all_data(elbo):
    """The global latent's KL counts once, whatever the batch size."""
    model, guide = global_and_local()
    x = data(10)[:, 0]
    module = PairModule(model, guide, elbo(), still, example=(x,), num_data=10)
    gradients, losses = [], []
    for sizes in ([10], [4, 3, 3]):
        for p in module.trained:
            p.grad = None
        total = 0.0
        for part in x.split(sizes):
            loss = module.loss((part,))[0] * len(part) / 10
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append(torch.stack([p.grad for p in module.trained]))
    assert losses[0] == pytest.approx(losses[1])
    assert torch.allclose(*gradients)
    # and all data at once is the objective as Pyro has it
    assert losses[0] == pytest.approx(elbo().loss(model, guide, x) / 10)


# ---------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("num", "batch_size"), [(10, 3), (10, 10), (10, 64), (7, 1), (129, 128)])
def test_batches_of_an_epoch_are_of_one_size_and_share_no_datum(num, batch_size):
    x = torch.arange(num)
    batches = Batches((x, 10.0 * x), batch_size, shuffle=True)
    orders = []
    for _ in range(2):
        parts = list(batches)
        assert len(parts) == len(batches) == math.ceil(num / batch_size)
        assert {len(a) for a, _ in parts} == {len(batches.smallest[0])}
        assert len(batches.smallest[0]) <= batch_size
        assert all(torch.equal(b, 10.0 * a) for a, b in parts)  # they stay aligned
        orders.append(torch.cat([a for a, _ in parts]))
        assert num - len(batches) < len(orders[-1].unique()) == len(orders[-1])
    assert not torch.equal(*orders)


def test_what_is_left_out_of_an_epoch_is_drawn_anew():
    batches = Batches(torch.arange(10), 4, shuffle=True)  # three batches of three
    pyro.set_rng_seed(0)
    counts = sum(
        torch.bincount(torch.cat([a for (a,) in batches]), minlength=10) for _ in range(500)
    )
    assert int(counts.sum()) == 4500
    # each is left out of a tenth of the epochs: 50 of 500, with a standard deviation of 6.7
    assert int((500 - counts).min()) > 20
    assert int((500 - counts).max()) < 80


@pytest.mark.parametrize(("num", "batch_size"), [(10, 3), (10, 10), (7, 2), (129, 128)])
def test_batches_in_order_cover_all_data_and_differ_by_one(num, batch_size):
    x = torch.arange(num)
    for batches in (Batches(x, batch_size), Batches(x, batch_size, shuffle=True)):
        parts = [a for (a,) in batches.in_order()]
        assert torch.equal(torch.cat(parts), x)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert torch.equal(torch.cat([a for (a,) in Batches(x, batch_size)]), x)


def test_order_comes_from_the_seed():
    batches = Batches(torch.arange(30), 8, shuffle=True)
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.append(torch.cat([a for (a,) in batches]))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


# ---------------------------------------------------------------------------- what is refused


class Labelled(PyroModule):
    """Labels given features; with ``broken`` the guide misses the latent."""

    def __init__(self, *, plate="data", broken=False, start=0.0, width=None):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.loc = nn.Parameter(torch.tensor(start))
        self.plate, self.broken, self.width = plate, broken, width

    @pyro_method
    def model(self, x, y):
        with pyro.plate(self.plate, self.width or len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            logits = self.linear(x) + z.unsqueeze(-1)
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    @pyro_method
    def guide(self, x, y):
        if not self.broken:
            with pyro.plate(self.plate, self.width or len(x)):
                pyro.sample("z", dist.Normal(self.loc, 0.5))


class Repeated(Labelled):
    """The features alone, in a plate over something else than the data."""

    def model(self, x, y):
        with pyro.plate("data", self.width or len(x)):
            pyro.sample("mean", dist.Normal(self.loc, 1.0), obs=x.mean())

    def guide(self, x, y):
        pass


class NoPlate(Labelled):
    def model(self, x, y):
        pyro.sample("x", dist.Normal(self.loc, 1.0).expand([len(x), 3]).to_event(2), obs=x)

    def guide(self, x, y):
        pass


def labels(num=20, bad_at=None, bad=4):
    y = torch.arange(num) % 4
    if bad_at is not None:
        y[bad_at] = bad
    return y


def spoilt(value, at=13):
    x = data()
    x[at, 1] = value
    return x


INFO_MMD = TraceInfo_ELBO(lambda_=2.0, divergence=MMD())
GOOD = {"data": lambda: (data(), labels())}
REFUSED = {
    "unequal lengths": (
        {"data": lambda: (data(), labels(19))},
        ValueError,
        r"same number of data; got \[20, 19\]",
    ),
    "empty": ({"data": lambda: (data(0), labels(0))}, ValueError, r"data\[0\].*one datum"),
    "no tensors": ({"data": lambda: ()}, TypeError, "tensor or a sequence of tensors"),
    "nan": (
        {"data": lambda: (spoilt(math.nan), labels())},
        ValueError,
        r"finite.*data\[0\].*\(13, 1\)",
    ),
    "infinity": (
        {"data": lambda: (spoilt(-math.inf), labels())},
        ValueError,
        r"finite.*data\[0\].*mask",
    ),
    "array": ({"data": lambda: data().numpy()}, TypeError, r"got ndarray.*torch\.as_tensor"),
    "array in a tuple": (
        {"data": lambda: (data(), labels().numpy())},
        TypeError,
        r"data\[1\].*got ndarray",
    ),
    "scalar": ({"data": lambda: torch.tensor(1.0)}, ValueError, "at least one dimension"),
    "one tensor too few": ({"data": data}, ValueError, "can be called with.*TypeError.*'y'"),
    "single precision": (
        {"data": lambda: (data().float(), labels())},
        ValueError,
        r"(?s)float32.*RuntimeError.*\.to\(",
    ),
    "features": (
        {"data": lambda: (data(features=3)[:, :2], labels())},
        ValueError,
        r"\(10, 2\).*RuntimeError.*shapes",
    ),
    "rank": (
        {"data": lambda: (data().unsqueeze(1), labels())},
        ValueError,
        r"(?s)plate.*data.*data\[0:10\]",
    ),
    "label in a later batch": (
        {"data": lambda: (data(), labels(bad_at=17))},
        ValueError,
        r"(?s)site 'y'.*support.*data\[10:20\]",
    ),
    "negative label": (
        {"data": lambda: (data(), labels(bad_at=18, bad=-1))},
        ValueError,
        r"(?s)site 'y'.*data\[10:20\]",
    ),
    "label in the validation data": (
        {"validation": lambda: (data(), labels(bad_at=17))},
        ValueError,
        r"(?s)site 'y'.*validation\[0:20\]",
    ),
    "validation of another shape": (
        {"validation": lambda: (data()[:, :2], labels())},
        ValueError,
        "validation data of the same shapes",
    ),
    "validation of another dtype": (
        {"validation": lambda: (data(), labels().float())},
        ValueError,
        "same shapes and dtypes",
    ),
    "validation of another number": ({"validation": data}, ValueError, "validation data of the"),
    "validation with nan": (
        {"validation": lambda: (spoilt(math.nan), labels())},
        ValueError,
        r"finite values in validation\[0\]",
    ),
    "other plate": (
        {"pair": lambda: Labelled(plate="rows")},
        ValueError,
        r"plate named 'data'.*\['rows'\].*plate=",
    ),
    "no plate": ({"pair": NoPlate}, ValueError, "plate named 'data'.*no plates"),
    "plate of another size": (
        {"pair": lambda: Repeated(width=4)},
        ValueError,
        "plate 'data' to hold the 10 data of a batch; got size 4",
    ),
    "guide misses a latent": (
        {"pair": lambda: Labelled(broken=True)},
        ValueError,
        r"guide to sample every latent.*'z'.*pyro\.sample\('z'",
    ),
    "no parameters": (
        {"pair": lambda: Labelled().requires_grad_(False)},
        ValueError,
        "parameters that require a gradient",
    ),
    "loss is not finite": (
        {"pair": lambda: Repeated(start=1e200)},
        ValueError,
        "finite loss before training; got .*other parameters",
    ),
    "one datum for a divergence": (
        {"data": lambda: (data(3), labels(3)), "batch_size": 2, "elbo": INFO_MMD},
        ValueError,
        "at least two data.*larger batch",
    ),
    "one validation datum for a divergence": (
        {"validation": lambda: (data(1), labels(1)), "elbo": INFO_MMD},
        ValueError,
        "two|2",
    ),
    "patience without validation": ({"patience": 3}, ValueError, "validation data.*validation="),
    "patience 0": ({"patience": 0, "validation": GOOD["data"]}, ValueError, "patience.*positive"),
    "epochs 0": ({"epochs": 0}, ValueError, "epochs to be a positive integer; got 0"),
    "epochs 1.5": ({"epochs": 1.5}, ValueError, "epochs to be a positive integer"),
    "batch size 0": ({"batch_size": 0}, ValueError, "batch_size to be a positive integer; got 0"),
    "no differentiable loss": (
        {"elbo": RenyiELBO(num_particles=2)},
        TypeError,
        r"differentiable loss; got RenyiELBO. Use TraceInfo_ELBO",
    ),
    "a class for an objective": ({"elbo": Trace_ELBO}, TypeError, "instance.*got Trace_ELBO"),
    "optimiser of Pyro": (
        {"optimizer": pyro.optim.Adam({"lr": 1e-3})},
        TypeError,
        r"optimizer.*torch\.optim\.Adam\(p",
    ),
    "scheduler of losses": (
        {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
        TypeError,
        r"scheduler.*after every step.*makes ReduceLROnPlateau",
    ),
    "no scheduler": ({"scheduler": lambda o: o}, TypeError, "scheduler.*makes SGD"),
    "device": ({"device": "nowhere"}, RuntimeError, "nowhere"),
    "callbacks in trainer": ({"trainer": {"callbacks": []}}, ValueError, "callbacks= instead"),
    "unknown trainer setting": ({"trainer": {"epoch": 3}}, TypeError, "epoch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_training(name):
    settings, error, match = REFUSED[name]
    settings = {"data": GOOD["data"], "pair": Labelled, "batch_size": 10, **settings}
    pair = settings.pop("pair")()
    for key in {"data", "validation"} & settings.keys():
        settings[key] = settings[key]()
    before, steps = values_of(pair), []

    def counting(parameters):
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        optimizer.register_step_pre_hook(lambda *_: steps.append(1))
        return optimizer

    settings.setdefault("optimizer", counting)
    random_state = torch.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        fit(pair.model, pair.guide, **settings)
    assert "Expected" in str(caught.value) or not settings.keys().isdisjoint({"device", "trainer"})
    assert steps == []
    assert_same(values_of(pair), before)
    in_the_trainer = name in ("optimiser of Pyro", "unknown trainer setting")
    assert all(m.training is not in_the_trainer for m in pair.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_good_pair_of_the_table_is_accepted():
    pair = Labelled()
    before = values_of(pair)
    run = fit(pair.model, pair.guide, GOOD["data"](), epochs=1, validation=GOOD["data"]())
    assert run.stopped == "all epochs"
    assert not torch.equal(pair.loc, before[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused():
    pair = linear_vae()
    with pytest.raises(ValueError, match="without CUDA"):
        fit(pair.model, pair.guide, data(), device="cuda")


def test_a_plate_that_subsamples_by_itself_is_left_alone():
    x = data(30)[:, 0]

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x), subsample_size=5) as index:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[index])

    module = PairModule(model, None, Trace_ELBO(), still, example=(x,), num_data=30)
    pyro.set_rng_seed(3)
    loss = float(module.loss((x,))[0])
    pyro.set_rng_seed(3)
    assert loss == pytest.approx(Trace_ELBO().loss(model, lambda x: None, x) / 30)
    run = fit(model, None, x, epochs=60, optimizer=adam(0.1), seed=0)
    assert run.stopped == "all epochs"
    assert float(pyro.param("loc")) == pytest.approx(float(x.mean()), abs=0.5)


# ---------------------------------------------------------------------------- early stopping


def test_patience_stops_and_the_best_epoch_comes_back():
    problem = PlantedMixture()
    run = fit(
        *problem.pair,
        problem.train,
        epochs=300,
        optimizer=adam(0.05),
        validation=problem.valid,
        patience=4,
    )
    losses = run.history["validation/loss"]
    assert run.stopped == "no improvement"
    assert run.num_epochs < 300
    assert run.best_epoch == losses.index(min(losses)) == run.num_epochs - 1 - 4
    assert losses[-1] > min(losses) + 1e-4
    assert problem.loss(problem.valid) == pytest.approx(min(losses), abs=1e-12)


def test_the_best_epoch_comes_back_without_patience():
    problem = PlantedMixture()
    run = fit(
        *problem.pair, problem.train, epochs=30, optimizer=adam(0.1), validation=problem.valid
    )
    losses = run.history["validation/loss"]
    assert run.stopped == "all epochs"
    assert run.best_epoch == losses.index(min(losses)) < 29
    assert problem.loss(problem.valid) == pytest.approx(min(losses), abs=1e-12)


def test_without_validation_the_last_epoch_stays():
    problem = PlantedMixture()
    seen = []

    class Record(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(values_of(problem.mixture))

    run = fit(
        *problem.pair, problem.train, epochs=8, optimizer=adam(1.0), callbacks=[Record()]
    )  # so large a rate that the loss goes up and down
    assert run.best_epoch == 7
    assert run.history["loss"].index(min(run.history["loss"])) < 7
    assert_same(values_of(problem.mixture), seen[-1])


def test_validation_every_other_epoch():
    problem = PlantedMixture()
    run = fit(
        *problem.pair,
        problem.train,
        epochs=5,
        optimizer=adam(0.01),
        validation=problem.valid,
        trainer={"check_val_every_n_epoch": 2},
    )
    losses = run.history["validation/loss"]
    assert [math.isnan(v) for v in losses] == [True, False, True, False, True]
    assert run.best_epoch in (1, 3)
    assert problem.loss(problem.valid) == pytest.approx(losses[run.best_epoch])
    assert f"epoch {run.best_epoch}" in str(run)


def test_a_callback_can_end_the_run():
    class Enough(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch == 2

    pair = linear_vae()
    run = fit(pair.model, pair.guide, data(), epochs=9, callbacks=[Enough()])
    assert run.stopped == "a callback or setting"
    assert run.num_epochs == 3


# ---------------------------------------------------------------------------- seeds


def fitted(seed, **settings):
    pair = linear_vae(dropout=0.2)
    run = fit(
        pair.model, pair.guide, data(), epochs=3, batch_size=6, seed=seed, optimizer=adam(0.01)
    )
    return run.history, values_of(pair)


def test_same_seed_same_run():
    (history, values), (same_history, same_values) = fitted(7), fitted(7)
    other_history, other_values = fitted(8)
    assert history == same_history
    assert_same(values, same_values)
    assert history != other_history
    assert not torch.equal(values[0], other_values[0])


def test_without_a_seed_the_global_generator_goes_on():
    np.random.seed(5)
    random.seed(5)
    numpy_state, python_state = np.random.get_state(), random.getstate()
    state = torch.get_rng_state()
    first = fitted(None)  # which seeds torch for its parameters, then leaves it to go on
    assert not torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state))  # noqa: B905
    assert random.getstate() == python_state
    assert fitted(None)[0] == first[0]  # reproducible by the global seed alone
    pair = linear_vae()
    before = torch.get_rng_state()
    once = fit(pair.model, pair.guide, data(), epochs=2, optimizer=still).history
    assert not torch.equal(torch.get_rng_state(), before)
    assert fit(pair.model, pair.guide, data(), epochs=2, optimizer=still).history != once


# ---------------------------------------------------------------------------- interruptions


class Interrupting(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_index):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def test_an_interrupt_ends_the_run_like_any_other_end():
    """In the middle of the ninth epoch, when the validation loss is no longer the least."""
    problem = PlantedMixture()
    handler = signal.getsignal(signal.SIGINT)
    run = fit(
        *problem.pair,
        problem.train,
        epochs=100,
        batch_size=6,
        optimizer=adam(0.2),
        validation=problem.valid,
        callbacks=[Interrupting(17)],
    )
    losses = run.history["validation/loss"]
    assert run.stopped == "interrupted"
    assert run.num_epochs == 8
    assert run.best_epoch == losses.index(min(losses)) < 7
    assert problem.loss(problem.valid) == pytest.approx(min(losses), abs=1e-12)
    assert signal.getsignal(signal.SIGINT) is handler
    assert not problem.mixture.training


def test_an_interrupt_in_the_model_and_in_the_first_epoch():
    pair = linear_vae()
    calls = []

    def model(x):
        calls.extend([1] * pair.training)
        if pair.training and len(calls) > 5:
            raise KeyboardInterrupt
        return pair.model(x)

    before = pair.decoder.weight.detach().clone()
    run = fit(model, pair.guide, data(40), epochs=3, batch_size=2, optimizer=adam(0.1))
    assert run.stopped == "interrupted"
    assert run.best_epoch is None
    assert run.history == {}
    assert "0 epochs" in str(run)
    # what the steps so far have brought is not thrown away
    assert not torch.equal(pair.decoder.weight, before)


def test_a_real_signal():
    """As Ctrl-C sends it, from outside, at any time."""

    class Alarm(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    pair = linear_vae()
    start = time.perf_counter()
    # a shell's background jobs ignore the signal, and would run to the last epoch
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run = fit(pair.model, pair.guide, data(), epochs=10**5, callbacks=[Alarm()])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outer)
    assert run.stopped == "interrupted"
    assert 2 <= run.num_epochs < 10**5
    assert {len(v) for v in run.history.values()} == {run.num_epochs}
    assert time.perf_counter() - start < 30


def test_other_errors_are_passed_on():
    class Fails(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            raise ZeroDivisionError("mine")

    pair = linear_vae()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(pair.model, pair.guide, data(), epochs=3, callbacks=[Fails()])
    assert signal.getsignal(signal.SIGINT) is handler
    assert not pair.training


# ---------------------------------------------------------------------------- divergence


class Diverging(torch.optim.SGD):
    """Gradient ascent by a huge step, from the n-th step on."""

    def __init__(self, parameters, calm, rate=1e200):
        super().__init__(parameters, lr=0.01)
        self.calm, self.rate, self.count = calm, rate, 0

    def step(self, closure=None):
        self.count += 1
        if self.count > self.calm:
            self.param_groups[0]["lr"] = self.rate
        return super().step(closure)


@pytest.mark.parametrize("calm", [0, 1, 5, 6, 9, 10, 11])
@pytest.mark.parametrize("rate", [1e6, 1e200, math.nan])
@pytest.mark.parametrize("validated", [False, True])
def test_a_loss_that_is_not_finite_leaves_the_last_good_parameters(calm, rate, validated):
    """Twelve epochs of two steps; the rate goes wild at one in the middle, or at the last.

    With the rate 1e6 it takes some steps more, with 1e200 the parameters are finite after the step
    and their loss is not, and with nan neither is.
    """
    pair = linear_vae()
    x = data()
    run = fit(
        pair.model,
        pair.guide,
        x,
        epochs=12 if rate == 1e6 else 6,
        batch_size=10,
        optimizer=lambda p: Diverging(p, calm, rate),
        validation=data(12) if validated else None,
        seed=0,
    )
    loss = TraceMeanField_ELBO().loss(pair.model, pair.guide, x)
    assert all(bool(torch.isfinite(p).all()) for p in pair.parameters())
    assert math.isfinite(loss)
    assert run.stopped == "loss not finite"
    if rate != 1e6:
        # the finished epochs before the wild step are kept, and nothing after it
        good = calm // 2
        losses = run.history["validation/loss"][:good] if validated else range(good, 0, -1)
        assert run.best_epoch == (losses.index(min(losses)) if good else None)
    assert not pair.training


def test_parameters_that_a_distribution_refuses_end_the_run_too():
    """A covariance of nan can't be factored: the model raises, with every check switched off."""
    x = data(8)

    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        root = pyro.param("root", torch.eye(3))
        with pyro.plate("data", len(x)):
            covariance = root @ root.T + 0.1 * torch.eye(3)
            pyro.sample("x", dist.MultivariateNormal(loc, covariance), obs=x)

    for batch_size in (2, 8):
        pyro.clear_param_store()
        run = fit(
            model,
            None,
            x,
            epochs=5,
            batch_size=batch_size,
            optimizer=lambda p: Diverging(p, 0, math.nan),
        )
        assert run.stopped == "loss not finite"
        assert torch.equal(pyro.param("root"), torch.eye(3))
        assert run.num_epochs <= 2


def test_a_parameter_that_the_loss_does_not_see_is_never_handed_back_as_nan():
    pair = linear_vae()
    pair.spare = nn.Parameter(torch.zeros(3))

    class Spoiling(torch.optim.SGD):
        count = 0

        def step(self, closure=None):
            super().step(closure)
            self.count += 1
            if self.count == 3:
                pair.spare.data.fill_(math.nan)

    run = fit(pair.model, pair.guide, data(), epochs=6, optimizer=lambda p: Spoiling(p, lr=0.01))
    assert run.stopped == "loss not finite"
    assert run.best_epoch == 1
    assert torch.equal(pair.spare, torch.zeros(3))


# ---------------------------------------------------------------------------- modules


@pytest.mark.parametrize("training", [True, False])
def test_modules_end_in_evaluation_mode(training):
    pair = linear_vae(dropout=0.5, norm=True).train(training)
    seen = []

    class Record(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_index):
            seen.append(all(m.training for m in pair.modules()))

        def on_validation_batch_start(self, trainer, module, batch, batch_index):
            seen.append(not any(m.training for m in pair.modules()))

    fit(pair.model, pair.guide, data(), epochs=2, validation=data(), callbacks=[Record()])
    assert seen == [True] * 4
    assert not any(m.training for m in pair.modules())


@pytest.mark.parametrize("elbo", [TraceInfo_ELBO, TraceEnum_ELBO, Trace_ELBO])
def test_running_statistics_see_each_training_batch_once(elbo):
    pair = linear_vae(norm=True)
    reference = nn.BatchNorm1d(3)
    x = data()
    run = fit(
        pair.model, pair.guide, x, elbo=elbo(), epochs=2, optimizer=adam(0.1), validation=x + 0.1
    )
    assert run.best_epoch == 1
    for _ in range(2):
        reference(x)
    norm = pair.encoder[0]
    assert norm.num_batches_tracked == 2
    assert torch.allclose(norm.running_mean, reference.running_mean)
    assert torch.allclose(norm.running_var, reference.running_var)


def test_buffers_are_those_of_the_best_epoch():
    pair = linear_vae(norm=True)
    seen = []

    class Record(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(values_of(pair))

    run = fit(
        pair.model,
        pair.guide,
        data(),
        epochs=4,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, maximize=True),  # worse and worse
        validation=data(30),
        callbacks=[Record()],
    )
    assert run.best_epoch == 0
    assert_same(values_of(pair), seen[0])
    assert not torch.equal(seen[0][-2], seen[1][-2])


def test_refused_data_change_no_running_statistics():
    pair = linear_vae(norm=True)
    before = values_of(pair)
    with pytest.raises(ValueError, match="finite values"):
        fit(pair.model, pair.guide, spoilt(math.nan))
    with pytest.raises(ValueError, match="can be called with"):
        fit(pair.model, pair.guide, (data(), data()))
    with pytest.raises(TypeError, match="optimizer"):
        fit(pair.model, pair.guide, data(), optimizer=lambda p: None)
    assert_same(values_of(pair), before)


@pytest.mark.parametrize("name", ["linear.weight", "loc"])
def test_frozen_parameters_stay(name):
    """Pyro itself would train a frozen parameter that a PyroModule holds directly."""
    pair = Labelled()
    frozen = pair.get_parameter(name).requires_grad_(False)
    before = dict(zip(dict(pair.named_parameters()), values_of(pair), strict=True))
    run = fit(pair.model, pair.guide, GOOD["data"](), epochs=3, optimizer=adam(0.1))
    assert not frozen.requires_grad
    changed = {n for n, p in pair.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"linear.weight", "linear.bias", "loc"} - {name}
    assert run.num_parameters == 4 * 3 + 4 + 1 - frozen.numel()


def test_one_step_of_a_shared_parameter_is_the_optimisers():
    """slope is in model and guide, as a module's parameter and in the param store."""

    class Shared(PyroModule):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.7))

        @pyro_method
        def model(self, x):
            pyro.module("shared", self)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.slope * z, 1.0), obs=x)

        @pyro_method
        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.slope * x, 0.8))

    x = data()[:, 0]
    pair = Shared()
    run = fit(pair.model, pair.guide, x, epochs=1, optimizer=adam(0.1), seed=3)
    assert run.num_parameters == 1
    # z = slope x + 0.8 e by hand, with the order of the data and the noise of that seed
    slope = torch.tensor(0.7, requires_grad=True)
    pyro.set_rng_seed(3)
    shuffled = x[torch.randperm(len(x))]
    z = slope * shuffled + 0.8 * torch.randn(len(x))
    kl = 0.5 * (0.64 + (slope * shuffled) ** 2 - 1 - math.log(0.64))
    loss = (kl - dist.Normal(slope * z, 1.0).log_prob(shuffled)).mean()
    loss.backward()
    torch.optim.Adam([slope], lr=0.1).step()
    assert run.history["loss"] == pytest.approx([float(loss)])
    assert float(pair.slope) == pytest.approx(float(slope), abs=1e-12)
    assert float(slope) != 0.7


def test_no_gradient_is_left_behind():
    pair = linear_vae()
    fit(pair.model, pair.guide, data(), epochs=1)
    assert all(p.grad is None for p in pair.parameters())


# ---------------------------------------------------------------------------- Lightning


def test_optimizer_callbacks_and_settings_arrive():
    pair = linear_vae()
    made, metrics, clips = [], [], []

    def optimizer(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.5))
        return made[-1]

    class Record(pl.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            norms = [p.grad.norm() for p in pair.parameters()]
            clips.append(float(torch.stack(norms).norm()))

        def on_validation_end(self, trainer, module):
            metrics.append(float(trainer.callback_metrics["validation/loss"]))

    before = torch.cat([v.flatten() for v in values_of(pair)])
    run = fit(
        pair.model,
        pair.guide,
        data(),
        epochs=1,
        optimizer=optimizer,
        validation=data(9),
        callbacks=[Record()],
        trainer={"gradient_clip_val": 1e-3},
    )
    assert len(made) == 1
    assert metrics == pytest.approx(run.history["validation/loss"])
    after = torch.cat([v.flatten() for v in values_of(pair)])
    assert clips[0] > 1e-2
    assert float((after - before).norm()) == pytest.approx(0.5 * 1e-3, rel=1e-3)


def test_nothing_is_written_or_said(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    pair = linear_vae()
    remarks = logging.handlers.BufferingHandler(100)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [remarks])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(pair.model, pair.guide, data(), epochs=3, validation=data(), patience=2)
    assert [str(w.message) for w in caught] == []
    assert [r.getMessage() for r in remarks.buffer] == []
    assert list(tmp_path.iterdir()) == []
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_printed_form():
    problem = PROBLEMS["mixture"]()
    run = fit(
        problem.model,
        problem.guide,
        problem.args,
        epochs=4,
        optimizer=still,
        validation=problem.args,
    )
    loss = -float(problem.log_prob.mean())
    first, second = str(run).split("\n")
    assert first == f"4 epochs in {run.seconds:.1f} s (all epochs), 9 parameters"
    shown = second.removeprefix("  epoch 0: ").removesuffix(" (nats per datum)").split(", ")
    assert set(shown) == {
        f"loss {loss:.3f}",
        f"reconstruction {-loss:.3f}",
        f"validation/loss {loss:.3f}",
        f"validation/reconstruction {-loss:.3f}",
    }
    assert repr(run) == str(run)


def test_signature_is_keyword_only_after_the_data():
    kinds = [p.kind.name for p in inspect.signature(fit).parameters.values()]
    assert kinds[:3] == ["POSITIONAL_OR_KEYWORD"] * 3
    assert set(kinds[3:]) == {"KEYWORD_ONLY"}


# ---------------------------------------------------------------------------- devices


def test_devices(device):
    """The data stay where the user has them, and so do the parameters."""
    pair = linear_vae(norm=True)
    x = data(60)
    run = fit(
        pair.model,
        pair.guide,
        x,
        elbo=TraceInfo_ELBO(lambda_=2.0, divergence=MMD()),
        epochs=20,
        batch_size=16,
        optimizer=adam(0.02),
        validation=data(20, seed=3),
        patience=15,
        device=device,
        seed=0,
    )
    assert run.history["loss"][-1] < run.history["loss"][0] - 0.5
    assert {t.device.type for t in (*pair.parameters(), *pair.buffers())} == {"cpu"}
    pair.guide(x)


def test_param_store_on_devices(device):
    x = PROBLEMS["mixture"]().args[0].to(device)

    def model(x):
        loc = pyro.param("loc", lambda: torch.tensor([[-1.0, 0.0], [1.0, 0.5]], device=device))
        with pyro.plate("data", len(x)):
            weights = torch.tensor([0.5, 0.5], device=device)
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x)

    run = fit(model, None, x, epochs=10, optimizer=adam(0.05))
    assert run.history["loss"][-1] < run.history["loss"][0]
    assert pyro.param("loc").device.type == device


def test_enumerated_arguments_are_the_modules():
    """fit leaves what inspect_pair says of a pair as it was."""
    problem = PROBLEMS["semi_supervised"]()
    before = inspect_pair(problem.model, problem.guide, problem.args)
    fit(problem.model, problem.guide, problem.args, epochs=1)
    assert inspect_pair(problem.model, problem.guide, problem.args) == before
