"""Several processes: two of them are one with the whole batch, and end together."""

import faulthandler
import itertools
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn
from torch.distributions import constraints
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_lvm.divergences import MMD, Adversarial, Stein
from pyro_lvm.infer import LinearSchedule, TraceInfo_ELBO, TraceIW_ELBO, comparison
from pyro_lvm.infer.gathering import across_processes
from pyro_lvm.training import Batches, checkpoint, fit, lightning, saving
from pyro_lvm.training.lightning import PairModule
from pyro_lvm.training.processes import OtherProcessError
from pyro_lvm.training.strategies import device_of_process, distributed_settings

TIMEOUT = 180  # seconds for all runs together, on a machine with other work
EPOCHS = 10  # of five batches


class NormalAt(dist.Normal):
    """A normal distribution whose draws come from noise that is given, as data are."""

    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def rsample(self, sample_shape=()):
        assert not sample_shape
        return self.loc + self.scale * self.noise

    def expand(self, batch_shape, _instance=None):
        return NormalAt(*(t.expand(batch_shape) for t in (self.loc, self.scale, self.noise)))


class Net(PyroModule):
    """A VAE of owned parameters. The data bring the noise of posterior and prior along."""

    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(5)
        self.encoder = nn.Sequential(*[nn.BatchNorm1d(3)] * norm, nn.Linear(3, 2))
        self.decoder = nn.Linear(2, 3)
        self.scale = PyroParam(torch.full((2,), 0.4), constraint=constraints.positive)

    @pyro_method
    def model(self, x, noise, prior_noise):
        zero = torch.zeros_like(prior_noise)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", NormalAt(zero, zero + 1, prior_noise).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)
            self.also(x)

    def also(self, x):
        pass

    @pyro_method
    def guide(self, x, noise, prior_noise):
        with pyro.plate("data", len(x)):
            loc = self.encoder(x)
            scale = self.scale.expand_as(loc)
            pyro.sample("z", NormalAt(loc, scale, noise).to_event(1))


class Functions:
    """Plain functions, all of whose parameters are in Pyro's param store."""

    def __init__(self):
        torch.manual_seed(5)
        self.net = nn.Linear(3, 2)

    def model(self, x, noise, prior_noise):
        width = pyro.param("width", torch.tensor(0.7), constraint=constraints.positive)
        loc = pyro.param("loc", torch.zeros(2, requires_grad=True))
        pyro.param("unused", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            prior = NormalAt(loc.expand(len(x), 2), torch.ones(len(x), 2), prior_noise)
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), width).to_event(1), obs=x)

    def guide(self, x, noise, prior_noise):
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            loc = self.net(x)
            pyro.sample("z", NormalAt(loc, torch.full_like(loc, 0.3), noise).to_event(1))


class Global(Net):
    """The same with a latent of all data, at a point."""

    @pyro_method
    def model(self, *args):
        pyro.sample("shift", dist.Normal(3.0, 0.1))
        super().model(*args)

    @pyro_method
    def guide(self, *args):
        pyro.sample("shift", dist.Delta(pyro.param("shift_at", torch.tensor(0.0))))
        super().guide(*args)


class Closure(Functions):
    """Plain functions that close over a network with running statistics."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(3), self.net)
        self.state_dict = self.net.state_dict


class Drawing(Net):
    """The same with noise of its own, batch normalisation, and the draws of the first step."""

    def __init__(self):
        super().__init__(norm=True)
        self.draws = []

    @pyro_method
    def guide(self, x, *_):
        with pyro.plate("data", len(x)):
            loc = self.encoder(x)
            z = pyro.sample("z", dist.Normal(loc, self.scale).to_event(1))
            if self.training and not self.draws:
                self.draws.append(((z - loc) / self.scale)[0].detach())


class Weighted(nn.Module):
    """A divergence with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, q, p):
        return MMD()(q * self.weight, p * self.weight)


def discriminator():
    torch.manual_seed(6)
    return Adversarial(nn.Linear(2, 1), generator="minimax", learning_rate=0.02)


def data(num=40, seed=11):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(num, 7, generator=generator, dtype=torch.float64)
    x, noise, prior_noise = draws.split([3, 2, 2], 1)
    return x + torch.tensor([2.0, 0.0, -1.0]), noise, prior_noise


def info(divergence=None, **settings):
    return TraceInfo_ELBO(alpha=0.5, lambda_=20.0, divergence=divergence or MMD(), **settings)


def run(make=Net, **settings):
    """A fit, and all that it leaves behind."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    net, elbo = make(), settings.pop("elbo", TraceInfo_ELBO)()
    settings = {"validation": data(13, seed=2), "epochs": EPOCHS, "batch_size": 8, **settings}
    settings = {"optimizer": lambda p: torch.optim.Adam(p, lr=0.05), **settings}
    if "LOCAL_RANK" in os.environ or __name__ == "__main__":
        settings["trainer"] = {"devices": 2, "strategy": "ddp", **settings.pop("trainer", {})}
    result = fit(net.model, net.guide, settings.pop("data", data()), elbo=elbo, **settings)
    return {
        "history": result.history,
        "values": values_of(net, elbo),
        "ends": (result.best_epoch, result.stopped, result.diagnosis, result.num_parameters),
        "draws": getattr(net, "draws", None),
    }


def values_of(*owners):
    modules = [m for m in owners if hasattr(m, "state_dict")]
    modules += [e.divergence for e in owners if isinstance(getattr(e, "divergence", 0), nn.Module)]
    owned = [t for m in modules for t in m.state_dict().values()]
    return [t.detach().clone() for t in (*owned, *pyro.get_param_store().values())]


# ---------------------------------------------------------------------------- runs

IN_ORDER = DataLoader(TensorDataset(*data()), batch_size=8)  # for which nothing is drawn
SAME = {
    "ELBO": {"validation": None},
    "InfoVAE": {"elbo": info, "validation": None},
    "validation": {"elbo": info},
    "param store": {"make": Functions, "elbo": info},
    "unequal parts": {"data": data(35), "batch_size": 7, "elbo": info},
    "a divergence with parameters": {"elbo": lambda: info(Weighted())},
    "gradients over two batches": {"elbo": info, "trainer": {"accumulate_grad_batches": 2}},
    "several particles": {"elbo": lambda: info(num_particles=2, vectorize_particles=True)},
    "several runs": {"elbo": lambda: info(num_particles=2)},
    "a global latent": {"make": Global, "elbo": info},
    "a discriminator": {"elbo": lambda: info(discriminator()), "epochs": 4},
    "a score": {"make": Functions, "elbo": lambda: info(Stein())},
    "a schedule": {"elbo": lambda: info(kl_weight=LinearSchedule(0.0, 1.0, steps=20))},
    "importance weights": {"elbo": lambda: TraceIW_ELBO(num_particles=3)},
    "patience": {"optimizer": lambda p: torch.optim.Adam(p, lr=2.0), "patience": 2, "epochs": 40},
    "DataLoader": {
        "data": DataLoader(TensorDataset(*data()), batch_size=8, shuffle=True),
        "elbo": info,
    },
}


def per_process():
    """As the others, with a divergence that sees the latents of one process only."""
    gather, comparison.gather_rows = comparison.gather_rows, lambda x: x
    try:
        return run(elbo=info)
    finally:
        comparison.gather_rows = gather


def is_fifth(x):
    return x[:, 0] == data()[0][5, 0]


class Spoilt(Net):
    """The loss of one datum is not finite as soon as a weight has grown."""

    def also(self, x):
        grown = pyro.param("grown", torch.tensor(0.5))
        pyro.factor("spoilt", grown + torch.where(is_fifth(x), 0.9 - grown, 1.0).log())


def spoilt_later():
    """Losses are looked at later, as on a device."""
    at_hand, lightning.is_at_hand = lightning.is_at_hand, lambda _: False
    try:
        return run(Spoilt, validation=None)
    finally:
        lightning.is_at_hand = at_hand


class Raising(Net):
    """One datum raises an error in the second epoch."""

    def __init__(self):
        super().__init__()
        self.steps = itertools.count()

    def also(self, x):
        if self.training and next(self.steps) > 5 and is_fifth(x).any():
            raise ValueError("datum 5")


class Late(Net):
    """A parameter that comes after some steps."""

    def __init__(self):
        super().__init__()
        self.steps = itertools.count()

    @pyro_method
    def guide(self, x, *rest):
        if self.training and next(self.steps) > 5:
            pyro.param("late", torch.tensor(1.0))
        super().guide(x, *rest)


class StopOne(pl.Callback):
    """Stops one process only, after a step."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        trainer.should_stop |= trainer.global_step == 7 and trainer.global_rank == 1


def with_a_full_disk(folder):
    """The first process can't write for some time."""
    write, numbers = checkpoint.write, itertools.count()

    def fails(*args):
        if 5 < next(numbers) < 15:
            raise OSError("No space left")
        write(*args)

    saving.write = fails
    try:
        return run(checkpoint_dir=folder, checkpoint_every=timedelta(0), epochs=4)
    finally:
        saving.write = write


class Odd(pl.Callback):
    """A callback whose state can't be in a checkpoint."""

    def state_dict(self):
        return {"model": nn.Linear(1, 1)}


def resumed(folder):
    """A run in two halves, and in one."""
    settings = {"make": Drawing, "checkpoint_every": timedelta(0), "epochs": 4}
    whole = run(checkpoint_dir=folder / "whole", **settings)
    run(checkpoint_dir=folder / "halves", **{**settings, "epochs": 2})
    return whole, run(checkpoint_dir=folder / "halves", resume=True, **settings)


def error_of(function, *args, **settings):
    try:
        function(*args, **settings)
    except (ValueError, OtherProcessError) as error:  # what a test expects, and nothing else
        return f"{type(error).__name__}: {error}"
    return None


def by_lightning(loader, make=Functions):
    """Lightning's own trainer, with our module."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    net, elbo = make(), info()
    module = PairModule(
        net.model, net.guide, elbo, lambda p: torch.optim.Adam(p, lr=0.05),
        example=data(), num_data=40,
    )  # fmt: skip
    distributed = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
        **(distributed if "LOCAL_RANK" in os.environ or __name__ == "__main__" else {}),
    )  # fmt: skip
    trainer.fit(module, loader)
    return {"history": module.history, "values": values_of(net, elbo), "ends": None}


def by_hand():
    """A training loop of torch's, with a part of all data for each process."""
    pyro.clear_param_store()
    net, elbo = Net(), info()
    loss, batch, num_processes = elbo(net.model, net.guide), data(), 1
    if "LOCAL_RANK" in os.environ:
        loss = nn.parallel.DistributedDataParallel(loss)
        part = slice(0, 15) if os.environ["LOCAL_RANK"] == "0" else slice(15, 40)
        batch, num_processes = [t[part] for t in batch], 2
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        with across_processes():
            (num_processes * loss(*batch)).backward()  # a sum over data, of which DDP takes a mean
        optimizer.step()
    return values_of(net, elbo)


def in_lightning():
    return by_lightning(Batches(data(), 8, shuffle=True))


def spoilt_in_lightning():
    return by_lightning(Batches(data(), 8, shuffle=True), Spoilt)


def with_a_sampler():
    return by_lightning(DataLoader(TensorDataset(*data()), batch_size=4, shuffle=True))


class Stream(IterableDataset):
    def __iter__(self):
        return zip(*data(), strict=True)

    def __len__(self):
        return 40


OTHERS = {
    "one process": per_process,
    "spoilt": lambda: run(Spoilt, validation=None),
    "spoilt later": spoilt_later,
    "raising": lambda: error_of(run, Raising, validation=None),
    "late": lambda: error_of(run, Late, validation=None),
    "stop": lambda: run(callbacks=[StopOne()]),
    "other data": lambda: error_of(run, data=data(seed=int(os.environ["LOCAL_RANK"] or 0))),
    "too small": lambda: error_of(run, batch_size=1),
    "stream": lambda: error_of(run, data=DataLoader(Stream(), batch_size=8)),
    "drawing": lambda: run(Drawing, elbo=info, epochs=4, data=IN_ORDER),
    "closure": lambda: run(Closure, elbo=info, epochs=4),
    "by hand": by_hand,
    "Lightning": in_lightning,
    "spoilt in Lightning": spoilt_in_lightning,
    "Lightning's sampler": with_a_sampler,
}


def all_runs(folder):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    results = {name: run(**settings) for name, settings in SAME.items()}
    results |= {name: function() for name, function in OTHERS.items()}
    results["without checkpoints"] = run(epochs=4)
    results["resumed"] = resumed(folder)
    results["full disk"] = with_a_full_disk(folder / "full")
    odd = {"callbacks": [Odd()], "checkpoint_dir": folder / "odd"}
    results["odd callback"] = error_of(run, **odd)
    elsewhere = folder / ("whole" if os.environ["LOCAL_RANK"] == "0" else "elsewhere")
    resume = {"make": Drawing, "checkpoint_dir": elsewhere, "resume": True}
    results["other folder"] = error_of(run, **resume)
    rank = os.environ["LOCAL_RANK"]
    (folder / f"results-{rank}").write_bytes(pickle.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a script leaves behind in each of two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, __file__, str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT + 20)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output
    return [pickle.loads((folder / f"results-{rank}").read_bytes()) for rank in (0, 1)]


def assert_equal(one, other, tolerance=0.0):
    """The same history, parameters, buffers and ends."""
    for name, values in one["history"].items():
        assert other["history"][name] == pytest.approx(values, abs=tolerance, rel=0, nan_ok=True)
    for a, b in zip(one["values"], other["values"], strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)
    assert one["ends"] == other["ends"]


# ---------------------------------------------------------------------------- two are one


@pytest.mark.parametrize("name", SAME)
def test_two_processes_are_one(name, results, float64):
    first, second = (r[name] for r in results)
    assert_equal(first, second)
    one = run(**SAME[name])
    assert_equal(first, one, tolerance=1e-9)
    assert abs(one["history"]["loss"][-1] - one["history"]["loss"][0]) > 0.5


def test_a_divergence_of_single_processes_is_another_one(results, float64):
    """So that the test above would notice."""
    first, second = (r["one process"] for r in results)
    assert_equal(first, second)  # gradients are still averaged
    one = run(elbo=info)
    losses = zip(first["history"]["loss"], one["history"]["loss"], strict=True)
    assert all(abs(a - b) > 1e-3 for a, b in losses)
    values = zip(first["values"], one["values"], strict=True)
    assert max(float((a - b).abs().max()) for a, b in values) > 1e-2


def test_our_module_in_lightnings_trainer(results, float64):
    first, second = (r["Lightning"] for r in results)
    assert_equal(first, second)
    assert_equal(first, in_lightning(), tolerance=1e-9)
    first, second = (r["Lightning's sampler"] for r in results)
    assert_equal(first, second)
    assert first["history"]["loss"][-1] < first["history"]["loss"][0] - 1.0


def test_a_loop_of_ones_own(results, float64):
    one = by_hand()
    for result in results:
        torch.testing.assert_close(result["by hand"], one, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ["drawing", "closure"])
def test_buffers_are_the_same(name, results):
    first, second = (r[name] for r in results)
    assert_equal(first, second)
    means = [a for a in first["values"] if a.dtype == torch.int64]
    assert all(int(a) > 0 for a in means)
    assert means


def test_processes_draw_different_noise(results):
    (first,), (second,) = (r["drawing"]["draws"] for r in results)
    assert (first - second).abs().min() > 1e-3


# ---------------------------------------------------------------------------- ends


def test_a_loss_that_is_not_finite_ends_all(results, float64):
    first, second = (r["spoilt"] for r in results)
    assert_equal(first, second)
    _, stopped, diagnosis, _ = first["ends"]
    assert stopped == "loss not finite"
    assert "site 'spoilt' of the model" in diagnosis
    assert diagnosis.endswith("at datum 5.")
    with pytest.warns(UserWarning, match="at datum 5"):
        assert_equal(first, run(Spoilt, validation=None), tolerance=1e-9)


def test_a_loss_that_is_not_finite_changes_nothing(results, float64):
    """Lightning's trainer leaves the parameters where they were before that step."""
    one = spoilt_in_lightning()
    assert math.isnan(one["history"]["loss"][-1])
    for result in results:
        assert_equal(result["spoilt in Lightning"], one, tolerance=1e-9)


def test_a_loss_that_is_looked_at_later_ends_all(results):
    first, second = (r["spoilt later"] for r in results)
    assert_equal(first, second)
    _, stopped, diagnosis, _ = first["ends"]
    assert stopped == "loss not finite"
    assert diagnosis.startswith("The loss was nan in epoch 2, batch 1: ")


def test_one_that_stops_stops_all(results):
    first, second = (r["stop"] for r in results)
    assert_equal(first, second)
    assert first["ends"][1] == "a callback or setting"
    assert len(first["history"]["loss"]) == 2


def test_an_error_in_one_ends_all(results):
    errors = sorted(r["raising"] for r in results)
    assert errors[0].startswith("OtherProcessError: Expected a loss in each of 2 processes; got an")
    assert errors[1].startswith("ValueError: datum 5")


REFUSED = {
    "late": r"ValueError: .*got param_store.late in a later call",
    "other data": r"ValueError: Expected the same data in 2 processes; got 40 data",
    "too small": r"ValueError: .*for each of 2 processes; got a batch of 1\.",
    "stream": r"ValueError: .*2 processes can share; got a DataLoader of Stream",
    "other folder": r"ValueError: Expected the same checkpoint .*; got step-0000000020.pt in",
    "odd callback": r"CheckpointError: Expected plain data",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_in_all(name, results):
    first, second = (r[name] for r in results)
    assert first == second
    assert re.match(REFUSED[name], first)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_strategies_whose_processes_do_not_come_back_are_refused(strategy, float64):
    net = Net()
    trainer = {"strategy": strategy, "devices": 2}
    with pytest.raises(ValueError, match=r"starts the script once.*got .*'ddp', 'devices': 2"):
        fit(net.model, net.guide, data(), trainer=trainer)


def test_each_process_has_a_device(monkeypatch):
    monkeypatch.setattr(CUDAAccelerator, "parse_devices", staticmethod(lambda _: [2, 3]))
    cuda = torch.device("cuda")
    assert device_of_process(cuda, {"devices": [2, 3]}).index == 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_of_process(cuda, {"devices": [2, 3]}).index == 3
    assert device_of_process(torch.device("cuda", 0), {"devices": "auto"}).index == 3
    assert device_of_process(cuda, {}) == cuda
    assert device_of_process(torch.device("cpu"), {"devices": 2}).type == "cpu"


@pytest.mark.parametrize(
    "settings",
    [{"strategy": "ddp"}, {"devices": 2}, {"devices": [0, 1]}, {"devices": 1, "num_nodes": 2}],
)
def test_ddp_allows_parameters_without_a_gradient(settings):
    expected = {**settings, "strategy": "ddp_find_unused_parameters_true"}
    assert distributed_settings(settings) == expected
    for other in ({}, {"devices": 1}, {"devices": 2, "strategy": "ddp_spawn"}):
        assert distributed_settings(other) == other


# ---------------------------------------------------------------------------- checkpoints


def test_a_resumed_run_is_an_uninterrupted_one(results):
    for result in results:
        assert_equal(*result["resumed"])
    assert_equal(results[0]["resumed"][1], results[1]["resumed"][1])


def test_a_full_disk_does_not_end_the_run(results):
    first, second = (r["full disk"] for r in results)
    assert_equal(first, second)
    assert_equal(first, results[0]["without checkpoints"])


if __name__ == "__main__":
    faulthandler.dump_traceback_later(TIMEOUT, exit=True)  # whatever becomes of the tests
    all_runs(Path(sys.argv[1]))
