"""Checkpoints: a run that is killed, or whose disk fails it, goes on as if nothing had happened."""

import itertools
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn
from torch.distributions import constraints

from pyro_lvm.infer import TraceInfo_ELBO
from pyro_lvm.storage import files
from pyro_lvm.training import Batches, checkpoint, fit, saving
from pyro_lvm.training.lightning import PairModule

EVERY_STEP = timedelta(0)
EPOCHS = 6


class Net(PyroModule):
    """A VAE with all that has a state: batch normalisation, dropout, a constrained parameter."""

    def __init__(self, features=3):
        super().__init__()
        layers = nn.BatchNorm1d(features), nn.Dropout(0.2), nn.Linear(features, 2)
        self.encoder = nn.Sequential(*layers)
        self.decoder = nn.Linear(2, features)
        self.scale = PyroParam(torch.ones(2), constraint=constraints.positive)

    @pyro_method
    def model(self, x):
        width = pyro.param("width", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            # a story may draw from any generator
            noise = random.gauss(0.0, 0.01) + np.random.normal(0.0, 0.01) * self.training
            pyro.sample("x", dist.Normal(self.decoder(z) + noise, width).to_event(1), obs=x)

    @pyro_method
    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), self.scale).to_event(1))


class LateInPython(Net):
    """A pair that learns its offset only after some steps, which it counts."""

    def __init__(self):
        super().__init__()
        self.count = itertools.count(1)

    def steps(self):
        return next(self.count)

    @pyro_method
    def guide(self, x):
        if self.training and self.steps() > 7:
            pyro.param("late", torch.tensor(0.5), constraint=constraints.positive)
        super().guide(x)


class Late(LateInPython):
    """The same with a counter that a checkpoint sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("so_far", torch.tensor(0))

    def steps(self):
        self.so_far += 1
        return self.so_far


class Functions:
    """Plain functions that close over a network with buffers."""

    def __init__(self):
        self.net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.state_dict = self.net.state_dict

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("net", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 0.5).to_event(1))


def data(num=23, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, generator=generator) + torch.tensor([2.0, 0.0, -1.0])


def adam(lr=0.05):
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def run(directory=None, make=Net, **settings):
    """A run from the start, and all that it leaves behind."""
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    net = make()
    settings = {"epochs": EPOCHS, "validation": data(9, seed=2), "seed": 3, **settings}
    if directory is not None:
        settings = {"checkpoint_dir": directory, "checkpoint_every": EVERY_STEP, **settings}
    settings = {"optimizer": adam(), "batch_size": 5, **settings}
    result = fit(net.model, net.guide, settings.pop("data", data()), **settings)
    return result, state_of(net)


def state_of(net):
    store = [p.detach().clone() for _, p in sorted(pyro.get_param_store().items())]
    return [*(v.clone() for v in net.state_dict().values()), *store, torch.get_rng_state()]


def assert_same(one, other):
    (one_result, one_state), (other_result, other_state) = one, other
    assert one_result.history.keys() == other_result.history.keys()
    for name, values in one_result.history.items():
        np.testing.assert_array_equal(values, other_result.history[name])
    assert one_result.best_epoch == other_result.best_epoch
    assert one_result.stopped == other_result.stopped
    assert all(torch.equal(a, b) for a, b in zip(one_state, other_state, strict=True))


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


# ---------------------------------------------------------------------------- kills


def killed(directory, prepare, **settings):
    """Whether a forked process that runs kills itself, as ``prepare`` has arranged."""
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            run(directory, resume=True, **settings)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def at_call(owner, name, number, *, after=False):
    """Arrange to be killed before, or after, the n-th call of a function."""

    def prepare():
        function, calls = getattr(owner, name), []

        def counting(*args, **kwargs):
            calls.append(1)
            if after:
                result = function(*args, **kwargs)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result if after else function(*args, **kwargs)

        setattr(owner, name, counting)

    return prepare


MOMENTS = {
    "before the first checkpoint": at_call(saving, "write", 1),
    "in the first checkpoint": at_call(checkpoint._Hashing, "write", 20),
    "in the first step": at_call(PairModule, "training_step", 1),
    "within an epoch": at_call(PairModule, "training_step", 8),
    "at the end of an epoch": at_call(PairModule, "training_step", 10, after=True),
    "in validation": at_call(PairModule, "validation_step", 3),
    "at the end of validation": at_call(PairModule, "on_validation_epoch_end", 2, after=True),
    "in the middle of a checkpoint": at_call(checkpoint._Hashing, "write", 1000),
    "before a checkpoint is renamed": at_call(os, "replace", 5),
    "after it was": at_call(files, "_sync_directory", 9),
    "in the last epoch": at_call(PairModule, "training_step", 5 * EPOCHS - 1),
}


@pytest.mark.parametrize("every", [EVERY_STEP, 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_if_nothing_had_happened(moment, every, uninterrupted, tmp_path):
    assert killed(tmp_path, MOMENTS[moment], checkpoint_every=every)
    assert_same(run(tmp_path, checkpoint_every=every, resume=True), uninterrupted)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".pt"]  # nothing half-written


SETTINGS = {
    "no validation": {"validation": None},
    "validation within epochs": {"trainer": {"val_check_interval": 2}},
    "validation every other epoch": {"trainer": {"check_val_every_n_epoch": 2}},
    "gradients over two batches": {"trainer": {"accumulate_grad_batches": 2}},
    "part of the batches": {"trainer": {"limit_train_batches": 3}},
    "every other epoch": {"checkpoint_every": 2},
    "momentum": {"optimizer": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)},
    "one cycle of learning rates": {
        "scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=100)
    },
    "an objective of Pyro's": {"elbo": Trace_ELBO()},
    "no seed": {"seed": None},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_kills_with_other_settings(name, tmp_path):
    settings = {"checkpoint_every": EVERY_STEP, **SETTINGS[name]}
    expected = run(**settings)
    for step in (4, 8):
        assert killed(tmp_path, at_call(PairModule, "training_step", step), **settings)
    assert_same(run(tmp_path, resume=True, **settings), expected)


@pytest.mark.parametrize("make", [Late, Functions])
@pytest.mark.parametrize("step", [4, 7, 8, 9, 22])
def test_kills_of_other_pairs(make, step, tmp_path):
    expected = run(make=make)
    assert killed(tmp_path, at_call(PairModule, "training_step", step), make=make)
    assert_same(run(tmp_path, make=make, resume=True), expected)


def test_what_a_pair_declares_only_later_must_be_there_to_resume(tmp_path):
    """A counter in Python starts again from 0, so that the parameter is not there yet."""
    run(tmp_path, make=LateInPython, epochs=3)
    with pytest.raises(ValueError, match=r"late'.*instead of none.*declared before"):
        run(tmp_path, make=LateInPython, resume=True)

    class Declared(LateInPython):
        def __init__(self):
            super().__init__()
            pyro.param("late", torch.tensor(2.0), constraint=constraints.positive)
            self.count = itertools.count(16)

    class DeclaredByHand(Declared):
        def steps(self):
            return 0  # the pair itself does not declare it any more

    resumed, _ = run(tmp_path, make=DeclaredByHand, resume=True, epochs=3)
    assert resumed.num_parameters == run(make=LateInPython, epochs=3)[0].num_parameters
    assert_same(run(tmp_path, make=Declared, resume=True), run(make=LateInPython))


def test_checkpoints_change_nothing(uninterrupted, tmp_path):
    for every in (EVERY_STEP, 1, 4, timedelta(hours=1)):
        folder = tmp_path / str(every)
        assert_same(run(folder, checkpoint_every=every), uninterrupted)
        steps = [int(p.stem.removeprefix("step-")) for p in sorted(folder.glob("step-*"))]
        previous = {EVERY_STEP: 29, 1: 25, 4: 20}.get(every, 0)
        assert steps == [previous, 30]
        assert len(list(folder.iterdir())) == 3


def test_a_program_that_is_killed_from_outside(uninterrupted, tmp_path):
    moments = random.Random(0)
    command = [sys.executable, __file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.stdout.readline() != "epoch 3\n":
            assert process.poll() is None
        time.sleep(moments.uniform(0.0, 0.02))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert_same(run(tmp_path, resume=True), uninterrupted)


class Announce(pl.Callback):
    def on_train_epoch_start(self, trainer, module):
        print(f"epoch {trainer.current_epoch}", flush=True)


# ---------------------------------------------------------------------------- ends and extensions


def test_a_finished_run_is_not_trained_again(uninterrupted, tmp_path):
    run(tmp_path)
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}

    class Fails(pl.Callback):
        def on_train_batch_start(self, *_):
            raise AssertionError

    again = run(tmp_path, resume=True, callbacks=[Fails()])
    assert again[0].history == uninterrupted[0].history
    assert again[0].stopped == "all epochs"
    assert all(torch.equal(a, b) for a, b in zip(again[1], uninterrupted[1], strict=True))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_more_epochs_go_on(uninterrupted, tmp_path):
    run(tmp_path, epochs=EPOCHS - 3)
    assert_same(run(tmp_path, resume=True), uninterrupted)
    with pytest.raises(ValueError, match=f"epochs >= {EPOCHS}.*got 2"):
        run(tmp_path, resume=True, epochs=2)


@pytest.mark.parametrize("step", [12, None])
def test_patience_is_remembered(step, tmp_path):
    """The rate is so large that the validation loss soon rises."""
    settings = {"optimizer": adam(1.5), "patience": 2, "epochs": 40, "checkpoint_every": 1}
    expected = run(**settings)
    assert expected[0].stopped == "no improvement"
    if step is not None:
        assert killed(tmp_path, at_call(PairModule, "training_step", step), **settings)
    assert_same(run(tmp_path, resume=True, **settings), expected)
    assert_same(run(tmp_path, resume=True, **settings), expected)
    longer = run(tmp_path, resume=True, **{**settings, "patience": 4})
    assert_same(longer, run(**{**settings, "patience": 4}))


def test_an_interrupt_can_be_resumed(uninterrupted, tmp_path):
    class Interrupt(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_index):
            if trainer.global_step == 12:
                raise KeyboardInterrupt

    assert run(tmp_path, callbacks=[Interrupt()])[0].stopped == "interrupted"
    assert_same(run(tmp_path, resume=True), uninterrupted)


def test_a_diverged_run_has_its_last_good_checkpoint(tmp_path):
    class Diverging(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["lr"] = math.nan if self.steps == 12 else 0.01
            self.steps += 1
            return super().step(closure)

        steps: Any = 0

    settings = {"optimizer": lambda p: Diverging(p, lr=0.01)}
    with pytest.warns(UserWarning, match="epoch 2, batch 3.*parameters of epoch 1"):
        result, _ = run(tmp_path, **settings)
    assert result.stopped == "loss not finite"
    saved = checkpoint.newest(tmp_path)[1]["state_dict"]
    assert all(torch.isfinite(v).all() for k, v in saved.items() if k != "_extra_state")


def test_the_best_parameters_are_a_file(tmp_path):
    result, _ = run(tmp_path, optimizer=adam(0.5), epochs=12)
    assert 0 < result.best_epoch < 11
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["epoch"] == result.best_epoch
    width = best["values"]["param_store.width"].exp()
    assert torch.equal(width, pyro.get_param_store()["width"].detach())


def test_the_best_epoch_before_a_kill_is_remembered(tmp_path):
    settings = {"optimizer": adam(0.3), "epochs": 12}
    expected = run(**settings)
    assert expected[0].best_epoch < 10
    assert killed(tmp_path, at_call(PairModule, "training_step", 5 * 11 + 2), **settings)
    assert_same(run(tmp_path, resume=True, **settings), expected)


# ---------------------------------------------------------------------------- bad files


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_the_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"0")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, flip_the_last_bit, empty, lengthen])
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(damage, uninterrupted, tmp_path):
    run(tmp_path, epochs=3)
    first, second = sorted(tmp_path.glob("step-*"))
    damage(second)
    with pytest.warns(UserWarning, match=rf"checksum.*Going on from {first.name}"):
        again = run(tmp_path, resume=True)
    assert_same(again, uninterrupted)
    for path in tmp_path.glob("step-*"):
        damage(path)
    with pytest.raises(checkpoint.CheckpointError, match="got 2, none of which can"):
        run(tmp_path, resume=True)


def test_files_are_plain_data_for_torch_alone(tmp_path):
    run(tmp_path)
    for path in tmp_path.iterdir():
        assert torch.load(path, weights_only=True)


def test_nothing_but_plain_data_is_unpickled(tmp_path):
    checkpoint.write(tmp_path / "step-0000000001.pt", {"settings": pytest.approx(1.0)})
    with pytest.raises(checkpoint.CheckpointError, match=r"plain data.*got UnpicklingError"):
        run(tmp_path, resume=True)


def test_a_callback_whose_state_could_not_be_read_is_refused_at_once(tmp_path):
    class Odd(pl.Callback):
        def state_dict(self):
            return {"model": nn.Linear(1, 1)}

    with pytest.raises(checkpoint.CheckpointError, match="Expected plain data"):
        run(tmp_path, callbacks=[Odd()])
    assert list(tmp_path.glob("step-*")) == []


OTHERS = {
    "data": ({"data": data(seed=1)}, r"data 23 data .* instead of 23 data"),
    "number of data": ({"data": data(22)}, "data 23 data .* instead of 22 data"),
    "validation": ({"validation": None}, "validation 9 data.* instead of None"),
    "batch size": ({"batch_size": 6}, "batch_size 5 instead of 6"),
    "seed": ({"seed": 4}, "seed 3 instead of 4"),
    "objective": ({"elbo": Trace_ELBO()}, "elbo TraceInfo_ELBO instead of Trace_ELBO"),
    "optimiser": ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.05)}, "Adam.* instead of SGD"),
    "learning rate": ({"optimizer": adam(0.1)}, "lr=0.05.* instead of .*lr=0.1"),
    "scheduler": (
        {"scheduler": lambda o: torch.optim.lr_scheduler.ConstantLR(o)},
        "scheduler None instead of ConstantLR",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_checkpoint_of_another_run_is_refused(name, tmp_path):
    run(tmp_path, epochs=1)
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    settings, match = OTHERS[name]
    with pytest.raises(ValueError, match=f"(?s)Expected.*{match}.*another checkpoint_dir"):
        run(tmp_path, resume=True, **settings)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_the_checkpoint_of_another_pair_is_refused(tmp_path):
    run(tmp_path, epochs=1)
    pyro.clear_param_store()
    other = Net()
    other.decoder = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 3))
    before = [p.detach().clone() for p in other.parameters()]
    settings = {"validation": data(9, seed=2), "seed": 3, "optimizer": adam(), "batch_size": 5}
    with pytest.raises(ValueError, match=r"this pair; got.*'owners.0.decoder.0.weight' missing"):
        fit(other.model, other.guide, data(), checkpoint_dir=tmp_path, resume=True, **settings)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_what_is_refused_before_training(tmp_path):
    run(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"without checkpoints for a new run.*resume=True"):
        run(tmp_path)
    with pytest.raises(ValueError, match="checkpoint_dir= to resume from; got none"):
        run(resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a folder; got the file"):
        run(tmp_path / "file")
    for every in (0, 1.5, timedelta(seconds=-1)):
        with pytest.raises(ValueError, match="checkpoint_every"):
            run(tmp_path / "new", checkpoint_every=every)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------- full disks


class FullDisk(pl.Callback):
    """No file of this process can grow beyond a limit, from one epoch on until another."""

    def __init__(self, first, last, limit):
        self.first, self.last, self.limit = first, last, limit

    def on_train_epoch_start(self, trainer, module):
        limits = {self.first: self.limit, self.last: resource.RLIM_INFINITY}
        if trainer.current_epoch in limits:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[trainer.current_epoch], hard))


@pytest.mark.parametrize("limit", [0, 5_000])
def test_a_full_disk_does_not_end_the_run(limit, uninterrupted, tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            names = sorted(p.name for p in tmp_path.iterdir())
            seen.append([n for n in names if n != "best.pt"])

    with pytest.warns(UserWarning, match="No checkpoint was written after step 15 .*File too lar"):
        result = run(tmp_path, checkpoint_every=1, callbacks=[FullDisk(2, 4, limit), Look()])
    assert_same(result, uninterrupted)
    before = ["step-0000000005.pt", "step-0000000010.pt"]
    assert seen[2:5] == [before, before, before]
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-0000000025.pt",
        "step-0000000030.pt",
    ]


# ---------------------------------------------------------------------------- Lightning alone


def trained_by_lightning(directory, epochs, resume=None, batch_size=5):
    """A pair without modules, in Lightning's own trainer with its own checkpoints."""
    pyro.clear_param_store()
    pyro.set_rng_seed(2)

    def model(x):
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(loc + z[:, None], 1.0).to_event(1), obs=x)

    def guide(x):
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(1), scale))

    batches = Batches(data(), batch_size, shuffle=True)
    module = PairModule(
        model, guide, TraceInfo_ELBO(), adam(), example=batches.smallest, num_data=23
    )
    saver = ModelCheckpoint(dirpath=directory, filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[saver], logger=False,
        enable_progress_bar=False, enable_model_summary=False, barebones=False,
    )  # fmt: skip
    trainer.fit(module, batches, ckpt_path=resume)
    return module.history, [p.detach().clone() for p in module.trained]


def test_lightning_resumes_a_pair_from_its_own_checkpoints(tmp_path):
    history, values = trained_by_lightning(tmp_path / "all", 5)
    trained_by_lightning(tmp_path / "part", 2)
    last = tmp_path / "part" / "epoch=1.ckpt"
    again, same_values = trained_by_lightning(tmp_path / "rest", 5, resume=last)
    assert again == history
    assert all(torch.equal(a, b) for a, b in zip(values, same_values, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), resume=True, callbacks=[Announce()])
