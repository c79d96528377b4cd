"""Stories without a likelihood: what is drawn, what is compared, and that both players learn."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

import pyro_lvm as lvm
from pyro_lvm import MMD, plate_size
from pyro_lvm.divergences import Adversarial, SlicedWasserstein, Stein
from pyro_lvm.infer import ImplicitDivergence

pytestmark = pytest.mark.usefixtures("float64")


class Generator(nn.Module):
    """x = loc + scale z, an affine generator whose law is known: N(loc, scale^2)."""

    def __init__(self, loc=0.0, scale=1.0):
        super().__init__()
        self.loc, self.scale = (nn.Parameter(torch.tensor(v)) for v in (loc, scale))

    def forward(self, z):
        return self.loc + self.scale * z


def story(generator):
    def model(x):
        pyro.module("generator", generator)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Delta(generator(z), event_dim=1), obs=x)

    return model


class Features(nn.Module):
    """A discriminator that is linear in x and x^2: it has the optimum between two normals."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x):
        return self.linear(torch.cat([x, x**2], -1))


DIVERGENCES = {
    "mmd": MMD,
    "sliced": SlicedWasserstein,
    "js": lambda: Adversarial(Features(), learning_rate=0.05),
    "kl": lambda: Adversarial(Features(), objective="kl", learning_rate=0.05),
    "minimax": lambda: Adversarial(Features(), generator="minimax"),
    "function": lambda: lambda q, p: (q.mean() - p.mean()) ** 2,
}
each_divergence = pytest.mark.parametrize("make", DIVERGENCES.values(), ids=DIVERGENCES.keys())


def no_guide(x):
    pass


def test_draws_are_the_first_sample_and_data_the_second():
    seen = []

    def divergence(q, p):
        seen.append((q, p))
        return (q.mean() - 3.0) ** 2 + 0 * p.sum()

    x = torch.full((7, 1), 9.0)
    loss = ImplicitDivergence(divergence).loss(story(Generator(loc=2.0, scale=0.1)), no_guide, x)
    ((q, p),) = seen
    assert torch.equal(p, x)
    assert ((q - 2.0).abs() < 0.6).all()
    assert len(q.unique()) == 7
    assert loss == pytest.approx(7 * (q.mean().item() - 3.0) ** 2)


def test_loss_is_scaled_to_all_data():
    model, x = story(Generator()), torch.randn(6, 1)
    losses = []
    for program in (model, plate_size(model, 60)):
        elbo = ImplicitDivergence(lambda q, p: p.mean() ** 2 + 0 * q.sum())
        losses.append(elbo.loss(program, no_guide, x))
    assert losses[1] == pytest.approx(10 * losses[0])


@each_divergence
def test_generator_learns_location_and_scale(make):
    if make is DIVERGENCES["function"]:
        pytest.skip("it compares the means alone")
    divergence, generator = make(), Generator(loc=-1.0, scale=0.4)
    elbo = ImplicitDivergence(divergence)
    owned = list(divergence.parameters())
    groups = [{"params": generator.parameters()}]
    groups += [{"params": owned, "lr": 0.05}] if owned else []
    optimizer = torch.optim.Adam(groups, lr=0.04, betas=(0.5, 0.9))
    model = story(generator)
    for _ in range(300):
        x = 1.0 + 1.5 * torch.randn(256, 1)
        optimizer.zero_grad()
        (elbo.differentiable_loss(model, no_guide, x) / 256).backward()
        optimizer.step()
    assert generator.loc.item() == pytest.approx(1.0, abs=0.3)
    assert generator.scale.abs().item() == pytest.approx(1.5, abs=0.35)


def test_svi_finds_the_discriminator():
    divergence, generator = Adversarial(Features()), Generator(loc=-1.0)
    elbo = ImplicitDivergence(divergence)
    svi = SVI(story(generator), no_guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    before = [p.detach().clone() for p in divergence.parameters()]
    svi.step(torch.randn(32, 1))
    for p, old in zip(divergence.parameters(), before, strict=True):
        assert (p != old).any()
    assert generator.loc.item() != -1.0


def test_two_objectives_share_no_discriminator():
    x = torch.randn(8, 1)
    for _ in range(2):
        divergence = Adversarial(Features())
        mine = list(divergence.parameters())
        elbo = ImplicitDivergence(divergence)
        svi = SVI(story(Generator()), no_guide, pyro.optim.Adam({"lr": 0.05}), elbo)
        svi.step(x)
        assert all(a is b for a, b in zip(mine, divergence.parameters(), strict=True))
    twin = copy.deepcopy(elbo)
    SVI(story(Generator()), no_guide, pyro.optim.Adam({"lr": 0.05}), twin).step(x)
    theirs = list(twin.divergence.parameters())
    assert all(a is not b for a, b in zip(mine, theirs, strict=True))


@each_divergence
def test_parts(make):
    elbo = ImplicitDivergence(make())
    model, x = story(Generator()), torch.randn(16, 1)
    loss, parts = elbo.loss_and_parts(model, no_guide, x)
    has_player = isinstance(elbo.divergence, Adversarial)
    of_player = {"discriminator", "accuracy/draws", "accuracy/data"} if has_player else set()
    assert set(parts) == {"loss", "divergence"} | of_player
    torch.testing.assert_close(loss.detach(), 16 * parts["divergence"])
    if has_player:
        assert 0 < parts["discriminator"] < 4 * math.log(2)


def conditional(x, y):
    """x = 10 y + noise, y observed."""
    with pyro.plate("data", len(x)):
        label = pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        noise = pyro.sample("noise", dist.Normal(0.0, 0.01))
        pyro.sample("x", dist.Delta(10 * label + noise), obs=x)


def test_conditions_stay_as_observed_and_are_seen_beside_draws_and_data():
    seen = []

    def divergence(q, p):
        seen.append((q, p))
        return (q - p).mean()

    y = torch.tensor([0.0, 1.0, 2.0])
    x = torch.tensor([5.0, 6.0, 7.0])
    for settings in ({"conditions": ["y"]}, {"sites": ["x"]}, {}):
        ImplicitDivergence(divergence, **settings).loss(conditional, lambda x, y: None, x, y)
    (with_y, data), (alone, _), (joint, _) = seen
    assert torch.equal(data, torch.stack([x, y], -1))
    assert torch.equal(with_y[:, 1], y)
    assert ((with_y[:, 0] - 10 * y).abs() < 0.1).all()
    assert alone.shape == (3, 1)
    assert ((alone[:, 0] - 10 * y).abs() < 0.1).all()
    assert not torch.equal(joint[:, 0], y)  # both are drawn, y first
    assert ((joint[:, 1] - 10 * joint[:, 0]).abs() < 0.1).all()


def test_subsampled_data_are_compared_at_their_own_indices():
    data = torch.arange(10.0)
    seen = []

    def model():
        with pyro.plate("data", 10, subsample_size=4) as index:
            pyro.sample("x", dist.Normal(100.0 + data[index], 1e-3), obs=data[index])

    def divergence(q, p):
        seen.append((q - p).squeeze(-1))
        return (q - p).mean()

    loss = ImplicitDivergence(divergence).loss(model, lambda: None)
    assert ((seen[0] - 100).abs() < 0.1).all()
    assert loss == pytest.approx(10 * seen[0].mean().item())


@each_divergence
def test_is_copied_and_pickled(make):
    if make is DIVERGENCES["function"]:
        pytest.skip("a lambda can't be pickled")
    elbo = ImplicitDivergence(make())
    model, x = story(Generator()), torch.randn(16, 1)
    elbo.loss(model, no_guide, x)
    losses = []
    for twin in (elbo, copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
        twin.loss(model, no_guide, x)
        pyro.set_rng_seed(1)
        losses.append(twin.loss(model, no_guide, x))
    assert losses[0] == losses[1] == losses[2]


def bernoulli(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z), obs=x)


def guided(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("model", "guide", "settings", "match"),
    [
        (bernoulli, no_guide, {}, "reparameterised draws; got 'x' with Bernoulli"),
        (story(Generator()), guided, {}, r"no guide.*samples \['z'\]"),
        (story(Generator()), no_guide, {"sites": ["w"]}, r"observed sites.*\['w'\].*has \['x'\]"),
        (story(Generator()), no_guide, {"conditions": ["x"]}, r"observed sites.*\['x'\]"),
    ],
)
def test_what_is_refused(model, guide, settings, match):
    x = torch.ones(4) if model is bernoulli else torch.ones(4, 1)
    with pytest.raises(ValueError, match=match):
        ImplicitDivergence(MMD(), **settings).loss(model, guide, x)


def test_divergences_that_are_refused():
    with pytest.raises(ValueError, match="needs a density"):
        ImplicitDivergence(Stein())
    with pytest.raises(TypeError, match="divergence between two samples"):
        ImplicitDivergence(3.0)


def test_fit_trains_both_players_and_records_their_balance():
    x = 1.0 + 1.5 * torch.randn(512, 1)
    generator = Generator(loc=-1.0, scale=0.4)
    elbo = ImplicitDivergence(Adversarial(Features(), learning_rate=0.05))
    fit = lvm.fit(
        story(generator),
        None,
        x,
        elbo=elbo,
        epochs=60,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.5, 0.9)),
        progress=False,
    )
    assert fit.diagnosis is None
    assert {"loss", "divergence", "discriminator"} <= fit.history.keys()
    assert fit.history["discriminator"][-1] == pytest.approx(2 * math.log(2), abs=0.1)
    assert generator.loc.item() == pytest.approx(1.0, abs=0.3)
    assert generator.scale.abs().item() == pytest.approx(1.5, abs=0.35)
