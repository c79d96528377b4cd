"""Generators: losses and gradients of both players by hand, and what they learn."""

import copy
import functools
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid, softplus
from torch.nn.utils.parametrizations import spectral_norm

import pyro_lvm as lvm
from pyro_lvm.divergences import MMD, Adversarial, AuxiliaryClassifier
from pyro_lvm.infer import ImplicitDivergence, comparison
from pyro_lvm.models import GAN, ConditionalGAN
from pyro_lvm.nn import MLP, DeltaHead, Joined, NormalHead, spectral_normalization

leaky = functools.partial(nn.LeakyReLU, 0.2)


def linear_gan(**settings):
    """x = W z + b, of a normal law."""
    return GAN(MLP(2, [], head=DeltaHead(2)), 2, **settings)


def labelled_gan(num_classes=3):
    """A class moves the mean of x and nothing else."""
    return ConditionalGAN(Joined(MLP(1 + num_classes, [], head=DeltaHead(1)), [1, num_classes]), 1)


def discriminator(dim, outputs=1, *, normalised=False):
    layers = [nn.Linear(dim, 6), leaky(), nn.Linear(6, outputs)]
    network = nn.Sequential(*layers)
    return spectral_normalization(network) if normalised else network


def drawn(gan, *args):
    """The draws of a story under seed 1, with a gradient."""
    pyro.set_rng_seed(1)
    z = torch.randn(len(args[0]), *gan.latent_shape)
    return gan.generate(z, *args[1:]).rsample()


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)


def both_players(elbo, gan, *data):
    """The loss, and the gradients of generator and discriminator, under seed 1, per datum."""
    elbo.loss(gan.model, lambda *_: None, *data)  # the first run looks at the pair
    pyro.set_rng_seed(1)
    loss, parts = elbo.loss_and_parts(gan.model, None, *data)
    per_datum = loss / len(data[0])
    leaves = list(gan.parameters()), list(elbo.divergence.parameters())
    return per_datum.detach(), parts, *(gradients(per_datum, each) for each in leaves)


# --- unconditional: a known discriminator


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("generator", ["non-saturating", "minimax"])
def test_losses_and_gradients_of_both_players_by_hand(generator):
    gan, x, network = linear_gan(), torch.randn(7, 2), discriminator(2)
    elbo = ImplicitDivergence(Adversarial(network, generator=generator))
    value, parts, of_generator, of_discriminator = both_players(elbo, gan, x)
    fake = drawn(gan, x)
    t_fake, t_real = network(fake)[:, 0], network(x)[:, 0]
    total = softplus(-t_real).mean() + softplus(network(fake.detach())[:, 0]).mean()
    pull = {
        "non-saturating": -torch.sigmoid(t_fake).log().mean() / 2,
        "minimax": (1 - torch.sigmoid(t_fake)).log().mean() / 2,
    }[generator]
    torch.testing.assert_close(value, (math.log(2) - total / 2).detach())
    torch.testing.assert_close(parts["discriminator"], total.detach())
    torch.testing.assert_close(of_generator, gradients(pull, list(gan.parameters())))
    torch.testing.assert_close(of_discriminator, gradients(total, list(network.parameters())))
    assert parts["accuracy/draws"] == (t_fake < 0).double().mean()
    assert parts["accuracy/data"] == (t_real > 0).double().mean()


class Axis(nn.Module):
    """T(x) = slope . x + c, with parameters that are known."""

    def __init__(self, slope, c=0.0, curvature=0.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.c, self.curvature = (nn.Parameter(torch.tensor(v)) for v in (c, curvature))

    def forward(self, x):
        return x @ self.slope + self.c + self.curvature * x.square().sum(-1) / 2


@pytest.mark.usefixtures("float64")
def test_accuracy_is_the_share_that_is_told_right():
    told = Adversarial(Axis([1.0])).players_and_parts
    draws, data = torch.tensor([[-1.0], [-2.0], [-3.0], [4.0]]), torch.tensor([[1.0], [-1.0]])
    parts = told(draws, data).parts
    assert (parts["accuracy/draws"], parts["accuracy/data"]) == (0.75, 0.5)


@pytest.mark.usefixtures("float64")
def test_generator_moves_to_where_the_discriminator_sees_data():
    gan, x = linear_gan(), torch.randn(50, 2)
    bias = gan.generator.layers[0].bias
    elbo = ImplicitDivergence(Adversarial(Axis([1.0, -2.0])))
    elbo.differentiable_loss(gan.model, None, x).backward()
    assert bias.grad[0] < 0 < bias.grad[1]  # and a step goes against it
    assert bias.grad[1] / bias.grad[0] == pytest.approx(-2.0)


@pytest.mark.usefixtures("float64")
def test_discriminator_moves_to_tell_data_from_draws():
    gan, x = linear_gan(), torch.tensor([[5.0, -5.0]]).expand(50, 2)
    elbo = ImplicitDivergence(Adversarial(Axis([0.0, 0.0])))
    elbo.differentiable_loss(gan.model, None, x).backward()
    slope = elbo.divergence.discriminator.slope.grad
    assert slope[0] < 0 < slope[1]


# --- spectral normalisation


@pytest.mark.usefixtures("float64")
def test_spectral_norm_of_both_players_by_hand():
    """In training, each pass makes one power iteration; the surrogate's are forgotten."""
    gan, x, network = linear_gan(), torch.randn(7, 2), discriminator(2, normalised=True)
    start = copy.deepcopy(network.state_dict())
    ours = Adversarial(network)
    divergence, loss = ours.players(fake := drawn(gan, x), x)
    moved = {k: v.clone() for k, v in network.state_dict().items() if k.endswith(("_u", "_v"))}
    other = discriminator(2, normalised=True)
    other.load_state_dict(start)
    on_fake, on_real = other(fake.detach())[:, 0], other(x)[:, 0]
    expected = softplus(on_fake).mean() + softplus(-on_real).mean()
    assert all(torch.equal(moved[k], v) for k, v in other.state_dict().items() if k in moved)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(divergence, math.log(2) - expected / 2)
    torch.testing.assert_close(
        gradients(loss, list(network.parameters())), gradients(expected, list(other.parameters()))
    )
    pull = -logsigmoid(other(fake)[:, 0]).mean() / 2
    torch.testing.assert_close(
        gradients(divergence, list(gan.parameters())), gradients(pull, list(gan.parameters()))
    )
    assert not all(torch.equal(moved[k], start[k]) for k in moved)  # something has moved at all


def test_spectral_normalization_divides_by_the_largest_singular_value():
    network = nn.Sequential(
        nn.Unflatten(-1, (2, 4, 4)), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 5), nn.ReLU()
    )
    before = copy.deepcopy(network)
    assert spectral_normalization(network) is network
    spectral_normalization(network)  # once more changes nothing
    for _ in range(50):
        network(torch.randn(3, 32))
    for layer, old in ((network[1], before[1]), (network[3], before[3])):
        matrix = old.weight.detach().flatten(1)
        expected = matrix / torch.linalg.matrix_norm(matrix, 2)
        torch.testing.assert_close(layer.weight.flatten(1), expected, rtol=1e-3, atol=1e-4)
    assert len([n for n, _ in network.named_parameters() if "original" in n]) == 2


def test_spectral_normalization_leaves_normalised_layers_alone():
    layer = spectral_norm(nn.Linear(3, 2), n_power_iterations=4)
    spectral_normalization(nn.Sequential(layer))
    assert len(layer.parametrizations.weight) == 1


# --- gradient penalty


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("gamma", [0.5, 10.0])
def test_gradient_penalty_by_hand(gamma):
    """grad T = slope + curvature x, on the data; the samples have the gradient of no penalty."""
    fake, real = torch.randn(6, 2), 3 + torch.randn(9, 2)
    plain, penalised = (
        Adversarial(Axis([0.5, -1.5], 0.2, 0.7), gradient_penalty=g) for g in (0.0, gamma)
    )
    (d0, l0), (d1, l1) = (each.players(fake.requires_grad_(), real) for each in (plain, penalised))
    network = penalised.discriminator
    slope = network.slope + network.curvature * real
    expected = gamma / 2 * slope.square().sum(-1).mean()
    torch.testing.assert_close(l1 - l0, expected)
    parameters = list(network.parameters())
    of_plain = gradients(l0, list(plain.discriminator.parameters()))
    of_penalty = torch.autograd.grad(expected, parameters, materialize_grads=True)
    summed = tuple(a + b for a, b in zip(of_plain, of_penalty, strict=True))
    torch.testing.assert_close(gradients(l1, parameters), summed)
    torch.testing.assert_close(d1, d0)
    torch.testing.assert_close(gradients(d1, [fake]), gradients(d0, [fake]))
    assert gradients(l1, [fake]) == (None,)


@pytest.mark.usefixtures("float64")
def test_gradient_penalty_is_reported_apart_and_is_there_without_gradients():
    adversarial = Adversarial(Axis([3.0, 4.0]), gradient_penalty=2.0)
    fake, real = torch.randn(6, 2), torch.randn(9, 2)
    players = adversarial.players_and_parts(fake, real)
    assert players.parts["penalty"] == pytest.approx(25.0)
    torch.testing.assert_close(players.loss.detach(), players.parts["discriminator"] + 25.0)
    with torch.no_grad():
        again = adversarial.players_and_parts(fake, real)
    torch.testing.assert_close(again.loss, players.loss.detach())
    assert not again.loss.requires_grad
    assert "gradient_penalty=2.0" in repr(adversarial)


# --- conditions


def test_a_discriminator_is_given_the_labels_as_they_are():
    seen = []

    class Spy(nn.Module):
        def forward(self, x, y):
            seen.append((x.detach(), y))
            return x.sum(-1)

    gan, x = labelled_gan(), torch.randn(5, 1)
    y = torch.tensor([0, 2, 1, 1, 0])
    elbo = ImplicitDivergence(Adversarial(Spy()), conditions=["y"])
    elbo.loss(gan.model, lambda *_: None, x, y)
    assert len(seen) == 3  # draws, data, and the draws once more for their gradient
    assert all(torch.equal(labels, y) for _, labels in seen)
    assert torch.equal(seen[1][0], x)
    assert torch.equal(seen[0][0], seen[2][0])
    assert not torch.equal(seen[0][0], x)


def test_conditions_of_all_processes_go_with_their_rows(monkeypatch):
    """Two processes with the same rows, the second one in reverse."""
    seen = []

    class Rows:
        takes_conditions = True

        def __call__(self, q, p, y):
            seen.append((q, p, y))
            return (q - p).mean()

    monkeypatch.setattr(comparison, "batch_is_shared", lambda: True)
    monkeypatch.setattr(comparison, "gather_rows", lambda x: torch.cat([x, x.flip(0)]))
    q, y = torch.arange(3.0).reshape(1, 3, 1), torch.arange(3).reshape(1, 3)
    comparison.compare_in_parts(Rows(), q, q + 10, [y])
    ((draws, data, labels),) = seen
    assert labels.tolist() == [0, 1, 2, 2, 1, 0]
    assert torch.equal(draws[:, 0], labels.float())
    assert torch.equal(data[:, 0], labels + 10.0)


@pytest.mark.usefixtures("float64")
def test_auxiliary_classifier_by_hand():
    """Values and gradients of both players, the labels of which are told with weight 0.3."""
    gan, x, y = labelled_gan(), torch.randn(8, 1), torch.tensor([0, 1, 2, 0, 1, 2, 2, 2])
    network = discriminator(1, 4)
    divergence = AuxiliaryClassifier(network, 3, weight=0.3)
    elbo = ImplicitDivergence(divergence, conditions=["y"])
    value, parts, of_generator, of_discriminator = both_players(elbo, gan, x, y)
    fake = drawn(gan, x, y)
    still = fake.detach()

    def told(z):
        logits = network(z)
        rows = torch.arange(8)
        return logits[:, 0], -logits[:, 1:].softmax(-1)[rows, y].log().mean()

    (t_fake, e_fake), (t_still, e_still), (t_real, e_real) = told(fake), told(still), told(x)
    source = softplus(-t_real).mean() + softplus(t_still).mean()
    of_d = source + 0.3 * (e_real + e_still)
    of_g = -logsigmoid(t_fake).mean() / 2 + 0.3 * e_fake
    torch.testing.assert_close(value, (math.log(2) - source / 2 + 0.3 * e_fake).detach())
    torch.testing.assert_close(of_generator, gradients(of_g, list(gan.parameters())))
    torch.testing.assert_close(of_discriminator, gradients(of_d, list(network.parameters())))
    expected = {
        "loss": value,
        "divergence": math.log(2) - source.detach() / 2,
        "discriminator": source.detach(),
        "classifier[draws]": e_fake.detach(),
        "classifier[data]": e_real.detach(),
    }
    torch.testing.assert_close({name: parts[name] for name in expected}, expected)


class Named(nn.Module):
    """T = 0, and a classifier whose logits are a multiple of x: class 1 is to the right."""

    def __init__(self, sharpness=1.0):
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, x):
        zero = torch.zeros_like(x)
        return torch.cat([zero, -self.sharpness * x, self.sharpness * x], -1)


@pytest.mark.usefixtures("float64")
def test_auxiliary_classifier_helps_both_players():
    """Draws under label 1 move right, those under 0 left; the classifier grows surer of data."""
    divergence = AuxiliaryClassifier(Named(), 2)
    fake = torch.zeros(4, 1, requires_grad=True)
    y = torch.tensor([0, 1, 0, 1])
    data = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    divergence(fake, data, y).backward()
    assert ((-fake.grad[:, 0]).sign() == 2 * y - 1).all()
    assert divergence.discriminator.sharpness.grad < 0
    divergence.zero_grad()
    divergence(data, torch.zeros_like(data), y).backward()  # the draws teach it as well
    assert divergence.discriminator.sharpness.grad < 0


# --- recording


PLAYERS = {
    "plain": lambda: Adversarial(discriminator(1)),
    "penalty": lambda: Adversarial(discriminator(1), gradient_penalty=3.0),
    "spectral": lambda: Adversarial(discriminator(1, normalised=True)),
    "both": lambda: Adversarial(discriminator(1, normalised=True), gradient_penalty=3.0),
    "classifier": lambda: AuxiliaryClassifier(discriminator(1, 4), 3),
    "given": lambda: Adversarial(Joined(discriminator(4), [1, 3])),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", PLAYERS)
def test_recorded_steps_are_those_of_python(name):
    """Losses, parts, parameters and buffers after five steps; what is recorded is not compiled."""
    gan, divergence = labelled_gan(), PLAYERS[name]()
    x, y = torch.randn(12, 1), torch.randint(3, (12,))
    seen = {"conditions": ["y"]} if name in ("classifier", "given") else {"sites": ["x"]}
    results = []
    for is_recorded in (True, False):
        story, player = copy.deepcopy(gan), copy.deepcopy(divergence)
        elbo = ImplicitDivergence(player, **seen)
        step = lvm.CompiledStep(
            elbo,
            story.model,
            None,
            lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.999)),
            parts=True,
            backend=lambda graph, _: graph,
        )
        if not is_recorded:
            with pytest.warns(UserWarning, match="run in Python: on request"):
                step.give_up("on request")
        pyro.set_rng_seed(2)
        tables = torch.stack([step.table(x, y)[0] for _ in range(5)])
        assert (step.fallback_reason is None) == is_recorded
        results.append([tables, {**player.state_dict()}, {**story.state_dict()}])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert not torch.equal(tables[0], tables[-1])


class Looks(nn.Module):
    """A discriminator whose Python looks at values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x):
        return self.linear(x) if float(x.detach().sum()) < 1e9 else self.linear(-x)


def test_what_cannot_be_recorded_runs_in_python_with_one_warning():
    gan, x = linear_gan(), torch.randn(64, 2)
    elbo = ImplicitDivergence(Adversarial(Looks(), gradient_penalty=1.0))
    with pytest.warns(UserWarning, match="run in Python: its Python looks at") as caught:
        fit = lvm.fit(
            gan.model, None, x, elbo=elbo, epochs=3, batch_size=16, compile=True, progress=False
        )
    assert len([w for w in caught if "run in Python" in str(w.message)]) == 1
    assert fit.stopped == "all epochs"
    assert math.isfinite(fit.history["penalty"][-1])


# --- what they learn


class Moments(nn.Module):
    """A discriminator linear in x, x^2 and x y: it has the optimum between two normals."""

    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim + dim * dim, 1)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x):
        return self.linear(torch.cat([x, (x[:, :, None] * x[:, None, :]).flatten(1)], -1))


def little_momentum(parameters):
    return torch.optim.Adam(parameters, lr=0.02, betas=(0.5, 0.9))


LEARNING = {
    "adversarial": lambda: Adversarial(Moments(2), learning_rate=0.03),
    "mmd": MMD,
}


@pytest.mark.parametrize("name", LEARNING)
def test_a_linear_generator_learns_mean_and_covariance(name, device):
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    mean = torch.tensor([1.0, -0.5])
    x = dist.MultivariateNormal(mean, covariance).sample((1000,))
    gan = linear_gan()
    fit = lvm.fit(
        gan.model,
        gan.guide,
        x,
        elbo=ImplicitDivergence(LEARNING[name]()),
        epochs=75,
        batch_size=250,
        optimizer=little_momentum,
        progress=False,
        device=device,
    )
    assert fit.diagnosis is None
    linear = gan.generator.layers[0].cpu()
    torch.testing.assert_close(linear.bias.detach(), mean, atol=0.2, rtol=0.0)
    found = (linear.weight @ linear.weight.T).detach()
    torch.testing.assert_close(found, covariance, atol=0.3, rtol=0.0)


class Bumps(nn.Module):
    """A network that is linear in bumps along x; for each class its own, if it is given labels."""

    def __init__(self, outputs, num_classes=1):
        super().__init__()
        self.register_buffer("centres", torch.linspace(-6.0, 7.0, 14))
        self.num_classes = num_classes
        self.linear = nn.Linear(num_classes * 15, outputs)
        nn.init.zeros_(self.linear.weight)

    def forward(self, x, y=None):
        bumps = torch.exp(-((x - self.centres) ** 2) / 2)
        features = torch.cat([bumps, x], -1)
        if y is not None:
            classes = nn.functional.one_hot(y, self.num_classes).to(x.dtype)
            features = (classes[:, :, None] * features[:, None, :]).flatten(1)
        return self.linear(features)


CONDITIONAL = {
    "classifier": lambda: AuxiliaryClassifier(
        Bumps(3), 2, learning_rate=0.05, gradient_penalty=0.1
    ),
    "given": lambda: Adversarial(Bumps(1, 2), learning_rate=0.05, gradient_penalty=0.1),
}


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_class_conditional_means(kind):
    means = torch.tensor([-2.0, 2.0])
    y = torch.randint(2, (900,))
    x = means[y, None] + 0.5 * torch.randn(900, 1)
    gan = labelled_gan(2)
    fit = lvm.fit(
        gan.model,
        None,
        (x, y),
        elbo=ImplicitDivergence(CONDITIONAL[kind](), conditions=["y"]),
        epochs=100,
        batch_size=300,
        optimizer=little_momentum,
        progress=False,
    )
    assert fit.diagnosis is None
    draws = gan.sample(torch.arange(2).repeat(2000)).view(2000, 2)
    torch.testing.assert_close(draws.mean(0), means, atol=0.4, rtol=0.0)
    assert draws.std(0).mean().item() == pytest.approx(0.5, abs=0.25)


# --- draws, files, scores


def normal_generator():
    return MLP(3, [4], head=NormalHead((2, 5)))


def test_shapes_of_draws(device):
    gan = GAN(normal_generator(), 3).to(device)
    assert gan.sample(7).shape == (7, 2, 5)
    assert gan.sample(7).device.type == device
    assert gan.generate(torch.randn(4, 6, 3, device=device)).batch_shape == (4, 6)
    conditional = labelled_gan().to(device)
    y = torch.tensor([0, 2, 2, 1], device=device)
    assert conditional.sample(y).shape == (4, 1)
    assert conditional.sample(y).device.type == device
    assert conditional.generate(torch.randn(6, 4, 1, device=device), y).batch_shape == (6, 4)
    assert not gan.sample(2).requires_grad


def test_events_of_a_tensor_are_what_is_behind_the_shape_of_the_batch():
    gan = GAN(nn.Sequential(nn.Linear(3, 20), nn.Unflatten(-1, (4, 5))), 3)
    made = gan.generate(torch.randn(6, 7, 3))
    assert (made.batch_shape, made.event_shape) == ((6, 7), (4, 5))
    assert gan.model(torch.randn(8, 4, 5)).shape == (8, 4, 5)
    assert GAN(nn.Flatten(-2), (2, 3)).sample(7).shape == (7, 6)
    assert GAN(nn.Identity(), (2, 3)).generate(torch.randn(7, 2, 3)).event_shape == (2, 3)


def test_draws_of_a_generator_that_returns_a_distribution_are_x():
    gan, x = GAN(normal_generator(), 3), torch.randn(6, 2, 5)
    divergence = Adversarial(nn.Linear(10, 1))
    loss = ImplicitDivergence(divergence).differentiable_loss(gan.model, None, x)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in gan.parameters())
    pyro.set_rng_seed(3)
    first = gan.sample(5)
    pyro.set_rng_seed(3)
    z = torch.randn(5, 3)
    assert torch.equal(first, gan.generate(z).sample())


def test_draws_given_a_label_are_those_of_the_generator_given_it():
    gan = labelled_gan()
    y = torch.tensor([2, 0])
    pyro.set_rng_seed(3)
    x = gan.sample(y)
    pyro.set_rng_seed(3)
    z = torch.randn(2, 1)
    assert torch.equal(x, gan.generator(z, y).sample())


class Shifted(nn.Module):
    """A learned prior."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.full((2,), 5.0))

    def forward(self):
        return dist.Normal(self.loc, 0.01).to_event(1)


@pytest.mark.parametrize(
    "prior", [dist.Normal(torch.tensor([5.0, 5.0]), 0.01).to_event(1), Shifted()]
)
def test_another_prior(prior):
    gan = GAN(nn.Identity(), 2, prior=prior)
    assert (gan.sample(50) - 5).abs().max() < 0.1
    divergence = ImplicitDivergence(lambda q, p: (q.mean() - 7) ** 2 + 0 * p.sum())
    loss = divergence.differentiable_loss(gan.model, None, torch.zeros(20, 2))
    assert loss.item() == pytest.approx(20 * 4.0, rel=0.02)
    if isinstance(prior, nn.Module):
        loss.backward()
        assert (prior.loc.grad < 0).all()


def test_delta_head_is_the_activation_of_raw_output():
    head, raw = DeltaHead((2, 3), activation=nn.Sigmoid), torch.randn(4, 2, 3)
    made = head(raw)
    assert made.event_shape == (2, 3)
    assert made.has_rsample
    assert torch.equal(made.rsample(), torch.sigmoid(raw))
    assert torch.equal(DeltaHead(3)(raw).mean, raw)


@pytest.mark.parametrize("make", [linear_gan, labelled_gan])
def test_saved_and_loaded(make, tmp_path):
    gan = make()
    args = () if make is linear_gan else (torch.tensor([0, 1, 2, 1]),)
    lvm.save(gan, tmp_path / "gan.pt")
    loaded = lvm.load(tmp_path / "gan.pt")
    assert type(loaded) is type(gan)
    assert repr(loaded) == repr(gan)
    draws = []
    for each in (gan, loaded):
        pyro.set_rng_seed(5)
        draws.append(each.sample(*(args or (4,))))
    assert torch.equal(*draws)


@pytest.mark.usefixtures("float64")
def test_conditions_have_no_probability():
    """log p(x | y) under a stated noise, against the closed form; y is not noisy."""
    gan = labelled_gan()
    layer = gan.generator.network.layers[0]
    x, y = torch.randn(6, 1), torch.tensor([0, 1, 2, 2, 1, 0])
    noisy = lvm.marginal.with_gaussian_noise(gan.model, 0.4)
    score = lvm.marginal.annealed_importance_sampling(
        noisy, None, x, y, temperatures=10, num_samples=16
    )
    loc = layer.bias + layer.weight[0, 1 + y]
    scale = (layer.weight[0, 0] ** 2 + 0.4**2).sqrt()
    expected = dist.Normal(loc, scale).log_prob(x[:, 0]).detach()
    assert ((score.log_prob - expected).abs() < 5 * score.std_error + 1e-6).all()


# --- every error


def fitted(gan, *data, divergence=None, **settings):
    elbo = ImplicitDivergence(divergence or MMD(), **settings)
    return lvm.fit(gan.model, None, data, elbo=elbo, epochs=1, progress=False)


x8, y8 = torch.randn(8, 1), torch.tensor([0, 1, 2, 0, 1, 2, 2, 2])
four = torch.zeros(4, 2)
labels = torch.zeros(4).long()
two_classes = lambda: AuxiliaryClassifier(nn.Linear(2, 3), 2)  # noqa: E731
ERRORS = {
    "prior": (
        lambda: GAN(nn.Identity(), 2, prior=dist.Normal(torch.zeros(2), 1.0)),
        ValueError,
        "prior with no batch shape; got (2,)",
    ),
    "latent_shape": (lambda: GAN(nn.Identity(), 0), ValueError, "latent_shape"),
    "no_samples": (lambda: linear_gan().sample(0), ValueError, "num_samples to be a positive"),
    "no_labels": (lambda: labelled_gan().sample(labels[:0]), ValueError, "at least one datum"),
    "list": (lambda: linear_gan().model([1.0]), TypeError, "x to be a torch.Tensor; got list"),
    "event": (
        lambda: linear_gan().model(torch.zeros(4, 3)),
        ValueError,
        "shape that the generator makes, (2,) each; got (3,)",
    ),
    "lengths": (
        lambda: labelled_gan().model(x8, y8[:5]),
        ValueError,
        "a condition for each datum, 8; got 5",
    ),
    "one_for_all": (
        lambda: GAN(nn.Flatten(0), 2).model(four),
        ValueError,
        "one x for each z, of batch shape (4,); got a tensor of shape (8,)",
    ),
    "label_too_large": (
        lambda: fitted(labelled_gan(), x8, y8 + 1, conditions=["y"]),
        ValueError,
        "Class values must be smaller than num_classes",
    ),
    "label_below_zero": (
        lambda: fitted(labelled_gan(), x8, y8 - 1, conditions=["y"]),
        ValueError,
        "Class values must be non-negative",
    ),
    "forgotten_condition": (
        lambda: fitted(labelled_gan(), x8, y8),
        ValueError,
        "sites that the story draws; got 'y', which is given",
    ),
    "no_condition": (
        lambda: fitted(
            labelled_gan(),
            x8,
            y8,
            divergence=AuxiliaryClassifier(nn.Linear(1, 4), 3),
            sites=["x"],
        ),
        ValueError,
        "Expected one condition, the labels; got 0. Name their site",
    ),
    "real_labels": (
        lambda: two_classes()(four, four, torch.zeros(4)),
        TypeError,
        "labels of integers; got torch.float32",
    ),
    "labels_in_columns": (
        lambda: two_classes()(four, four, labels[:, None]),
        ValueError,
        "one label per row, of shape (4,); got (4, 1)",
    ),
    "label_of_no_class": (lambda: two_classes()(four, four, labels + 2), IndexError, "Target 2"),
    "label_that_is_ignored": (
        lambda: two_classes()(four, four, labels - 100),
        IndexError,
        "Target -100",
    ),
    "too_few_labels": (
        lambda: two_classes()(four, four, labels[:3]),
        ValueError,
        "as many rows of q_samples and p_samples as conditions",
    ),
    "too_few_draws": (
        lambda: two_classes()(four[:3], four, labels),
        ValueError,
        "got 3 and 4 for [4]",
    ),
    "no_classes": (
        lambda: AuxiliaryClassifier(nn.Linear(2, 1), 2)(four, four, labels),
        ValueError,
        "each of 2 classes per row, of shape (4, 3); got (4, 1). End it with nn.Linear(..., 3)",
    ),
    "num_classes": (
        lambda: AuxiliaryClassifier(nn.Linear(2, 1), 0),
        ValueError,
        "num_classes to be a positive integer",
    ),
    "weight": (
        lambda: AuxiliaryClassifier(nn.Linear(2, 3), 2, weight=-1.0),
        ValueError,
        "weight to be a positive number",
    ),
    "penalty": (
        lambda: Adversarial(nn.Linear(2, 1), gradient_penalty=-1.0),
        ValueError,
        "gradient_penalty to be a number >= 0",
    ),
    "activation": (
        lambda: DeltaHead(2, activation=nn.Sigmoid()),
        TypeError,
        "activation to make an nn.Module",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, error, match):
    with pytest.raises(error, match=re.escape(match)):
        call()


def test_repr_names_the_settings():
    text = repr(AuxiliaryClassifier(nn.Linear(2, 3), 2, weight=0.5))
    assert "num_classes=2, weight=0.5, objective='js', generator='non-saturating'" in text
