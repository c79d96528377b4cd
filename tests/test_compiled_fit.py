"""Fitting by compiled steps is fitting, and stops being compiled where it would not be."""

import shutil
import warnings
from datetime import timedelta

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback
from problems import PROBLEMS
from pyro.infer import Trace_ELBO
from torch.utils.data import Dataset

import pyro_lvm as lvm
from pyro_lvm.compiled import CompiledStep, step
from pyro_lvm.training.batches import Batches
from pyro_lvm.training.choice import takes_compiled_steps

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
NUM_DATA, BATCH = 70, 2  # more steps in an epoch than in a group


@pytest.fixture
def as_recorded(monkeypatch):
    """Graphs as they were recorded: what a compiler would make of them takes seconds."""
    monkeypatch.setattr(step, "compile_graph", lambda graph, inputs: graph)


@pytest.fixture(autouse=True)
def _in_double_precision(float64):
    pass


def data(num=NUM_DATA):
    torch.manual_seed(7)
    return torch.randn(num, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5]) + 1.0


def vae():
    torch.manual_seed(3)
    encoder = lvm.nn.MLP(3, [8], head=lvm.nn.NormalHead(2))
    decoder = lvm.nn.MLP(2, [8], head=lvm.nn.NormalHead(3))
    return lvm.VAE(encoder, decoder)


def one_cycle(optimizer):
    """Changes learning rate and momentum in each of the 105 steps of a fit."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=110)


def fitted(pair, *, compile, **settings):
    defaults = {"epochs": 3, "batch_size": BATCH, "seed": 1, "progress": False}
    result = lvm.fit(pair.model, pair.guide, data(), compile=compile, **{**defaults, **settings})
    return result, [p.detach().clone() for p in pair.parameters()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9)},
        {"elbo": Trace_ELBO()},
        {"trainer": {"gradient_clip_val": 0.5}},
        {"trainer": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}},
        {"validation": data()[:9], "patience": 1},
        {"scheduler": one_cycle},
    ],
    ids=["adam", "sgd", "pyro's objective", "norm", "value", "validation", "one cycle"],
)
def test_the_same_fit_as_in_python(as_recorded, settings):
    ours, parameters = fitted(vae(), compile=True, **settings)
    theirs, expected = fitted(vae(), compile=False, **settings)
    torch.testing.assert_close(parameters, expected)
    assert ours.history.keys() == theirs.history.keys()
    for name, values in theirs.history.items():
        assert ours.history[name] == pytest.approx(values)
    assert (ours.best_epoch, ours.stopped) == (theirs.best_epoch, theirs.stopped)
    start = [p.detach() for p in vae().parameters()]
    assert max(float((a - b).abs().max()) for a, b in zip(parameters, start, strict=True)) > 1e-3


@needs_compiler
def test_the_same_fit_by_the_compiler(device):
    pairs = vae().to(device), vae().to(device)
    _, parameters = fitted(pairs[0], compile=True, device=device)
    _, expected = fitted(pairs[1], compile=False, device=device)
    torch.testing.assert_close(parameters, expected, rtol=1e-6, atol=1e-8)


def test_a_plain_pair_s_parameters_are_those_of_the_param_store(as_recorded):
    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    lvm.fit(
        model,
        None,
        data(),
        epochs=40,
        batch_size=10,
        compile=True,
        progress=False,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )
    torch.testing.assert_close(pyro.param("loc"), data().mean(0), rtol=0, atol=0.3)


class Plain(torch.nn.Module):
    """A parameter that no call of a module shows: a method of the pair reads it."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(3))

    def model(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pass


def test_a_parameter_that_a_bound_method_reads_is_found(as_recorded):
    _, parameters = fitted(Plain(), compile=True)
    _, expected = fitted(Plain(), compile=False)
    torch.testing.assert_close(parameters, expected)
    assert parameters[0].abs().min() > 1e-3


class StopError(Exception):
    pass


def test_a_run_that_breaks_off_goes_on_bit_for_bit(as_recorded, tmp_path, monkeypatch):
    run = {"compile": "auto", "checkpoint_every": timedelta(0), "scheduler": one_cycle}
    _, expected = fitted(vae(), compile=True, scheduler=one_cycle)
    take, steps = CompiledStep.take, iter(range(10_000))

    def breaking(*args, **kwargs):
        if next(steps) == 50:  # in the second group of the second epoch
            raise StopError
        return take(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CompiledStep, "take", breaking)
        with pytest.raises(StopError):
            fitted(vae(), checkpoint_dir=tmp_path, **{**run, "compile": True})
    newest = max(int(path.stem.split("-")[-1]) for path in tmp_path.glob("*-*.pt"))
    assert newest == 35  # steps, not groups
    pair = vae()
    for p in pair.parameters():
        p.data.zero_()
    pyro.set_rng_seed(99)
    _, resumed = fitted(pair, checkpoint_dir=tmp_path, resume=True, **run)
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="compiled True instead of False"):
        fitted(vae(), checkpoint_dir=tmp_path, resume=True, **{**run, "compile": False})


class Annealed:
    """A normal mean whose prior has a weight in Python, as people anneal it."""

    def __init__(self):
        self.weight = 1.0
        self.loc = torch.nn.Parameter(torch.zeros(3))

    def parameters(self):
        return [pyro.get_param_store()._params["loc"]]

    def model(self, x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.weight * loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        pass


class Anneal(Callback):
    def __init__(self, pair):
        self.pair = pair

    def on_train_epoch_end(self, *_):
        self.pair.weight *= 0.5


def test_a_number_that_changes_in_python_is_seen(as_recorded):
    results = []
    for compiled in (True, False):
        pyro.clear_param_store()
        pair = Annealed()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(fitted(pair, compile=compiled, callbacks=[Anneal(pair)])[1])
        said = [w for w in caught if "not compiled" in str(w.message)]
        assert len(said) == compiled
        assert all("something in Python has changed" in str(w.message) for w in said)
    torch.testing.assert_close(*results)


def test_a_loss_that_is_not_finite_ends_the_run_as_in_python(as_recorded):
    def model(x):
        variance = pyro.param("variance", torch.tensor(1.0))  # nothing keeps it above 0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, variance.sqrt()).expand([3]).to_event(1), obs=x / 99)

    reports = []
    for compiled in (True, False):
        pyro.clear_param_store()
        with pytest.warns(UserWarning, match="The loss was nan"):
            result = lvm.fit(
                model,
                None,
                data(),
                epochs=50,
                batch_size=BATCH,
                seed=1,
                compile=compiled,
                progress=False,
                optimizer=lambda p: torch.optim.SGD(p, lr=0.01),
            )
        assert result.stopped == "loss not finite"
        reports.append(result.diagnosis)
        assert torch.isfinite(pyro.param("variance"))
    assert reports[0] == reports[1]
    assert "epoch 1" in reports[0]
    assert "site 'x' of the model has the parameter scale = nan" in reports[0]


def test_a_parameter_that_comes_later_is_trained(as_recorded):
    class Later:
        calls = 0

        def model(self, x):
            loc = pyro.param("loc", torch.zeros(3))
            self.calls += 1
            if self.calls > 20:
                loc = loc + pyro.param("shift", torch.zeros(3))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    pair = Later()
    lvm.fit(pair.model, None, data(), epochs=40, batch_size=10, compile=True, progress=False)
    assert pyro.param("shift").abs().min() > 1e-3


class Items(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return data()[index]


class EveryBatch(Callback):
    def on_train_batch_end(self, *_):
        pass


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data": Items()}, "data in memory"),
        ({"callbacks": [EveryBatch()]}, "EveryBatch with .'on_train_batch_end'."),
        ({"trainer": {"accumulate_grad_batches": 2}}, "accumulate_grad_batches"),
        ({"trainer": {"precision": "bf16-mixed"}}, "precision"),
        ({"optimizer": torch.optim.Adagrad}, "optimiser among"),
        ({"optimizer": lambda p: torch.optim.Adam(p, amsgrad=True)}, "without amsgrad"),
        ({"compile": "always"}, "compile to be True, False or 'auto'"),
    ],
)
def test_what_can_t_be_compiled_is_refused(change, match):
    pair = vae()
    before = [p.detach().clone() for p in pair.parameters()]
    settings = {"data": data(), "compile": True, "progress": False, **change}
    with pytest.raises(ValueError, match=match):
        lvm.fit(pair.model, pair.guide, **settings)
    torch.testing.assert_close(before, [p.detach() for p in pair.parameters()], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("epochs", "callbacks", "expected"),
    [(10, [], False), (300, [], True), (300, [EveryBatch()], False)],
)
def test_only_long_runs_that_can_are_compiled_by_themselves(epochs, callbacks, expected):
    def optimizer():
        return torch.optim.Adam([torch.zeros(1, requires_grad=True)])

    batches = Batches(data(), BATCH, shuffle=True)
    chosen = takes_compiled_steps(
        "auto", batches, optimizer, epochs=epochs, callbacks=callbacks, settings={}
    )
    assert chosen == expected


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_kind_of_pair_keeps_what_was_recorded(name):
    problem = PROBLEMS[name]()
    steps = CompiledStep(
        lvm.TraceInfo_ELBO(),
        problem.model,
        problem.guide,
        parts=True,
        backend=lambda graph, inputs: graph,
    )
    assert steps.check(*problem.args) is None  # nothing was recorded yet
    steps(*problem.args)
    state = torch.get_rng_state()
    assert steps.check(*problem.args) is None
    assert torch.equal(torch.get_rng_state(), state)
