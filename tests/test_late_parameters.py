"""Parameters that a pair comes up with while it is trained: each is trained, and only once."""

import lightning.pytorch as pl
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam, pyro_method
from torch import nn
from torch.distributions import constraints

from pyro_lvm.training import fit

pytestmark = pytest.mark.usefixtures("float64")

LATE, STEPS = 7, 16  # the step from which a parameter is there, and all steps


def made_before():
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, 0.1)
    nn.init.constant_(net.bias, -0.2)
    return net


class Story:
    """z = loc, without noise; x ~ N(z + offset, 1). Subclasses come up with something later."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([0.3, -0.1]))
        self.late = False

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = z + self.offset() if self.late else z
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc = self.loc * self.slope() if self.late else self.loc
            pyro.sample("z", dist.Delta(loc.expand(len(x), 2), event_dim=1))

    def offset(self):
        return 0.0

    def slope(self):
        return 1.0


class Plain(Story, nn.Module):
    """A module of torch's, of whose parameters Pyro never hears."""


class Pair(Story, PyroModule):
    model, guide = pyro_method(Story.model), pyro_method(Story.guide)


class InModel(Pair):
    def offset(self):
        return pyro.param("offset", torch.tensor([0.5, 0.2]))


class InGuide(Pair):
    def slope(self):
        return pyro.param("slope", torch.tensor(1.5), constraint=constraints.positive)


class Shared(Pair):
    def offset(self):
        return pyro.param("both", torch.tensor(0.5))

    slope = offset


class Registered(Pair):
    def offset(self):
        if not hasattr(self, "bias"):
            self.bias = nn.Parameter(torch.tensor([0.5, 0.2]))
        return self.bias

    slope = offset


class LazyNetwork(Pair):
    def offset(self):
        if not hasattr(self, "net"):
            self.net = made_before()
        return self.net(torch.ones(2))


class Attached(Pair):
    """A network that was made before, and becomes a part of the pair later."""

    def __init__(self):
        super().__init__()
        self.made = [made_before()]

    def offset(self):
        self.net = self.made[0]
        return self.net(torch.ones(2))


class PlainRegistered(Plain):
    offset = Registered.offset


class PlainAttached(Plain):
    offset = Attached.offset

    def __init__(self):
        super().__init__()
        self.made = [made_before()]


class Constrained(Pair):
    def slope(self):
        if not hasattr(self, "scale"):
            self.scale = PyroParam(torch.tensor(1.5), constraint=constraints.positive)
        return self.scale


class DeclaredModule(Attached):
    """By pyro.module, and known to model and guide."""

    def offset(self):
        return pyro.module("net", self.made[0])(torch.ones(2))

    slope = offset


class OwnedAndDeclared(Registered):
    def offset(self):
        bias = super().offset()
        pyro.module("pair", self)
        return bias

    slope = offset


PAIRS = (
    InModel,
    InGuide,
    Shared,
    Registered,
    LazyNetwork,
    Attached,
    PlainRegistered,
    PlainAttached,
    Constrained,
    DeclaredModule,
    OwnedAndDeclared,
)
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


class SetLate(pl.Callback):
    def __init__(self, pair, step=LATE):
        self.pair, self.step = pair, step

    def on_train_batch_start(self, trainer, module, batch, batch_index):
        self.pair.late = trainer.global_step >= self.step


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 2, generator=generator) + torch.tensor([2.0, -1.0])


def leaves(pair):
    """All leaf tensors of a pair, each once, in the order in which they came."""
    declared = [p for _, p in pyro.get_param_store().named_parameters()]
    return list({id(p): p for p in [*pair.parameters(), *declared]}.values())


def trained_by_hand(make, make_optimizer):
    pyro.clear_param_store()
    pair, x = make(), data()
    optimizer = make_optimizer([pair.loc])
    for step in range(STEPS):
        pair.late = step >= LATE
        loss = Trace_ELBO().differentiable_loss(pair.model, pair.guide, x) / len(x)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if new := [p for p in leaves(pair) if id(p) not in known]:
            optimizer.add_param_group({"params": new})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in leaves(pair)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", PAIRS)
def test_each_is_trained_once(make, optimizer):
    make_optimizer = OPTIMIZERS[optimizer]
    expected = trained_by_hand(make, make_optimizer)
    pyro.clear_param_store()
    pair, made = make(), []

    def keep(parameters):
        made.append(make_optimizer(parameters))
        return made[0]

    run = fit(
        pair.model,
        pair.guide,
        data(),
        elbo=Trace_ELBO(),
        epochs=STEPS,
        optimizer=keep,
        callbacks=[SetLate(pair)],
    )
    values = leaves(pair)
    assert len(values) == len(expected) > 1
    for value, by_hand in zip(values, expected, strict=True):
        assert torch.allclose(value, by_hand, rtol=0, atol=1e-12)
    assert run.num_parameters == sum(p.numel() for p in values)
    in_groups = [id(p) for group in made[0].param_groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in values)
    assert all(p.grad is None for p in values)


@pytest.mark.parametrize("make", PAIRS)
def test_where_the_best_epoch_came_before_they_have_their_first_values(make):
    """The loss is maximised: no epoch is as good as the first one."""
    pyro.clear_param_store()
    pair, seen = make(), []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(pair.loc.detach().clone())

    run = fit(
        pair.model,
        pair.guide,
        -data(),
        epochs=5,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, maximize=True),
        validation=-data(),
        callbacks=[SetLate(pair, 2), Look()],
    )
    assert run.best_epoch == 0
    assert torch.equal(pair.loc, seen[0])
    assert not torch.equal(seen[2], seen[0])
    values = [p.detach().clone() for p in leaves(pair)]
    pyro.clear_param_store()
    fresh = make()
    fresh.late = True
    fresh.model(data()), fresh.guide(data())
    for value, first in zip(values[1:], leaves(fresh)[1:], strict=True):
        assert torch.equal(value, first)


def test_a_scheduler_needs_them_at_the_start():
    pair = Plain()
    pair.offset = lambda: pyro.param("offset", torch.zeros(2))
    with pytest.raises(ValueError, match=r"before a scheduler.*offset.*in a later call"):
        fit(
            pair.model,
            pair.guide,
            data(),
            epochs=STEPS,
            scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o),
            callbacks=[SetLate(pair)],
        )


def test_frozen_ones_stay_frozen():
    class Frozen(LazyNetwork):
        def offset(self):
            loc = super().offset()
            self.net.requires_grad_(False)
            return loc

    pyro.clear_param_store()
    pair = Frozen()
    run = fit(pair.model, pair.guide, data(), epochs=10, callbacks=[SetLate(pair)])
    assert run.num_parameters == 2
    assert torch.equal(pair.net.bias, torch.full((2,), -0.2))


def test_what_others_declare_meanwhile_is_not_trained():
    pyro.clear_param_store()
    pair = Pair()

    class Declares(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            pyro.param("theirs", torch.tensor(1.0))
            self.net = nn.Linear(1, 1)

    run = fit(pair.model, pair.guide, data(), epochs=4, callbacks=[Declares()])
    assert run.num_parameters == 2
