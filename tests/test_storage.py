"""Saved pairs come back equal to the last bit; what does not fit or is damaged is refused whole."""

import functools
import math
import os
import pickle
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_mean,
)
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

import pyro_lvm as lvm
from pyro_lvm.configured import Configured
from pyro_lvm.nn import (
    MLP,
    BernoulliHead,
    CategoricalHead,
    ContinuousBernoulliHead,
    ConvDecoder,
    ConvEncoder,
    DeltaHead,
    Joined,
    LabelHead,
    NormalHead,
    PixelCNN,
    VampPrior,
)
from pyro_lvm.storage.configuration import read_records, write_records
from pyro_lvm.storage.files import atomic
from pyro_lvm.storage.vocabulary import CONFIGURED, DISTRIBUTIONS, HANDED_OVER

SIZES = (5,)
IMAGE = (1, 6, 5)


def vae(head=None, prior=None, **settings):
    encoder = MLP(SIZES, [8], head=NormalHead(2), **settings)
    return lvm.VAE(encoder, MLP(2, [4, 8], head=head or NormalHead(SIZES), **settings), prior)


def image_vae(head):
    encoder = ConvEncoder(IMAGE, [3, 4], head=NormalHead(2), activation=nn.SiLU)
    return lvm.VAE(encoder, ConvDecoder(2, [4, 3], head=head, activation=nn.ELU))


def mixture(covariance, autoguide=None):
    if autoguide is None:
        return lvm.GaussianMixture(2, 5, covariance)
    priors = {
        "loc": dist.Normal(0.0, 3.0).expand([2, 5]).to_event(2),
        "weights": dist.Dirichlet(torch.tensor([2.0, 3.0])),
    }
    return lvm.GaussianMixture(2, 5, covariance, priors=priors, autoguide=autoguide, floor=0.1)


def numbers():
    return torch.rand(12, 5) * 0.8 + 0.1


def bits():
    return torch.randint(2, (12, 5)).float()


def pictures():
    return torch.randint(2, (12, *IMAGE)).float()


# name -> constructor, data
MODELS = {
    "vae": (vae, numbers),
    "vae with settings": (
        lambda: lvm.VAE(
            MLP(SIZES, (), head=NormalHead(2, scale="shared", floor=0.01)),
            MLP(2, [8, 4], head=NormalHead(SIZES, scale=0.3)),
            plate="rows",
        ),
        numbers,
    ),
    "vae with a prior": (
        lambda: vae(prior=dist.Laplace(torch.ones(2), 2.0).to_event(1)),
        numbers,
    ),
    "vae of bits": (lambda: vae(BernoulliHead(SIZES), activation=nn.Tanh), bits),
    "vae of categories": (lambda: vae(CategoricalHead(SIZES, 3)), bits),
    "vae of grey values": (
        lambda: vae(
            ContinuousBernoulliHead(SIZES), activation=functools.partial(nn.LeakyReLU, 0.3)
        ),
        numbers,
    ),
    "convolutional vae": (lambda: image_vae(BernoulliHead(IMAGE)), pictures),
    "full mixture": (lambda: mixture("full"), numbers),
    "tied mixture": (lambda: mixture("tied"), numbers),
    "spherical mixture": (lambda: mixture("spherical"), numbers),
    "diagonal mixture": (lambda: mixture("diagonal"), numbers),
    "mixture with AutoNormal": (lambda: mixture("full", AutoNormal), numbers),
    "mixture with AutoDelta": (lambda: mixture("tied", AutoDelta), numbers),
    "mixture with AutoDiagonalNormal": (
        lambda: mixture(
            "spherical",
            functools.partial(AutoDiagonalNormal, init_scale=0.5, init_loc_fn=init_to_mean),
        ),
        numbers,
    ),
    "mixture with AutoMultivariateNormal": (
        lambda: mixture("diagonal", AutoMultivariateNormal),
        numbers,
    ),
    "mixture with AutoLowRankMultivariateNormal": (
        lambda: mixture("diagonal", functools.partial(AutoLowRankMultivariateNormal, rank=2)),
        numbers,
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def labels():
    return torch.arange(12) % 3


def joined(size, head, **settings):
    return Joined(MLP(size + 3, [4], head=head, **settings), [size, 3])


def on_vamp_prior():
    encoder = MLP(SIZES, [8], head=NormalHead(2))
    return lvm.VAE(encoder, MLP(2, [8], head=NormalHead(SIZES)), VampPrior(encoder, 3, 5))


def in_two_layers():
    encoders = [MLP(SIZES, [4], head=NormalHead(3)), MLP(3, [4], head=NormalHead(2))]
    decoders = [MLP(3, [4], head=NormalHead(SIZES)), MLP(2, [4], head=NormalHead(3))]
    return lvm.HierarchicalVAE(encoders, decoders)


def pixels(**settings):
    return PixelCNN((2, 3), channels=4, layers=2, first_kernel_size=3, **settings)


# further ones: name -> constructor, the arguments of model and guide
FAMILY = {
    "conditional vae": (
        lambda: lvm.ConditionalVAE(joined(5, NormalHead(2)), joined(2, NormalHead(5))),
        lambda: (numbers(), labels()),
    ),
    "semi-supervised vae": (
        lambda: lvm.SemiSupervisedVAE(
            MLP(SIZES, [4], head=LabelHead(3)),
            joined(5, NormalHead(2)),
            joined(2, NormalHead(5)),
            num_classes=3,
            class_probs=[0.5, 0.2, 0.3],
            label_weight=2.0,
        ),
        lambda: (numbers(), labels() - 1),
    ),
    "mixture vae": (
        lambda: lvm.MixtureVAE(
            MLP(SIZES, [4], head=NormalHead(2)), MLP(2, [4], head=NormalHead(SIZES)), 3
        ),
        lambda: (numbers(),),
    ),
    "vae on a vamp prior": (on_vamp_prior, lambda: (numbers(),)),
    "hierarchical vae": (in_two_layers, lambda: (numbers(),)),
    "pixelcnn vae": (
        lambda: lvm.PixelCNNVAE(MLP(6, [4], head=NormalHead(2)), pixels(context_features=2)),
        lambda: (torch.randint(2, (12, 6)).float(),),
    ),
    "pixelcnn": (
        lambda: lvm.Density(pixels()),
        lambda: (torch.randint(2, (12, 6)).float(),),
    ),
    "gaussian": (lambda: lvm.Gaussian(5, "diagonal", floor=0.01), lambda: (numbers(),)),
    "kernel density": (lambda: lvm.KernelDensity(5, 7, bandwidth=0.3), lambda: (numbers(),)),
}
GANS = {
    "gan": (
        lambda: lvm.GAN(MLP(2, [4], head=DeltaHead(5, activation=nn.Sigmoid)), 2),
        lambda: (numbers(),),
    ),
    "conditional gan": (
        lambda: lvm.ConditionalGAN(joined(2, DeltaHead(5)), 2),
        lambda: (numbers(), labels()),
    ),
}


def build(name):
    constructor, data = MODELS[name]
    return constructor(), data()


def train(model, guide, *args, steps=3):
    """Steps of SVI, so that no value is what a constructor makes it."""
    enumerates = isinstance(getattr(model, "__self__", None), lvm.GaussianMixture)
    kind = TraceEnum_ELBO if enumerates else Trace_ELBO
    elbo = kind(max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(steps):
        svi.step(*args)
    pyro.set_rng_seed(3)
    return elbo.loss(model, guide, *args)


def trained(name):
    model, x = build(name)
    if isinstance(model, lvm.GaussianMixture):
        model.initialize(20 * x)  # a floor other than the constructor's
    train(model.model, model.guide, x)
    return model, x


def outputs(model, x):
    """All that a model says about data and draws, under one seed."""
    pyro.set_rng_seed(4)
    kind = TraceEnum_ELBO if isinstance(model, lvm.GaussianMixture) else Trace_ELBO
    loss = kind(max_plate_nesting=1).loss(model.model, model.guide, x)
    draws = model.sample(4)
    if isinstance(model, lvm.GaussianMixture):
        return [torch.tensor(loss), draws, model.log_prob(x), model.covariances()]
    q = model.encode(x)
    return [torch.tensor(loss), draws, q.sample(), q.log_prob(q.mean)]


def alike(first, second):
    return len(first) == len(second) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
    )


def state(*modules):
    """Copies of parameters and buffers, and of all that Pyro's param store holds."""
    store = pyro.get_param_store()
    copies = [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]
    return [*copies, {k: v.detach().clone() for k, v in store.items()}]


def same(first, second):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fitted.pt"


# ----------------------------------------------------------------------------- models of ours


@every_model
def test_a_model_comes_back(name, path):
    model, x = trained(name)
    expected = outputs(model, x)
    lvm.save(model, path)
    loaded = lvm.load(path)
    assert type(loaded) is type(model)
    assert repr(loaded) == repr(model)
    assert same(state(loaded), state(model))
    assert alike(outputs(loaded, x), expected)


@every_model
def test_a_model_that_was_never_run_comes_back(name, path):
    model, x = build(name)
    lvm.save(model, path)
    assert alike(outputs(lvm.load(path), x), outputs(model, x))


def loss_of(model, args):
    """Under one seed; stories without a likelihood by a divergence."""
    pyro.set_rng_seed(4)
    if model.guide is None and hasattr(model, "generator"):
        return lvm.ImplicitDivergence(lvm.MMD(), conditions=["y"][: len(args) - 1]).loss(
            model.model, None, *args
        )
    elbo = lvm.TraceInfo_ELBO(max_plate_nesting=1)
    return elbo.loss(model.model, model.guide or (lambda *args: None), *args)


@pytest.mark.parametrize("name", [*FAMILY, *GANS])
def test_one_of_the_family_comes_back(name, path):
    make, arguments = {**FAMILY, **GANS}[name]
    model, args = make(), arguments()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # not what a constructor makes
    lvm.save(model, path)
    loaded = lvm.load(path)
    assert type(loaded) is type(model)
    assert repr(loaded) == repr(model)
    assert same(state(loaded), state(model))
    assert loss_of(loaded, args) == loss_of(model, args)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))  # shared ones still are


@every_model
def test_a_loaded_model_is_trained_apart(name, path):
    model, x = trained(name)
    lvm.save((model.model, model.guide), path)
    loaded = lvm.load(path)
    before = state(model)[0]
    loss = train(loaded.model, loaded.guide, x)
    assert math.isfinite(loss)
    assert same([state(model)[0]], [before])
    changed = loaded.state_dict()
    assert not any(torch.equal(changed[name], before[name]) for name, _ in model.named_parameters())


@every_model
def test_a_model_loads_into_one_like_it(name, path):
    model, x = trained(name)
    lvm.save(model, path)
    other, _ = build(name)
    assert lvm.load(path, into=other) is other
    assert alike(outputs(other, x), outputs(model, x))
    assert lvm.load(path, into=(other.model, other.guide))[0] == other.model


@every_model
def test_saving_and_loading_draw_no_random_numbers(name, path):
    model, _ = build(name)
    expected = torch.get_rng_state()
    lvm.save(model, path)
    lvm.load(path)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("name", ["vae", "full mixture", "mixture with AutoNormal"])
@pytest.mark.parametrize("when", ["before it is run", "after"])
def test_double_precision(name, when, path):
    model, x = build(name) if when == "before it is run" else trained(name)
    model, x = model.double(), x.double()
    if model.__dict__.get("priors"):
        loc = dist.Normal(torch.zeros(2, 5).double(), 3.0).to_event(2)
        weights = dist.Dirichlet(torch.tensor([2.0, 3.0]).double())
        model.priors.update(loc=loc, weights=weights)
    train(model.model, model.guide, x)
    lvm.save(model, path)
    loaded = lvm.load(path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert {b.dtype for b in loaded.buffers()} <= {torch.float64}
    assert alike(outputs(loaded, x), outputs(model, x))


def test_modes_frozen_parameters_and_types_come_back(path):
    model = vae()
    model.decoder.eval()
    model.encoder.layers[0].requires_grad_(False)
    model.decoder.half()
    lvm.save(model, path)
    loaded = lvm.load(path)
    assert [m.training for m in loaded.modules()] == [m.training for m in model.modules()]
    assert [(n, p.requires_grad, p.dtype) for n, p in loaded.named_parameters()] == [
        (n, p.requires_grad, p.dtype) for n, p in model.named_parameters()
    ]
    into = vae()
    into.decoder.half()
    lvm.load(path, into=into)
    assert not into.decoder.training
    assert into.encoder.training


def test_frozen_parameters_that_are_made_late_stay_frozen(path):
    model, _ = trained("mixture with AutoNormal")
    model._autoguide.requires_grad_(False)
    lvm.save(model, path)
    assert not any(p.requires_grad for p in lvm.load(path)._autoguide.parameters())


@pytest.mark.parametrize("name", ["vae with a prior", "mixture with AutoNormal"])
def test_from_any_device_to_any_other(name, path, device):
    model, x = trained(name)
    expected = outputs(model, x)
    lvm.save(model, path)
    moved = lvm.load(path, device=device)
    assert {t.device.type for t in [*moved.parameters(), *moved.buffers()]} == {device}
    assert moved.sample(3).device.type == device
    train(moved.model, moved.guide, x.to(device))
    lvm.load(path, into=moved)
    assert {t.device.type for t in [*moved.parameters(), *moved.buffers()]} == {device}
    if name == "mixture with AutoNormal" or device == "cpu":  # a Distribution stays where it is
        lvm.save(moved, path)
    assert alike(outputs(lvm.load(path), x), expected)


def test_a_file_with_cuda_tensors_loads_without_cuda(path, monkeypatch):
    model, x = trained("vae with a prior")
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        lvm.save(model, path)
    assert b"cuda:0" in path.read_bytes()
    assert alike(outputs(lvm.load(path), x), outputs(model, x))
    assert alike(outputs(lvm.load(path, into=vae(prior=model.prior)), x), outputs(model, x))


def test_what_replaced_a_network_is_saved(path):
    model, x = build("vae")
    model.decoder = MLP(2, [7], head=NormalHead(SIZES, scale=0.2), activation=nn.Softplus)
    model.prior = dist.Normal(torch.ones(2), 0.5).to_event(1)
    lvm.save(model, path)
    assert alike(outputs(lvm.load(path), x), outputs(model, x))


def test_a_module_that_is_used_twice_stays_one(path):
    head = NormalHead(SIZES, scale="shared")
    model = lvm.VAE(MLP(5, [], head=head), MLP(5, [], head=head))
    lvm.save(model, path)
    loaded = lvm.load(path)
    assert loaded.encoder.head is loaded.decoder.head


def test_every_module_is_in_the_file_once(path):
    lvm.save(vae(), path)
    assert torch.load(path, weights_only=True)["states"].keys() == {"model"}


def test_only_the_values_of_a_view_are_in_the_file(path):
    loc = torch.zeros(1_000_000)[:2]
    model = vae(prior=dist.Normal(loc, 1.0).to_event(1))
    model.decoder.layers[0].bias.data = torch.zeros(1_000_000)[:4]
    lvm.save(model, path)
    assert path.stat().st_size < 100_000


def test_every_class_of_ours_is_tried():
    """A new model or network needs a row in MODELS."""
    rows = [*MODELS.values(), *FAMILY.values(), *GANS.values()]
    found = {r["class"] for make, _ in rows for r in write_records(make())}
    assert found >= CONFIGURED.keys()
    own = [value for module in (lvm.nn, lvm.models) for value in vars(module).values()]
    modules = {value for value in own if isinstance(value, type) and issubclass(value, nn.Module)}
    assert modules == set(CONFIGURED.values())


# ----------------------------------------------------------------- what a model is made of


def positive(*shape):
    return torch.rand(shape) + 0.5


PRIORS = {
    "Beta": lambda: dist.Beta(positive(3), positive(3)),
    "Cauchy": lambda: dist.Cauchy(torch.randn(3), positive(3)),
    "Dirichlet": lambda: dist.Dirichlet(positive(3)),
    "Exponential": lambda: dist.Exponential(positive(3)),
    "Gamma": lambda: dist.Gamma(positive(3), positive(3)),
    "Gumbel": lambda: dist.Gumbel(torch.randn(3), positive(3)),
    "HalfCauchy": lambda: dist.HalfCauchy(positive(3)),
    "HalfNormal": lambda: dist.HalfNormal(positive(3)),
    "Independent": lambda: dist.Normal(torch.randn(2, 3), positive(3)).to_event(2),
    "InverseGamma": lambda: dist.InverseGamma(positive(3), positive(3)),
    "Laplace": lambda: dist.Laplace(torch.randn(3), positive(3)),
    "LogNormal": lambda: dist.LogNormal(torch.randn(3), positive(3)),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        torch.randn(3), torch.randn(3, 2), positive(3)
    ),
    "MultivariateNormal": lambda: dist.MultivariateNormal(
        torch.randn(3), precision_matrix=torch.cov(torch.randn(3, 9))
    ),
    "Normal": lambda: dist.Normal(torch.randn(3), positive(3)),
    "StudentT": lambda: dist.StudentT(positive(3), torch.randn(3), positive(3)),
    "Uniform": lambda: dist.Uniform(torch.zeros(3), positive(3)),
}


class Holder(Configured):
    """Anything as an argument."""

    def __init__(self, *, value):
        self.value = value


def there_and_back(value, path):
    torch.save(write_records(Holder(value=value)), path)
    records = torch.load(path, weights_only=True)
    return read_records(records, [Holder]).value


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.usefixtures("float64")
def test_distributions(name, path):
    prior = PRIORS[name]()
    loaded = there_and_back(prior, path)
    assert type(loaded) is type(prior)
    assert (loaded.batch_shape, loaded.event_shape) == (prior.batch_shape, prior.event_shape)
    x = prior.sample((5,))
    assert torch.equal(loaded.log_prob(x), prior.log_prob(x))
    draws = []
    for source in (prior, loaded):
        torch.manual_seed(1)
        draws.append(source.sample((4,)))
    assert torch.equal(*draws)


def test_every_distribution_is_tried():
    assert {f"pyro.distributions.{name}" for name in PRIORS} == {
        n for n, _ in DISTRIBUTIONS.values()
    }


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        0.1,
        "word",
        (1, 2.5, ["a", ()]),
        {"a": {"b": (1, None)}},
        torch.Size([2, 3]),
        *HANDED_OVER.values(),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # no address: workers agree
)
def test_plain_values(value, path):
    assert there_and_back(value, path) == value


def test_types_of_numbers_are_pythons(path):
    found = there_and_back((np.int64(3), np.float32(0.5), np.float64(0.1), True), path)
    assert found == (3, 0.5, 0.1, True)
    assert [type(x) for x in found] == [int, float, float, bool]


def test_defaults_are_written():
    arguments = write_records(vae())[-1]["arguments"]
    assert arguments.keys() == {"encoder", "decoder", "prior", "plate", "fill"}
    assert arguments["plate"] == "data"


class Scaled(lvm.VAE):
    """A user's own: other arguments, some handed on."""

    def __init__(self, factor, *, width=8, **others):
        decoder = MLP(2, [width], head=NormalHead(SIZES))
        super().__init__(MLP(SIZES, [width], head=NormalHead(2)), decoder, **others)
        self.factor = factor

    def decode(self, z):
        return super().decode(self.factor * z)


class Doubled(Scaled):
    pass


class OwnEncoder(Configured, nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.linear = nn.Linear(5, width)

    def forward(self, x):
        return dist.Normal(self.linear(self.norm(x)), 1.0).to_event(1)


@pytest.mark.parametrize("kind", [Scaled, Doubled])
def test_a_class_of_the_user(kind, path):
    prior = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    model, x = kind(3.0, width=6, prior=prior), numbers()
    train(model.model, model.guide, x)
    lvm.save(model, path)
    loaded = lvm.load(path, classes=[kind])
    assert type(loaded) is kind
    assert loaded.factor == 3.0
    assert alike(outputs(loaded, x), outputs(model, x))
    with pytest.raises(ValueError, match=rf"got '{kind.__name__}'.*classes=\[{kind.__name__}\]"):
        lvm.load(path)


def test_a_network_of_the_user_and_its_buffers(path):
    model = lvm.VAE(OwnEncoder(2), MLP(2, [], head=NormalHead(SIZES)))
    x = 3 + numbers()
    train(model.model, model.guide, x)
    assert model.encoder.norm.num_batches_tracked == 4  # three steps and a loss, no call besides
    model.eval()
    lvm.save(model, path)
    loaded = lvm.load(path, classes=[OwnEncoder])
    loaded.model(x)
    assert loaded.encoder.norm.num_batches_tracked == 4
    assert not loaded.encoder.norm.training
    assert alike(outputs(loaded, x), outputs(model, x))


class PlainEncoder(nn.Module):
    """A user's own that keeps no arguments."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 2)

    def forward(self, x):
        return dist.Normal(self.linear(x), 1.0).to_event(1)


class Identity(Configured, nn.Module):
    """Without a constructor of its own."""

    def forward(self, x):
        return dist.Normal(x, 1.0).to_event(1)


def test_a_class_without_a_constructor(path):
    model, x = lvm.VAE(Identity(), Identity()), numbers()
    lvm.save(model, path)
    assert Trace_ELBO().loss(*programs(lvm.load(path, classes=[Identity])), x)


def programs(model):
    return model.model, model.guide


def positional(*widths):
    class Stack(OwnEncoder):
        def __init__(self, *widths):
            super().__init__(widths[-1])

    return Stack(*widths)


UNWRITABLE = {
    "a lambda": (lambda: vae(activation=lambda: nn.LeakyReLU(0.2)), "activation=<function"),
    "a network that keeps no arguments": (
        lambda: lvm.VAE(PlainEncoder(), MLP(2, [], head=NormalHead(SIZES))),
        "encoder=PlainEncoder",
    ),
    "a function": (
        lambda: lvm.VAE(
            lambda x: dist.Normal(x[..., :2], 1.0).to_event(1), MLP(2, [], head=NormalHead(SIZES))
        ),
        "encoder=<function",
    ),
    "a distribution": (
        lambda: vae(prior=dist.VonMises(torch.zeros(2), 1.0).to_event(1)),
        "base_distribution=VonMises",
    ),
    "arguments without names": (
        lambda: lvm.VAE(positional(3, 2), MLP(2, [], head=NormalHead(SIZES))),
        r"because of \*widths of Stack",
    ),
}


@pytest.mark.parametrize("what", UNWRITABLE)
def test_what_can_not_be_written_is_said_and_the_values_are_saved(what, path):
    make, match = UNWRITABLE[what]
    model, x = make(), numbers()
    train(model.model, model.guide, x)
    with pytest.warns(UserWarning, match=f"(?s)not what the VAE was made of.*{match}.*into="):
        lvm.save(model, path)
    with pytest.raises(ValueError, match=f"(?s){match.removeprefix('because of ')}.*into=pair"):
        lvm.load(path)
    other = make()
    other.model(x)
    lvm.load(path, into=other)
    assert alike(outputs(other, x), outputs(model, x))


def test_what_was_made_with_a_lambda_can_be_pickled():
    network = MLP(5, [3], head=NormalHead(2), activation=lambda: nn.LeakyReLU(0.2))
    copy = pickle.loads(pickle.dumps(network))
    x = numbers()
    assert torch.equal(copy(x).mean, network(x).mean)


# ------------------------------------------------------------------------ pairs of the user


def functions(constraint=constraints.positive, kind=nn.Linear, extra=False, dtype=torch.float32):
    """A pair of plain functions with ``pyro.param`` and ``pyro.module``."""
    torch.manual_seed(1)
    net = nn.Sequential(kind(1, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))

    def model(x, *, shift=0.0):
        scale = pyro.param("scale", torch.tensor(0.7, dtype=dtype), constraint=constraint)
        if extra:
            pyro.param("extra", torch.zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, scale), obs=x)

    def guide(x, *, shift=0.0):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0] - shift, 0.5))

    return model, guide, net


X = torch.linspace(-1, 2, 9)


def test_plain_functions(path):
    pyro.param("theirs", torch.tensor(1.0))
    model, guide, net = functions()
    loss = train(model, guide, X)
    expected, rng = state(net), torch.get_rng_state()
    lvm.save((model, guide), path, args=(X,), kwargs={"shift": 0.5})
    assert same(state(net), expected)  # the run left batch statistics alone
    assert not nn.modules.module._global_forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), rng)

    pyro.clear_param_store()
    theirs = pyro.param("theirs", torch.tensor(2.0))
    model, guide, fresh = functions()
    assert not same(state(fresh)[:1], expected[:1])
    pair = (model, guide)
    assert lvm.load(path, into=pair, args=(X,)) is pair
    assert same(state(fresh)[:1], expected[:1])
    assert pyro.param("scale") == expected[1]["scale"] != 0.7
    assert pyro.param("theirs").unconstrained() is theirs.unconstrained()
    assert torch.equal(theirs, torch.tensor(2.0))
    pyro.set_rng_seed(3)
    assert Trace_ELBO(max_plate_nesting=1).loss(model, guide, X) == loss
    before = state(fresh)
    train(model, guide, X)  # what was loaded is what is trained
    assert not same(state(fresh), before)


def autoguide_pair(num_features=2, positive_scale=True):
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(num_features)
            constraint = constraints.positive if positive_scale else constraints.real
            self.scale = PyroParam(torch.tensor(0.5), constraint=constraint)
            self.register_buffer("offset", torch.tensor(0.1))

        def forward(self, x, y):
            prior = dist.Normal(torch.zeros(num_features), 1.0).to_event(1)
            weight = pyro.sample("weight", prior)
            with pyro.plate("data", len(x)):
                loc = (self.norm(x) * weight).sum(-1) + self.offset
                pyro.sample("y", dist.Normal(loc, self.scale), obs=y)

    model = Regression()
    return model, AutoNormal(model)


def test_modules_with_a_guide_that_is_set_up_late(path):
    x, y = torch.randn(9, 2), torch.randn(9)
    model, guide = autoguide_pair()
    loss = train(model, guide, x, y)
    model.eval()
    model.offset.fill_(0.3)
    loss = train(model, guide, x, y, steps=0)
    expected = state(model, guide)[:2]
    lvm.save((model, guide), path, args=(x, y))
    assert same(state(model, guide)[:2], expected)

    pyro.clear_param_store()
    model, guide = autoguide_pair()
    lvm.load(path, into=(model, guide), args=(x, y))
    assert same(state(model, guide)[:2], expected)
    assert not model.training
    assert not model.norm.training
    assert train(model, guide, x, y, steps=0) == loss


def test_a_model_of_ours_whose_networks_declare_parameters(path):
    def make():
        _, _, net = functions()

        def encoder(x):
            pyro.module("net", net)
            return dist.Normal(net(x[:, :1]), 1.0).to_event(1)

        return lvm.VAE(encoder, MLP(1, [], head=NormalHead(SIZES))), net

    (model, net), x = make(), numbers()
    train(model.model, model.guide, x)
    with pytest.warns(UserWarning, match="encoder=<function"):
        lvm.save(model, path, args=(x,))
    expected = state(net)[:1]
    pyro.clear_param_store()
    model, net = make()
    lvm.load(path, into=model, args=(x,))
    assert same(state(net)[:1], expected)


def test_a_method_of_a_model_of_ours_with_another_guide(path):
    model, x = build("vae")

    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    train(model.model, guide, x)
    lvm.save((model.model, guide), path, args=(x,))
    expected = state(model)[0], pyro.param("loc").detach().clone()
    pyro.clear_param_store()
    other, _ = build("vae")
    lvm.load(path, into=(other.model, guide), args=(x,))
    assert same([state(other)[0]], expected[:1])
    assert torch.equal(pyro.param("loc"), expected[1])
    with pytest.raises(ValueError, match="pair of your own"):
        lvm.load(path)


def test_a_model_alone(path):
    def model():
        pyro.param("loc", torch.tensor(1.0))

    pyro.param("loc", torch.tensor(5.0))
    lvm.save((model, None), path)
    pyro.clear_param_store()
    lvm.load(path, into=(model, None))
    assert pyro.param("loc") == 5.0


def other_regression():
    return autoguide_pair(num_features=3), (torch.randn(9, 3), torch.randn(9))


MISFITS = {
    "a parameter more": (
        lambda: (functions(extra=True), (X,)),
        r"only in the pair: pyro\.param 'extra'",
    ),
    "another shape": (
        lambda: (functions(kind=lambda i, o: nn.Linear(i, o, bias=False)), (X,)),
        r"only in the file: pyro\.param 'net\$\$\$0\.bias'",
    ),
    "another constraint": (
        lambda: (functions(constraints.unit_interval), (X,)),
        r"'scale', \(\) torch\.float32 GreaterThan in the file and \(\) torch\.float32 Interval",
    ),
    "another type": (
        lambda: (functions(dtype=torch.float64), (X,)),
        r"'scale', \(\) torch\.float32 .* and \(\) torch\.float64",
    ),
    "another pair": (
        other_regression,
        r"pair: .*model\.norm\.weight.*in the file: .*pyro\.param 'scale'",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_pair_that_does_not_fit_is_left_alone(what, path):
    model, guide, _ = functions()
    train(model, guide, X)
    lvm.save((model, guide), path, args=(X,))
    pyro.clear_param_store()
    pyro.param("theirs", torch.tensor(2.0))
    make, match = MISFITS[what]
    (model, guide, *nets), args = make()
    nets = nets or [model]
    before = state(*nets)
    with pytest.raises(ValueError, match=f"(?s){match}.*Nothing was loaded"):
        lvm.load(path, into=(model, guide), args=args)
    assert same(state(*nets), before)


def test_shapes_of_modules_are_compared_before_any_is_copied(path):
    lvm.save(vae(), path)
    other = lvm.VAE(MLP(SIZES, [8], head=NormalHead(2)), MLP(2, [4, 9], head=NormalHead(SIZES)))
    before = state(other)
    match = r"model\.decoder\.layers\.2\.weight, \(8, 4\) torch\.float32 in the file and \(9, 4\)"
    with pytest.raises(ValueError, match=match):
        lvm.load(path, into=other)
    assert same(state(other), before)


def test_names_of_modules_are_compared(path):
    lvm.save(vae(), path)
    with pytest.raises(ValueError, match=r"(?s)only in the pair.*model\.loc.*in the file.*encoder"):
        lvm.load(path, into=mixture("full"))


REFUSED = {
    "no data for a pair": (
        lambda path: lvm.save(functions()[:2], path),
        ValueError,
        r"Expected args.*'x'.*args=\(x,\)",
    ),
    "no data for a module": (
        lambda path: lvm.save(autoguide_pair(), path),
        ValueError,
        "Expected args.*'x'",
    ),
    "a network": (lambda path: lvm.save(PlainEncoder(), path), TypeError, "got PlainEncoder.*None"),
    "a class": (
        lambda path: lvm.load(path, into=lvm.VAE),
        TypeError,
        "one of our models.*got _PyroModuleMeta",
    ),
    "no such folder": (
        lambda path: lvm.save(vae(), path / "a" / "b.pt"),
        ValueError,
        "existing folder; got .*b.pt",
    ),
    "a folder": (lambda path: lvm.save(vae(), path.parent), ValueError, "path of a file"),
    "no such file": (lambda path: lvm.load(path), FileNotFoundError, r"fitted\.pt"),
    "a folder to load": (lambda path: lvm.load(path.parent), IsADirectoryError, "Is a directory"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what, path):
    call, error, match = REFUSED[what]
    with pytest.raises(error, match=match):
        call(path)


# ---------------------------------------------------------------------------------- the file


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def with_trap(path):
    torch.save(
        {"format": "pyro_lvm pair", "version": 1, "trap": Trap(path.parent / "sprung")}, path
    )


def of_a_later_version(path):
    lvm.save(vae(), path)
    torch.save(torch.load(path, weights_only=True) | {"version": 2}, path)


def with_another_class(name):
    def write(path):
        lvm.save(vae(), path)
        contents = torch.load(path, weights_only=True)
        contents["configuration"][0]["class"] = name
        torch.save(contents, path)

    return write


def with_another_name(path):
    lvm.save(vae(), path)
    contents = torch.load(path, weights_only=True)
    contents["configuration"][1]["arguments"]["activation"] = {"name": "os.system"}
    torch.save(contents, path)


def with_another_argument(path):
    lvm.save(vae(), path)
    contents = torch.load(path, weights_only=True)
    contents["configuration"][0]["arguments"]["colour"] = 1
    torch.save(contents, path)


def without_a_model(path):
    lvm.save(vae(), path)
    contents = torch.load(path, weights_only=True)
    contents["configuration"].pop()
    torch.save(contents, path)


FOREIGN = {
    "empty": (lambda path: path.write_bytes(b""), "cut short or of another kind"),
    "a text": (lambda path: path.write_text("weights"), "cut short or of another kind"),
    "a state_dict": (
        lambda path: torch.save(vae().state_dict(), path),
        "written otherwise.*load_state_dict",
    ),
    "a tensor": (lambda path: torch.save(torch.ones(2), path), "written otherwise"),
    "a pickled model": (lambda path: torch.save(vae(), path), "that lvm.save has written; got"),
    "an array": (lambda path: np.savez(path.open("wb"), a=np.ones(2)), "that lvm.save has written"),
    "a later version": (of_a_later_version, "version 1 at most; got 2.*Update pyro_lvm"),
    "code": (with_trap, "that lvm.save has written; got"),
    "another class": (with_another_class("subprocess.Popen"), "known.*got 'subprocess.Popen'"),
    "another class of ours": (
        with_another_class("pyro_lvm.nn.CategoricalHead"),
        r"arguments that pyro_lvm\.nn\.CategoricalHead takes.*into=pair",
    ),
    "another name": (with_another_name, "known.*got 'os.system'"),
    "another argument": (with_another_argument, "NormalHead takes.*colour"),
    "no model": (without_a_model, "Expected a model in the file; got MLP"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_of_another_kind_is_refused(what, path):
    write, match = FOREIGN[what]
    write(path)
    with pytest.raises(ValueError, match=match):
        lvm.load(path)
    assert not (path.parent / "sprung").exists()


def test_the_trap_would_spring(path):
    with_trap(path)
    torch.load(path, weights_only=False)
    assert (path.parent / "sprung").exists()


def test_a_pair_of_functions_is_not_built(path):
    lvm.save(functions()[:2], path, args=(X,))
    with pytest.raises(ValueError, match=r"pair of your own.*into=pair"):
        lvm.load(path)


def test_a_truncated_file_is_refused(path):
    lvm.save(vae(), path)
    whole = path.read_bytes()
    for length in [1, 30, 1000, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"that lvm\.save has written; got .*fitted\.pt"):
            lvm.load(path)


def test_a_changed_byte_is_refused_or_changes_nothing(path):
    """Bytes that nothing reads are in every file: padding, dates."""
    model, x = trained("vae")
    lvm.save(model, path)
    whole, expected = path.read_bytes(), outputs(model, x)
    weight = model.encoder.layers[0].weight.detach().numpy().tobytes()
    places = random.Random(0).sample(range(len(whole)), 200)
    refused = []
    for place in [whole.index(weight) + 2, *places]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            assert alike(outputs(lvm.load(path), x), expected)
        except ValueError as error:
            assert "that lvm.save has written; got" in str(error)  # noqa: PT017
            refused.append(place)
    assert whole.index(weight) + 2 in refused
    assert len(refused) > 50


def test_a_save_that_fails_leaves_the_old_file(path, monkeypatch):
    lvm.save(vae(), path)
    before = path.read_bytes()

    def fail(contents, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        lvm.save(vae(), path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_values_that_could_not_be_read_are_not_written(path):
    class Odd(PlainEncoder):
        def get_extra_state(self):
            return Trap(path.parent / "sprung")

        def set_extra_state(self, state):
            pass

    lvm.save(vae(), path)
    before = path.read_bytes()
    model = lvm.VAE(Odd(), MLP(2, [], head=NormalHead(SIZES)))
    with (
        pytest.warns(UserWarning, match="encoder=Odd"),
        pytest.raises(ValueError, match=r"that lvm\.save has written"),
    ):
        lvm.save(model, path)
    assert path.read_bytes() == before


def test_the_file_takes_its_place_complete_and_on_the_disk(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    with atomic(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert calls[:2] == [len(b"all of it"), "replace"]  # then the folder's entry
    assert path.read_bytes() == b"all of it"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_link_stays_one(path):
    target = path.parent / "target.pt"
    path.symlink_to(target)
    lvm.save(vae(), path)
    assert path.is_symlink()
    assert target.is_file()
    assert isinstance(lvm.load(str(path)), lvm.VAE)
