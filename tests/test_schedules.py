"""Schedules: their values by hand, and the weight that is in force in every step of every kind."""

import copy
import itertools
import math
import shutil
import warnings
from datetime import timedelta
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_lvm as lvm
from pyro_lvm.compiled import CompiledStep, step
from pyro_lvm.compiled.objective import modules_of_objective
from pyro_lvm.compiled.recording import find, record
from pyro_lvm.divergences import MMD
from pyro_lvm.infer import TraceInfo_ELBO
from pyro_lvm.infer.schedules import (
    CyclicSchedule,
    LinearSchedule,
    Schedule,
    SigmoidSchedule,
    at_end,
)
from pyro_lvm.training import fit
from pyro_lvm.training.lightning import PairModule
from pyro_lvm.training.schedules import placed_parameters
from pyro_lvm.training.surroundings import evaluating
from pyro_lvm.training.tensors import PairTensors

pytestmark = pytest.mark.usefixtures("float64")

SCHEDULES = {"linear": LinearSchedule, "sigmoid": SigmoidSchedule, "cyclic": CyclicSchedule}
NUM_DATA, BATCH = 70, 2
STEPS = 35  # of an epoch, more than compiled steps take in a group


# ---------------------------------------------------------------------------- values


def number(tensor):
    return float(tensor.detach())


def logistic(x):
    return 1 / (1 + math.exp(-x))


def sigmoid_by_hand(share):
    low, high = logistic(-6), logistic(6)
    return (logistic(12 * share - 6) - low) / (high - low)


def test_linear_by_hand():
    schedule = LinearSchedule(-1.0, 3.0, steps=8)
    assert [schedule.at(t) for t in (0, 1, 4, 7)] == pytest.approx([-1.0, -0.5, 1.0, 2.5])
    assert schedule.at(0.5) == pytest.approx(-0.75)


def test_sigmoid_by_hand():
    schedule = SigmoidSchedule(0.0, 2.0, steps=10)
    for t in range(10):
        assert schedule.at(t) == pytest.approx(2 * sigmoid_by_hand(t / 10), abs=1e-15)
    assert schedule.at(5) == pytest.approx(1.0)
    assert schedule.at(1) == pytest.approx(0.0115, abs=1e-4)
    assert schedule.at(2) + schedule.at(8) == pytest.approx(2.0)


def test_cyclic_by_hand():
    schedule = CyclicSchedule(0.0, 1.0, steps=20, cycles=2, ramp=0.4)
    cycle = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [schedule.at(t) for t in range(24)] == pytest.approx(cycle * 2 + [1.0] * 4)
    default = CyclicSchedule(0.0, 1.0, epochs=40)  # four cycles of ten, a ramp in half of each
    assert [default.at(t) for t in (0, 3, 5, 9, 10, 13, 30, 39)] == pytest.approx(
        [0.0, 0.6, 1.0, 1.0, 0.0, 0.6, 0.0, 1.0]
    )


@pytest.mark.parametrize("cycles", [3, 7, 49])
@pytest.mark.parametrize("length", [98, 147, 500])
def test_every_cycle_starts_at_the_start(cycles, length):
    schedule = CyclicSchedule(0.0, 1.0, steps=length, cycles=cycles)
    lows = [t for t in range(length) if schedule.at(t) < schedule.at(t - 1) or t == 0]
    assert lows == [math.ceil(k * length / cycles) for k in range(cycles)]
    for t in lows:
        assert schedule.at(t) == pytest.approx(t * cycles % length / length / 0.5, abs=1e-15)


@pytest.mark.parametrize("kind", SCHEDULES.values())
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.1, 0.3), (1.0, -0.7), (0.2, 0.2)])
def test_both_ends_are_exact_and_it_stays_at_the_end(kind, start, end):
    schedule = kind(start, end, steps=48)
    assert schedule.at(-1) == schedule.at(0) == start
    assert {schedule.at(t) for t in (48, 48.5, 49, 10**9)} == {end}
    assert schedule.at(47) != end or kind is CyclicSchedule or start == end
    low, high = sorted((start, end))
    assert all(low <= schedule.at(t / 8) <= high for t in range(48 * 8))


@pytest.mark.parametrize("kind", [LinearSchedule, SigmoidSchedule])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.1, 0.3), (1.0, -0.7)])
def test_they_go_one_way(kind, start, end):
    values = [kind(start, end, steps=50).at(t) for t in range(52)]
    steps = [(b - a) * (1 if end > start else -1) for a, b in itertools.pairwise(values)]
    assert min(steps[:50]) > 0
    assert steps[50] == 0


# ---------------------------------------------------------------------------- in place


@pytest.mark.parametrize("kind", SCHEDULES.values())
@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_update_puts_a_value_in_force(kind, unit):
    schedule = kind(0.25, 1.0, **{f"{unit}s": 9})
    if kind is CyclicSchedule:
        schedule = kind(0.25, 1.0, **{f"{unit}s": 9}, cycles=2)
    weight = schedule.weight
    assert (schedule.unit, schedule.length, schedule.position) == (unit, 9, 0)
    assert float(weight) == 0.25
    for t in (3, 0, 8, 9, 12):
        counted = {"step": t, "epoch": 77} if unit == "step" else {"step": 77, "epoch": t}
        schedule.update(**counted)
        assert schedule.weight is weight
        assert float(weight) == schedule.at(t)
        assert schedule.position == t
        assert schedule.finished == (t >= 9)
    assert not weight.requires_grad


def test_a_loop_of_ones_own():
    schedule = LinearSchedule(0.0, 1.0, steps=4)
    pair = Shrinking()
    elbo = TraceInfo_ELBO(kl_weight=schedule)
    svi = SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 0.1 / NUM_DATA}), elbo)
    for _ in range(7):
        svi.step(data())
        schedule.step()
    assert [schedule.position, schedule.finished, float(schedule.weight)] == [7, True, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moves_keep_the_tensor_and_casts_its_value(dtype):
    schedule = LinearSchedule(0.1, 1.0, steps=10)
    assert schedule.weight.dtype == torch.float64
    weight = schedule.weight
    assert schedule.to("cpu", dtype).weight is weight
    schedule.step()
    assert weight.dtype == dtype
    assert float(weight) == float(torch.tensor(schedule.at(1), dtype=dtype))


def test_products_have_the_precision_of_the_model():
    weight = LinearSchedule(0.1, 1.0, steps=10).weight
    x = torch.randn(3, dtype=torch.float32, requires_grad=True)
    product = weight * x
    assert product.dtype == torch.float32
    product.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 0.1, dtype=torch.float32))
    in_double = weight * torch.ones(3, dtype=torch.float64)
    assert torch.equal(in_double, torch.full((3,), 0.1, dtype=torch.float64))  # to the last bit


@pytest.mark.parametrize("kind", SCHEDULES.values())
def test_states_and_copies(kind):
    schedule, other = (kind(0.0, 1.0, steps=30) for _ in range(2))
    schedule.update(step=4, epoch=0)
    weight = other.weight
    other.load_state_dict(schedule.state_dict())
    for found in (other, copy.deepcopy(schedule)):
        assert found.position == 4
        assert float(found.weight) == schedule.at(4) > 0
        found.step()
        assert float(found.weight) == schedule.at(5)
    assert other.weight is weight
    assert float(schedule.weight) == schedule.at(4)  # a copy is another one


def test_at_end_puts_them_back():
    schedules = LinearSchedule(0.0, 1.0, steps=10), CyclicSchedule(0.0, 2.0, epochs=8)
    for schedule in schedules:
        schedule.update(step=3, epoch=1)
    before = [float(s.weight) for s in schedules]
    within = []
    with pytest.raises(ZeroDivisionError), at_end([*schedules, schedules[0]]):
        within.append([float(s.weight) for s in schedules] + [1 / 0])
    with at_end([*schedules, schedules[0]]):  # one of them twice
        within.append([float(s.weight) for s in schedules])
    assert within == [[1.0, 2.0]]
    assert [float(s.weight) for s in schedules] == before
    assert [s.position for s in schedules] == [3, 1]


def test_representation():
    assert repr(LinearSchedule(0, 1, steps=5)) == "LinearSchedule(0, 1, steps=5)"
    assert (
        repr(CyclicSchedule(0.5, 2.0, epochs=9, cycles=3, ramp=0.25))
        == "CyclicSchedule(0.5, 2, epochs=9, cycles=3, ramp=0.25)"
    )


REFUSED = {
    "no length": (lambda: LinearSchedule(0, 1), "length of a schedule; got none.*LinearSchedule"),
    "two lengths": (lambda: SigmoidSchedule(0, 1, steps=3, epochs=4), "got both, 3 and 4"),
    "no steps": (lambda: LinearSchedule(0, 1, steps=0), "steps to be a positive integer; got 0"),
    "half a step": (lambda: LinearSchedule(0, 1, steps=2.5), "steps to be a positive integer"),
    "epochs": (lambda: SigmoidSchedule(0, 1, epochs=-1), "epochs to be a positive integer"),
    "start": (lambda: LinearSchedule(math.nan, 1, steps=3), "start to be a finite number; got nan"),
    "end": (lambda: CyclicSchedule(0, math.inf, steps=3), "end to be a finite number; got inf"),
    "cycles": (lambda: CyclicSchedule(0, 1, steps=9, cycles=0), "cycles to be a positive integer"),
    "short cycles": (
        lambda: CyclicSchedule(0, 1, epochs=7, cycles=4),
        "two epochs in each of 4 cycles; got epochs=7",
    ),
    "no ramp": (lambda: CyclicSchedule(0, 1, steps=9, ramp=0.0), r"ramp.*\(0, 1\].*got 0.0"),
    "long ramp": (lambda: CyclicSchedule(0, 1, steps=9, ramp=1.5), r"ramp.*\(0, 1\].*got 1.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    call, match = REFUSED[name]
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "Expected" in str(caught.value)


# ---------------------------------------------------------------------------- in every step


class Shrinking(nn.Module):
    """KL(N(loc, 1) || N(0, 1)) = loc^2 / 2, and nothing else depends on loc.

    A step of gradient descent with rate r under the KL weight w multiplies loc by 1 - r w.
    """

    def __init__(self, *, looks_at_values=False):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(1.0))
        self.looks_at_values = looks_at_values

    def model(self, x):
        if self.looks_at_values and float(x.sum()) > math.inf:
            raise AssertionError
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x)), 1.0))


class Tempered(nn.Module):
    """A pair that has its schedule in a module, for an objective that knows of none.

    The gradient by loc is the weight itself.
    """

    def __init__(self, schedule):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(1.0))
        self.story = nn.Module()
        self.story.weight_of_loc = schedule
        self.looks_at_values = False

    def model(self, x):
        if self.looks_at_values and float(x.sum()) > math.inf:
            raise AssertionError
        with pyro.plate("data", len(x)):
            loss = self.story.weight_of_loc.weight * self.loc.expand(len(x))
            pyro.factor("loss", -loss)

    def guide(self, x):
        pass


RATE = 0.125


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=RATE)


def data(num=NUM_DATA):
    return torch.randn(num, generator=torch.Generator().manual_seed(3))


def graphs(monkeypatch):
    """Let steps run as they were recorded; returns the list of all graphs."""
    made = []
    monkeypatch.setattr(step, "compile_graph", lambda graph, inputs: made.append(graph) or graph)
    return made


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
WAYS = ["in Python", "as recorded", "fallback", pytest.param("compiled", marks=needs_compiler)]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """A fit in one of the ways in which steps are taken, which checks that it was that one."""

    def run(pair, schedule, **settings):
        elbo = settings.pop("elbo", None) or TraceInfo_ELBO(kl_weight=schedule)
        made = graphs(monkeypatch) if request.param == "as recorded" else None
        pair.looks_at_values = request.param == "fallback"
        settings = {"epochs": 3, "batch_size": BATCH, "optimizer": sgd, **settings}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compile = request.param != "in Python"
            result = fit(pair.model, pair.guide, data(), elbo=elbo, compile=compile, **settings)
        said = [str(w.message) for w in caught if "Python" in str(w.message)]
        assert len(said) == (request.param == "fallback"), said
        assert made is None or len(made) == 1  # no other weight has another graph
        return result

    return run


def shrunk(schedule, steps):
    """loc after some steps by hand."""
    position = (lambda t: t) if schedule.unit == "step" else (lambda t: t // STEPS)
    return math.prod(1 - RATE * schedule.at(position(t)) for t in range(steps))


LENGTHS = {
    "within the first group": {"steps": 20},
    "beyond the first epoch": {"steps": 50},
    "longer than the run": {"steps": 5000},
    "epochs": {"epochs": 2},
}


@pytest.mark.parametrize("kind", ["linear", "cyclic"])
@pytest.mark.parametrize("name", LENGTHS)
def test_the_weight_in_force_is_that_of_the_step(way, kind, name):
    settings = {"cycles": 1} if kind == "cyclic" else {}
    schedule = SCHEDULES[kind](0.0, 1.0, **LENGTHS[name], **settings)
    pair, weight = Shrinking(), schedule.weight
    result = way(pair, schedule)
    assert number(pair.loc) == pytest.approx(shrunk(schedule, 3 * STEPS), rel=1e-12)
    counted = (
        range(3 * STEPS) if schedule.unit == "step" else [e for e in range(3) for _ in data(35)]
    )
    values = [schedule.at(t) for t in counted]
    means = [sum(values[e * STEPS : (e + 1) * STEPS]) / STEPS for e in range(3)]
    assert result.history["kl_weight"] == pytest.approx(means)
    assert schedule.weight is weight
    assert schedule.position == counted[-1]
    assert result.num_parameters == 1
    assert not weight.requires_grad


def test_schedules_of_single_sites_and_of_alpha(way):
    """1 - alpha and the site's weight multiply."""
    alpha, site = LinearSchedule(1.0, 0.0, steps=60), SigmoidSchedule(0.0, 2.0, epochs=2)
    pair = Shrinking()
    elbo = TraceInfo_ELBO(alpha=alpha, kl_weight={"z": site}, divergence=lambda q, p: 0.0 * q.sum())
    result = way(pair, None, elbo=elbo)
    factors = (1 - RATE * (1 - alpha.at(t)) * site.at(t // STEPS) for t in range(3 * STEPS))
    assert number(pair.loc) == pytest.approx(math.prod(factors), rel=1e-12)
    assert result.history["kl_weight[z]"] == pytest.approx([site.at(e) for e in range(3)])
    assert result.history["alpha"][0] == pytest.approx(sum(map(alpha.at, range(35))) / 35)
    assert set(result.weights) == {"alpha", "kl_weight[z]"}


def test_schedules_in_the_pair_are_advanced_too(way):
    schedule = LinearSchedule(1.0, 0.0, steps=80)
    pair = Tempered(schedule)
    result = way(pair, None, elbo=Trace_ELBO())
    moved = RATE * sum(schedule.at(t) for t in range(3 * STEPS))
    assert number(pair.loc) == pytest.approx(1 - moved, rel=1e-12)
    means = [sum(schedule.at(t) for t in range(e * STEPS, (e + 1) * STEPS)) / STEPS for e in (0, 1)]
    assert result.history["story.weight_of_loc"][:2] == pytest.approx(means)
    assert result.weights == ("story.weight_of_loc",)


def test_accumulated_gradients_have_one_weight():
    schedule = LinearSchedule(0.0, 1.0, steps=20)
    pair = Shrinking()
    fit(
        pair.model,
        pair.guide,
        data(),
        elbo=TraceInfo_ELBO(kl_weight=schedule),
        epochs=1,
        batch_size=BATCH,
        optimizer=sgd,
        trainer={"accumulate_grad_batches": 5},
    )
    assert schedule.position == 6  # seven steps for 35 batches
    assert number(pair.loc) == pytest.approx(shrunk(schedule, 7), rel=1e-12)


def test_a_new_run_starts_anew():
    schedule = LinearSchedule(0.0, 1.0, steps=10)
    for _ in range(2):
        pair = Shrinking()
        settings = {"epochs": 1, "batch_size": BATCH, "optimizer": sgd}
        fit(pair.model, pair.guide, data(), elbo=TraceInfo_ELBO(kl_weight=schedule), **settings)
        assert number(pair.loc) == pytest.approx(shrunk(schedule, STEPS), rel=1e-12)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_compiled_steps_and_losses_follow_without_another_graph(num_steps):
    made = []
    schedule = LinearSchedule(0.0, 1.0, steps=4)
    elbo, pair = TraceInfo_ELBO(kl_weight=schedule), Shrinking()
    backend = lambda graph, *_: made.append(graph) or graph  # noqa: E731
    take = CompiledStep(
        elbo,
        pair.model,
        pair.guide,
        sgd,
        num_steps=num_steps,
        divisor=NUM_DATA,
        backend=backend,
    )
    loss = lvm.compile(elbo, pair.model, pair.guide, backend=backend)
    names = [name for name, p in loss.named_parameters() if p.requires_grad]
    expected = 1.0
    for t in range(6):
        fixed = TraceInfo_ELBO(kl_weight=schedule.at(t)).loss(pair.model, pair.guide, data())
        assert float(loss(data()).detach()) == pytest.approx(fixed)
        take(data())  # the weight of a call holds for all its steps
        assert take.check(data()) is None
        expected *= (1 - RATE * schedule.at(t)) ** num_steps
        assert number(pair.loc) == pytest.approx(expected, rel=1e-12)
        schedule.step()
    assert len(made) == 2
    assert names == ["owners.0.loc"]
    assert take.optimizer.param_groups[0]["params"] == [pair.loc]


@needs_compiler
@pytest.mark.parametrize("divergence", [None, MMD()])
def test_a_model_in_single_precision_is_compiled_and_stays_so(divergence):
    """A scalar times a weight in double precision would ask for agreement to the last digits."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    encoder = lvm.nn.MLP(3, [8], head=lvm.nn.NormalHead(2))
    vae = lvm.VAE(encoder, lvm.nn.MLP(2, [8], head=lvm.nn.NormalHead(3)))
    schedules = {"kl_weight": LinearSchedule(0.1, 1.0, steps=9)}
    if divergence is not None:
        schedules["lambda_"] = SigmoidSchedule(1.0, 3.0, steps=9)
    elbo = TraceInfo_ELBO(divergence=divergence, **schedules)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(
            vae.model,
            vae.guide,
            torch.randn(60, 3),
            elbo=elbo,
            epochs=3,
            batch_size=6,
            compile=True,
        )
    assert not [w for w in caught if "not compiled" in str(w.message)]
    assert {p.dtype for p in vae.parameters()} == {torch.float32}


def test_losses_are_compared_in_the_precision_of_the_parameters():
    torch.set_default_dtype(torch.float32)
    pair, schedule = Shrinking(), LinearSchedule(0.1, 1.0, steps=4)

    class InDouble(Trace_ELBO):
        """As an objective is that multiplies its scalar loss by a weight."""

        schedules: ClassVar = {"weight": schedule}

        def differentiable_loss(self, *args, **kwargs):
            return super().differentiable_loss(*args, **kwargs) * schedule.weight

    elbo, given = InDouble(), (pair.model, pair.guide, (data(),))
    assert elbo.differentiable_loss(*given[:2], data()).dtype == torch.float64
    recording = record(elbo, *given, found=find(elbo, *given))
    assert recording.loss.dtype == torch.float32
    loss = recording.loss.double()
    assert recording.other_loss(loss * (1 + 1e-5)) is None  # a sum in another order
    assert recording.other_loss(loss * (1 + 1e-2)) is not None


def test_where_the_schedules_of_an_objective_are():
    """With the modules of the objective: they are moved, saved and looked up with these."""
    schedule, divergence, pair = LinearSchedule(0.0, 1.0, steps=4), Player(), Shrinking()
    elbo = TraceInfo_ELBO(kl_weight=schedule, lambda_=2.0, divergence=divergence)
    assert modules_of_objective(elbo) == [divergence, schedule]
    assert modules_of_objective(Trace_ELBO()) == []
    settings = {"example": (data(),), "num_data": NUM_DATA}
    module = PairModule(pair.model, pair.guide, elbo, sgd, **settings)
    assert module.schedules == {"kl_weight": schedule}
    assert list(module.owners) == [pair, divergence, schedule]
    assert {"owners.2.weight", "owners.2._extra_state"} <= module.state_dict().keys()
    assert list(lvm.compile(elbo, pair.model, pair.guide).owners) == list(module.owners)
    states = find(elbo, pair.model, pair.guide, (data(),)).states
    assert any(state is schedule.weight for state in states)
    assert not any(t is schedule.weight for t in module.tensors.changing().values())
    assert any(t is schedule.weight for t in module.tensors.all)  # which a run moves


def test_a_pair_is_where_its_parameters_are_and_not_where_a_weight_is():
    schedule, layer = LinearSchedule(0.0, 1.0, steps=4), nn.Linear(2, 2, device="meta")
    pair = nn.ModuleList([schedule, layer])
    assert next(placed_parameters([schedule, layer])).device.type == "meta"
    assert [p.device.type for p in placed_parameters([pair])] == ["meta"] * 2
    with evaluating([schedule]) as home:
        assert home is None  # data stay where they are
    assert PairTensors(pair, lambda device: []).device.type == "meta"


# ---------------------------------------------------------------------------- checkpoints


class StopError(Exception):
    pass


def vae():
    torch.manual_seed(3)
    encoder = lvm.nn.MLP(1, [4], head=lvm.nn.NormalHead(2))
    return lvm.VAE(encoder, lvm.nn.MLP(2, [4], head=lvm.nn.NormalHead(1)))


def scheduled(length=60):
    """An objective, new for every run, with all kinds of schedules and a player of its own."""
    return TraceInfo_ELBO(
        alpha=CyclicSchedule(0.5, 0.0, steps=60, cycles=3),
        lambda_=LinearSchedule(1.0, 2.0, epochs=2),
        kl_weight=SigmoidSchedule(0.0, 1.0, steps=length),
        divergence=Player(),
    )


def run(pair, *, elbo=None, **settings):
    elbo = elbo or scheduled()
    settings = {
        "epochs": 3,
        "batch_size": BATCH,
        "seed": 1,
        "validation": data(9)[:, None],
        **settings,
    }
    result = fit(pair.model, pair.guide, data()[:, None], elbo=elbo, **settings)
    values = [p.detach().clone() for p in [*pair.parameters(), *elbo.divergence.parameters()]]
    return result, values, [s.position for s in elbo.schedules.values()]


@pytest.mark.parametrize("compile", [False, True])
def test_a_run_that_breaks_off_goes_on_bit_for_bit(monkeypatch, tmp_path, compile):
    graphs(monkeypatch)
    settings = {"compile": compile}
    expected, parameters, positions = run(vae(), **settings)
    owner, name = (CompiledStep, "take") if compile else (PairModule, "training_step")
    method, steps = getattr(owner, name), iter(range(10_000))

    def breaking(*args, **kwargs):
        if next(steps) == 50:  # in the second epoch, and in a group of steps
            raise StopError
        return method(*args, **kwargs)

    settings |= {"checkpoint_dir": tmp_path, "checkpoint_every": timedelta(0)}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, breaking)
        with pytest.raises(StopError):
            run(vae(), **settings)
    pyro.set_rng_seed(99)
    result, resumed, resumed_positions = run(vae(), resume=True, **settings)
    assert all(torch.equal(a, b) for a, b in zip(resumed, parameters, strict=True))
    assert result.history == expected.history
    assert resumed_positions == positions == [104, 2, 104]
    with pytest.raises(ValueError, match=r"steps=60\) instead of alpha.*steps=70\)"):
        run(vae(), elbo=scheduled(70), resume=True, **settings)


def test_a_checkpoint_of_an_objective_without_schedules_is_refused(tmp_path):
    pair = Shrinking()
    settings = {"epochs": 1, "checkpoint_dir": tmp_path}
    fit(pair.model, pair.guide, data(), **settings)
    elbo = TraceInfo_ELBO(kl_weight=LinearSchedule(0.0, 1.0, epochs=1))
    with pytest.raises(ValueError, match="schedules None instead of kl_weight: LinearSchedule"):
        fit(pair.model, pair.guide, data(), elbo=elbo, resume=True, **settings)


# ---------------------------------------------------------------------------- validation


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def test_held_out_data_are_seen_under_the_weights_at_the_end():
    schedule = LinearSchedule(0.0, 1.0, epochs=4)
    pair = Shrinking()
    x = data()
    result = fit(
        pair.model,
        pair.guide,
        x,
        elbo=TraceInfo_ELBO(kl_weight=schedule),
        epochs=6,
        batch_size=BATCH,
        optimizer=still,
        validation=x,
        patience=3,
    )
    rest = -float(dist.Normal(0.0, 1.0).log_prob(x).mean())
    assert result.history["validation/loss"] == pytest.approx([rest + 0.5] * result.num_epochs)
    assert result.history["validation/kl_weight"] == [1.0] * result.num_epochs
    weights = result.history["kl_weight"]
    assert weights == pytest.approx([0.0, 0.25, 0.5, 0.75])  # and back after each validation
    assert result.stopped == "no improvement"  # since the loss is the same in each epoch


def test_an_error_in_validation_leaves_the_weight_of_the_step():
    schedule = LinearSchedule(0.25, 1.0, steps=1000)

    class Fails(Shrinking):
        def model(self, x):
            if not self.training and self.looks_at_values:
                raise ZeroDivisionError
            super().model(x)

    class Arm(Callback):
        def on_train_start(self, *_):
            pair.looks_at_values = True

    pair = Fails()
    with pytest.raises(ZeroDivisionError):
        fit(
            pair.model,
            pair.guide,
            data(),
            elbo=TraceInfo_ELBO(kl_weight=schedule),
            epochs=50,
            batch_size=BATCH,
            validation=data(5),
            callbacks=[Arm()],
        )
    assert schedule.position == STEPS - 1
    assert float(schedule.weight) == schedule.at(STEPS - 1)


def test_the_best_parameters_come_back_without_their_weight():
    schedule = LinearSchedule(0.0, 1.0, steps=100)
    pair = Shrinking()
    result = fit(
        pair.model,
        pair.guide,
        data(),
        elbo=TraceInfo_ELBO(kl_weight=schedule),
        epochs=3,
        batch_size=BATCH,
        optimizer=lambda p: torch.optim.SGD(p, lr=RATE, maximize=True),  # worse and worse
        validation=data(9),
    )
    assert result.best_epoch == 0
    grown = math.prod(1 + RATE * schedule.at(t) for t in range(STEPS))
    assert number(pair.loc) == pytest.approx(grown, rel=1e-12)
    assert schedule.position == 3 * STEPS - 1
    assert float(schedule.weight) == 1.0


# ---------------------------------------------------------------------------- too short a run


class Enough(Callback):
    """Ends a run at the end of an epoch, or in the middle of it as an impatient user does."""

    def __init__(self, epoch, *, interrupt=False):
        self.epoch, self.interrupt = epoch, interrupt

    def on_train_epoch_end(self, trainer, *_):
        trainer.should_stop = not self.interrupt and trainer.current_epoch == self.epoch

    def on_train_batch_start(self, trainer, *_):
        if self.interrupt and trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


REMEDY = "Train for more epochs, or shorten the schedule by {}s=."
LONG = {
    "steps": (
        {"steps": 500},
        {},
        [f"will end at 0.208, after 104 of the 500 steps that lead to 1. {REMEDY.format('step')}"],
    ),
    "one step": ({"steps": 105}, {}, ["will end at 0.990476, after 104 of the 105 steps"]),
    "just long enough": ({"steps": 104}, {}, []),
    "epochs": (
        {"epochs": 4},
        {},
        [f"will end at 0.5, after 2 of the 4 epochs that lead to 1. {REMEDY.format('epoch')}"],
    ),
    "one epoch": ({"epochs": 3}, {}, ["will end at 0.666667, after 2 of the 3 epochs"]),
    "just enough epochs": ({"epochs": 2}, {}, []),
    "left early": (
        {"steps": 100},
        {"callbacks": [Enough(0)]},
        ["ended at 0.34, after 34 of the 100"],
    ),
    "left when at the end": ({"steps": 34}, {"callbacks": [Enough(0)]}, []),
    "interrupted": (
        {"steps": 100},
        {"callbacks": [Enough(1, interrupt=True)]},
        ["ended at 0.34, after 34 of the 100 steps"],
    ),
    "foretold, and left even earlier": (
        {"steps": 200},
        {"callbacks": [Enough(0)]},
        ["will end at 0.52, after 104 of the 200", "ended at 0.17, after 34 of the 200"],
    ),
    "few steps": (
        {"steps": 34},
        {"trainer": {"accumulate_grad_batches": 5}},
        ["will end at 0.588235, after 20 of the 34"],
    ),
    "most steps": ({"steps": 34}, {"trainer": {"max_steps": 18}}, ["will end at 0.5, after 17"]),
    "part of an epoch": (
        {"steps": 34},
        {"trainer": {"limit_train_batches": 3}},
        ["ended at 0.235294, after 8 of the 34"],
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_a_run_too_short_for_a_schedule_is_called_so_once(name):
    length, settings, expected = LONG[name]
    schedule = LinearSchedule(0.0, 1.0, **length)
    pair, seen = Shrinking(), []

    class First(Callback):
        def on_train_start(self, *_):
            seen.extend(caught)  # what was said before the first step

    settings = {"epochs": 3, "batch_size": BATCH, **settings}
    settings["callbacks"] = [First(), *settings.get("callbacks", [])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(pair.model, pair.guide, data(), elbo=TraceInfo_ELBO(kl_weight=schedule), **settings)
    texts = [str(w.message) for w in caught]
    assert len(texts) == len(expected), texts
    for text, beginning in zip(texts, expected, strict=True):
        assert text.startswith(f"The schedule of kl_weight {beginning}"), text
    assert len(seen) == sum("will end" in text for text in texts)
    assert all(w.filename == __file__ for w in caught)


def test_the_last_cycle_may_be_the_end_of_the_run():
    """Half of a cycle is at the end: nothing is missing."""
    pair = Shrinking()
    schedule = CyclicSchedule(0.0, 1.0, steps=3 * STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        elbo = TraceInfo_ELBO(kl_weight=schedule)
        fit(pair.model, pair.guide, data(), elbo=elbo, epochs=3, batch_size=BATCH)
    assert not schedule.finished


def test_printed_form():
    pair = Shrinking()
    schedule = LinearSchedule(0.5, 1.0, epochs=1)
    run = fit(
        pair.model,
        pair.guide,
        data(),
        elbo=TraceInfo_ELBO(kl_weight=schedule),
        epochs=2,
        optimizer=still,
        validation=data(),
    )
    _, nats, weights = str(run).split("\n")
    assert nats.startswith("  epoch 0: ")
    assert nats.endswith(" (nats per datum)")
    assert "kl[z] 0.500" in nats
    assert "kl_weight" not in nats
    assert weights == "  weights: kl_weight 0.500, validation/kl_weight 1.000"


# ---------------------------------------------------------------------------- rates of one's own


class Player(nn.Module):
    """A divergence whose gradient by its own parameter is 1, the rate its own."""

    def __init__(self, rate=0.25, *, names_its_own=False):
        super().__init__()
        self.learning_rate = rate
        self.level = nn.Parameter(torch.tensor(3.0))
        self.shift = nn.Parameter(torch.tensor(3.0))
        if names_its_own:
            self.own_parameters = [self.level]

    def forward(self, q, p):
        return (q.mean() - p.mean()) ** 2 + self.level + self.shift


def levels(divergence):
    return float(divergence.level.detach()), float(divergence.shift.detach())


OWN = {
    "all": (lambda: Player(), (0.25, 0.25)),
    "those that it names": (lambda: Player(names_its_own=True), (0.25, RATE)),
    "none": (lambda: Player(None), (RATE, RATE)),
}


@pytest.mark.parametrize("name", OWN)
def test_one_step_moves_a_divergence_by_its_own_rate(way, name):
    make, rates = OWN[name]
    pair, divergence = Shrinking(), make()
    elbo = TraceInfo_ELBO(lambda_=2.0, divergence=divergence)
    way(pair, None, elbo=elbo, epochs=1, batch_size=NUM_DATA)
    assert levels(divergence) == tuple(3.0 - rate for rate in rates)
    assert 0.0 < number(pair.loc) < 1 - RATE + 1e-2  # and the pair by that of the optimiser


@pytest.mark.parametrize("name", OWN)
def test_compiled_steps_make_the_same_groups(name):
    make, rates = OWN[name]
    pair, divergence = Shrinking(), make()
    elbo = TraceInfo_ELBO(lambda_=2.0, divergence=divergence)
    take = CompiledStep(
        elbo,
        pair.model,
        pair.guide,
        sgd,
        divisor=NUM_DATA,
        backend=lambda graph, _: graph,
    )
    take(data())
    assert levels(divergence) == tuple(3.0 - rate for rate in rates)
    assert take.fallback_reason is None
    for group in take.optimizer.param_groups:
        group["lr"] = 0.5  # rates are looked at in every call, in all groups
    take(data())
    assert levels(divergence) == tuple(2.5 - rate for rate in rates)


def test_a_checkpoint_of_another_rate_is_refused(tmp_path):
    settings = {"epochs": 1, "checkpoint_dir": tmp_path}
    pair = Shrinking()
    elbo = TraceInfo_ELBO(lambda_=2.0, divergence=Player(0.25))
    fit(pair.model, pair.guide, data(), elbo=elbo, **settings)
    elbo.divergence.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"lr of its own 0.25\) instead of .*lr of its own 0.5\)"):
        fit(pair.model, pair.guide, data(), elbo=elbo, resume=True, **settings)


def test_a_base_class_says_what_is_missing():
    with pytest.raises(NotImplementedError):
        Schedule(0.0, 1.0, steps=3).at(1)
