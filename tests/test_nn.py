"""Heads and networks: one contract for all of them, and each log-density against its formula."""

import copy
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_lvm.nn as lvm_nn

EVENT = (3, 2)

HEADS = {
    "normal_learned": lambda e: lvm_nn.NormalHead(e),
    "normal_shared": lambda e: lvm_nn.NormalHead(e, scale="shared"),
    "normal_fixed": lambda e: lvm_nn.NormalHead(e, scale=0.3),
    "bernoulli": lambda e: lvm_nn.BernoulliHead(e),
    "categorical": lambda e: lvm_nn.CategoricalHead(e, 5),
    "continuous_bernoulli": lambda e: lvm_nn.ContinuousBernoulliHead(e),
}


class LaplaceHead(nn.Module):
    """A head as a user may write one: no base class of ours."""

    def __init__(self, event_shape):
        super().__init__()
        self.event_shape = event_shape
        self.params_per_value = 1

    def forward(self, raw):
        return dist.Laplace(raw, 1.0).to_event(len(self.event_shape))


# name -> (constructor, trailing shape of the input, event shape)
NETWORKS = {
    "mlp": (lambda: lvm_nn.MLP(6, [8, 8], head=lvm_nn.NormalHead(4)), (6,), (4,)),
    "mlp_linear": (lambda: lvm_nn.MLP(6, [], head=lvm_nn.NormalHead(4)), (6,), (4,)),
    "mlp_shaped": (
        lambda: lvm_nn.MLP((2, 3), [8], head=lvm_nn.CategoricalHead(EVENT, 5), activation=nn.Tanh),
        (2, 3),
        EVENT,
    ),
    "mlp_shared": (
        lambda: lvm_nn.MLP(6, [8], head=lvm_nn.NormalHead(4, scale="shared")),
        (6,),
        (4,),
    ),
    "mlp_user_head": (lambda: lvm_nn.MLP(6, [8], head=LaplaceHead((4,))), (6,), (4,)),
    "conv_encoder": (
        lambda: lvm_nn.ConvEncoder((1, 8, 8), [4, 6], head=lvm_nn.NormalHead(5), activation=nn.ELU),
        (1, 8, 8),
        (5,),
    ),
    "conv_decoder": (
        lambda: lvm_nn.ConvDecoder(5, [6, 4], head=lvm_nn.NormalHead((2, 8, 8)), activation=nn.ELU),
        (5,),
        (2, 8, 8),
    ),
    "conv_decoder_odd": (
        lambda: lvm_nn.ConvDecoder(
            5, [6, 4, 3], head=lvm_nn.BernoulliHead((1, 7, 10)), activation=nn.ELU
        ),
        (5,),
        (1, 7, 10),
    ),
}

each_head = pytest.mark.parametrize("make", HEADS.values(), ids=HEADS.keys())
each_network = pytest.mark.parametrize(
    ("make", "in_shape", "event_shape"), NETWORKS.values(), ids=NETWORKS.keys()
)
each_batch = pytest.mark.parametrize("batch", [(), (4,), (3, 4)], ids=str)


def raw_for(head, batch, **kwargs):
    first, *rest = head.event_shape
    return torch.randn(*batch, head.params_per_value * first, *rest, **kwargs)


# --- the contract of heads


@each_head
@each_batch
def test_head_shapes(make, batch, device):
    head = make(EVENT).to(device)
    d = head(raw_for(head, batch, device=device))
    assert d.batch_shape == batch
    assert d.event_shape == EVENT
    x = d.sample()
    assert x.shape == batch + EVENT
    assert d.log_prob(x).shape == batch
    assert x.device.type == device


@each_head
def test_head_takes_an_integer_event_shape(make):
    head = make(4)
    assert head.event_shape == (4,)
    assert head(raw_for(head, (2,))).event_shape == (4,)


@each_head
def test_head_gradient_reaches_raw_and_every_parameter(make):
    head = make(EVENT)
    raw = raw_for(head, (4,)).requires_grad_()
    d = head(raw)
    d.log_prob(d.sample()).sum().backward()
    for tensor in [raw, *head.parameters()]:
        assert torch.isfinite(tensor.grad).all()
        assert (tensor.grad != 0).all()


@each_head
def test_head_rows_do_not_mix(make):
    head = make(EVENT)
    raw = raw_for(head, (4,))
    d = head(raw)
    x = d.sample()
    alone = torch.stack([head(raw[i]).log_prob(x[i]) for i in range(4)])
    torch.testing.assert_close(d.log_prob(x), alone)


def test_head_repr_names_the_settings():
    assert repr(lvm_nn.NormalHead(4, scale=0.5)) == (
        "NormalHead(event_shape=(4,), scale=0.5, floor=0.0001)"
    )
    assert (
        repr(lvm_nn.CategoricalHead(4, 7)) == "CategoricalHead(event_shape=(4,), num_categories=7)"
    )


# --- each head's log-density, written by hand


def normal_log_prob(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - math.log(2 * math.pi) / 2 - torch.log(scale)


@pytest.mark.usefixtures("float64")
def test_normal_log_prob():
    raw, x = torch.randn(5, 6, 2), torch.randn(5, 3, 2)
    scale = 0.01 + torch.log1p(raw[:, 3:].exp())
    actual = lvm_nn.NormalHead(EVENT, floor=0.01)(raw).log_prob(x)
    torch.testing.assert_close(actual, normal_log_prob(x, raw[:, :3], scale).sum((-1, -2)))


@pytest.mark.usefixtures("float64")
def test_normal_log_prob_with_shared_scale():
    head = lvm_nn.NormalHead(EVENT, scale="shared", floor=0.01)
    raw, x = torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    torch.testing.assert_close(
        head(raw).log_prob(x), normal_log_prob(x, raw, torch.ones(EVENT)).sum((-1, -2))
    )
    nn.init.normal_(head.raw_scale)
    scale = 0.01 + torch.log1p(head.raw_scale.exp())
    torch.testing.assert_close(head(raw).log_prob(x), normal_log_prob(x, raw, scale).sum((-1, -2)))


@pytest.mark.usefixtures("float64")
def test_normal_log_prob_with_fixed_scale_has_no_floor():
    raw, x = torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    actual = lvm_nn.NormalHead(EVENT, scale=0.3, floor=0.1)(raw).log_prob(x)
    expected = normal_log_prob(x, raw, torch.tensor(0.3)).sum((-1, -2))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["learned", "shared"])
@pytest.mark.parametrize("floor", [0.25, 1e-4, 2.0])
def test_normal_scale_keeps_to_the_floor(scale, floor):
    head = lvm_nn.NormalHead(3, scale=scale, floor=floor)
    if scale == "shared":
        assert (head(torch.zeros(3)).base_dist.scale > floor).all()
        nn.init.constant_(head.raw_scale, -1e4)
    actual = head(torch.full((3 * head.params_per_value,), -1e4)).base_dist.scale
    torch.testing.assert_close(actual, torch.full((3,), floor), rtol=1e-6, atol=0.0)


def test_normal_scale_is_finite_at_large_raw_values():
    raw = torch.tensor([0.0, 1e4], requires_grad=True)
    scale = lvm_nn.NormalHead(1)(raw).base_dist.scale
    scale.sum().backward()
    assert scale.item() == pytest.approx(1e4)
    assert raw.grad[1].item() == pytest.approx(1.0)


@pytest.mark.usefixtures("float64")
def test_bernoulli_log_prob():
    raw, x = torch.randn(5, *EVENT), torch.randint(2, (5, *EVENT)).double()
    p = 1 / (1 + (-raw).exp())
    expected = (x * p.log() + (1 - x) * (1 - p).log()).sum((-1, -2))
    torch.testing.assert_close(lvm_nn.BernoulliHead(EVENT)(raw).log_prob(x), expected)


@pytest.mark.usefixtures("float64")
def test_categorical_log_prob():
    raw, x = torch.randn(5, 4 * 3, 2), torch.randint(4, (5, *EVENT))
    actual = lvm_nn.CategoricalHead(EVENT, 4)(raw).log_prob(x)
    expected = torch.zeros(5)
    for n, i, j in torch.cartesian_prod(torch.arange(5), torch.arange(3), torch.arange(2)):
        weights = raw[n, i::3, j].exp()  # row k * event_shape[0] + i holds category k of value i
        expected[n] += (weights[x[n, i, j]] / weights.sum()).log()
    torch.testing.assert_close(actual, expected)


# --- the continuous Bernoulli: no published form of it survives float32, so it is ours

LOGITS = [0.0, 1e-8, 1e-3, 0.2499, 0.2501, 1.0, 5.0, 15.0, 17.0, 40.0, 90.0, 1e3, 1e5]
LOGITS = [-logit for logit in reversed(LOGITS[1:])] + LOGITS


def continuous_bernoulli(logit):
    return lvm_nn.ContinuousBernoulliHead(1)(torch.as_tensor(logit).reshape(-1, 1))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("logit", [-17.0, -3.0, -0.3, 0.4, 2.0, 30.0])
def test_continuous_bernoulli_log_prob_and_moments(logit):
    d = continuous_bernoulli(logit)
    x = torch.tensor([[0.0], [0.3], [1.0]])
    expected = math.log(logit / (math.exp(logit) - 1)) + logit * x[:, 0]
    torch.testing.assert_close(d.log_prob(x), expected)
    mean = 1 / (1 - math.exp(-logit)) - 1 / logit
    variance = 1 / logit**2 - 1 / (2 * math.cosh(logit) - 2)
    assert d.mean.item() == pytest.approx(mean, rel=1e-11)
    assert d.variance.item() == pytest.approx(variance, rel=1e-11)


def gauss_legendre(num_panels=2000):
    """Nodes and weights on [0, 1]: the three-point rule in each panel, exact to degree 5."""
    edges = torch.arange(num_panels) / num_panels
    nodes = (1 + torch.tensor([-math.sqrt(0.6), 0.0, math.sqrt(0.6)])) / 2
    weights = torch.tensor([5.0, 8.0, 5.0]) / 18
    return (edges[:, None] + nodes / num_panels).reshape(-1), (weights / num_panels).repeat(
        num_panels
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("logit", [-90.0, -17.0, -1.0, -0.2, 0.0, 1e-6, 0.2501, 5.0, 16.5, 50.0])
def test_continuous_bernoulli_integrates_to_one(logit):
    d = continuous_bernoulli(logit)
    x, weights = gauss_legendre()
    density = d.log_prob(x[:, None]).exp() * weights
    assert density.sum().item() == pytest.approx(1.0, abs=1e-9)
    assert (density @ x).item() == pytest.approx(d.mean.item(), abs=1e-9)
    second = (density @ (x - d.mean.squeeze()) ** 2).item()
    assert second == pytest.approx(d.variance.item(), abs=1e-9)


@pytest.mark.parametrize("x", [0.0, 0.3, 1.0])
def test_continuous_bernoulli_in_float32_agrees_with_float64(x):
    single = torch.tensor(LOGITS, requires_grad=True)
    double = single.detach().double().requires_grad_()
    value, exact = (
        lvm_nn.ContinuousBernoulliHead(1)(logits[:, None]).log_prob(
            torch.full((1, 1), x).to(logits)
        )
        for logits in (single, double)
    )
    value.sum().backward()
    exact.sum().backward()
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=0.0, atol=2e-6)


@pytest.mark.usefixtures("float64")
def test_continuous_bernoulli_gradient_is_value_minus_mean():
    logits = torch.tensor(LOGITS, requires_grad=True)
    d = lvm_nn.ContinuousBernoulliHead(1)(logits[:, None])
    (grad,) = torch.autograd.grad(d.log_prob(torch.full((1, 1), 0.3)).sum(), logits)
    torch.testing.assert_close(grad, 0.3 - d.mean[:, 0], rtol=0.0, atol=1e-12)
    (slope,) = torch.autograd.grad(d.mean.sum(), logits)
    torch.testing.assert_close(slope, d.variance[:, 0], rtol=0.0, atol=1e-11)


@pytest.mark.usefixtures("float64")
def test_continuous_bernoulli_draws():
    logits = torch.tensor(LOGITS, requires_grad=True)
    d = lvm_nn.ContinuousBernoulliHead(1)(logits[:, None])
    draws = d.rsample((20_000,))[..., 0]
    assert ((draws >= 0) & (draws <= 1)).all()
    error = (draws.mean(0) - d.mean[:, 0]).abs()
    assert (error <= 5 * (d.variance[:, 0] / 20_000).sqrt()).all()
    (slope,) = torch.autograd.grad(draws.mean(0).sum(), logits)
    standard_error = 5 * d.variance[:, 0] / math.sqrt(20_000)  # the slope of a draw is of that size
    assert ((slope - d.variance[:, 0]).abs() <= standard_error + 1e-8).all()


@pytest.mark.usefixtures("float64")
def test_continuous_bernoulli_quantiles_invert_the_distribution_function():
    u = torch.tensor([0.0, 1e-6, 0.2, 0.5, 0.9, 1.0])[:, None]
    logits = torch.tensor([-700.0, -30.0, -1.0, -0.2, 0.2, 1.0, 30.0, 700.0])
    x = lvm_nn.ContinuousBernoulliHead(1)(logits[:, None]).base_dist._inverse_cdf(u[..., None])
    cdf = torch.expm1(logits * x[..., 0]) / torch.expm1(logits)
    torch.testing.assert_close(cdf, u.expand_as(cdf), rtol=0.0, atol=3e-7)


def test_continuous_bernoulli_in_a_plate_of_particles():
    head = lvm_nn.ContinuousBernoulliHead(3)

    def model():
        with pyro.plate("particles", 2, dim=-2), pyro.plate("data", 4, dim=-1):
            return pyro.sample("x", head(torch.zeros(4, 3)))

    assert model().shape == (2, 4, 3)
    with pytest.raises(ValueError, match="support"):
        head(torch.zeros(4, 3)).log_prob(torch.full((4, 3), 1.5))


# --- the contract of networks


@each_network
@each_batch
def test_network_shapes(make, in_shape, event_shape, batch, device):
    network = make().to(device)
    d = network(torch.randn(*batch, *in_shape, device=device))
    assert isinstance(d, dist.Distribution)
    assert d.batch_shape == batch
    assert d.event_shape == event_shape
    assert d.sample().device.type == device


@each_network
def test_network_gradient_reaches_input_and_every_parameter(make, in_shape, event_shape):
    network = make()
    x = torch.randn(16, *in_shape, requires_grad=True)
    d = network(x)
    d.log_prob(d.sample()).sum().backward()
    for name, tensor in [("x", x), *network.named_parameters()]:
        assert tensor.grad is not None, name
        assert torch.isfinite(tensor.grad).all(), name
        assert (tensor.grad != 0).any(), name


@each_network
def test_network_rows_do_not_mix(make, in_shape, event_shape):
    network = make()
    x = torch.randn(2, 3, *in_shape)
    d = network(x)
    values = d.sample()
    alone = torch.stack(
        [torch.stack([network(x[i, j]).log_prob(values[i, j]) for j in range(3)]) for i in range(2)]
    )
    torch.testing.assert_close(d.log_prob(values), alone, rtol=1e-4, atol=1e-4)


@each_network
def test_network_state_dict_round_trip(make, in_shape, event_shape):
    first, second, x = make(), make(), torch.randn(2, *in_shape)
    values = first(x).sample()
    assert not torch.equal(first(x).log_prob(values), second(x).log_prob(values))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(x).log_prob(values), second(x).log_prob(values))


@each_network
def test_network_deepcopy_shares_nothing(make, in_shape, event_shape):
    network, x = make(), torch.randn(2, *in_shape)
    values = network(x).sample()
    before = network(x).log_prob(values)
    clone = copy.deepcopy(network)
    torch.testing.assert_close(clone(x).log_prob(values), before)
    for parameter in clone.parameters():
        nn.init.constant_(parameter, 0.1)
    torch.testing.assert_close(network(x).log_prob(values), before)


@each_network
def test_network_can_be_traced(make, in_shape, event_shape):
    network, x = make(), torch.randn(2, *in_shape)
    values = network(x).sample()
    with pyro.validation_enabled(False):
        graph = make_fx(lambda x: network(x).log_prob(values))(x)
    other = torch.randn(2, *in_shape)
    torch.testing.assert_close(graph(other), network(other).log_prob(values))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 9), (8, 8), (28, 28), (33, 5)], ids=str)
@pytest.mark.parametrize("channels", [[4], [4, 3], [5, 4, 3, 2]], ids=len)
def test_convolutions_of_any_size(size, channels):
    encoder = lvm_nn.ConvEncoder((2, *size), channels[::-1], head=lvm_nn.NormalHead(3))
    decoder = lvm_nn.ConvDecoder(3, channels, head=lvm_nn.BernoulliHead((2, *size)))
    x = decoder(torch.randn(2, 3)).sample()
    assert x.shape == (2, 2, *size)
    assert encoder(x).event_shape == (3,)


def test_conv_decoder_reaches_every_pixel():
    decoder = lvm_nn.ConvDecoder(
        3, [4, 4], head=lvm_nn.NormalHead((1, 7, 9), scale=1.0), activation=nn.Tanh
    )
    spread = decoder(torch.randn(8, 3)).mean.std(0)
    assert (spread > 0).all()


def test_mlp_without_hidden_layers_is_linear():
    network = lvm_nn.MLP(3, [], head=lvm_nn.NormalHead(2, scale=1.0))
    x = torch.randn(5, 3)
    (layer,) = network.layers
    torch.testing.assert_close(network(x).mean, x @ layer.weight.T + layer.bias)


def test_mlp_activates_every_hidden_layer_with_its_own_module():
    made = []

    def activation():
        made.append(nn.PReLU())
        return made[-1]

    network = lvm_nn.MLP(3, [4, 5], head=lvm_nn.BernoulliHead(2), activation=activation)
    kinds = [type(layer).__name__ for layer in network.layers]
    assert kinds == ["Linear", "PReLU", "Linear", "PReLU", "Linear"]
    assert [layer.out_features for layer in network.layers[::2]] == [4, 5, 2]
    assert made[0] is not made[1]


# --- every error

N = lvm_nn.NormalHead
MLP = lvm_nn.MLP
small = {"head": N(2)}
ERRORS = {
    "size_zero": (lambda: N(0), ValueError, "Expected event_shape to be a positive number; got 0"),
    "size_negative": (lambda: N((2, -1)), ValueError, "event_shape to be a positive number"),
    "size_fraction": (lambda: N(2.5), TypeError, "event_shape to be one or more integers; got 2.5"),
    "event_empty": (lambda: N(()), ValueError, "event_shape with at least 1 size"),
    "scale_word": (lambda: N(2, scale="fixed"), ValueError, "'learned', 'shared' or a positive"),
    "scale_zero": (lambda: N(2, scale=0.0), ValueError, "scale to be a positive number; got 0"),
    "scale_negative": (lambda: N(2, scale=-1.0), ValueError, "scale to be a positive number"),
    "scale_nan": (lambda: N(2, scale=math.nan), ValueError, "scale to be a positive number"),
    "scale_none": (lambda: N(2, scale=None), TypeError, "got NoneType"),
    "floor": (lambda: N(2, floor=-1e-3), ValueError, "floor to be a number >= 0"),
    "categories": (lambda: lvm_nn.CategoricalHead(2, 1), ValueError, "num_categories .* >= 2"),
    "raw_shape": (
        lambda: N(2)(torch.zeros(3, 2)),
        ValueError,
        r"raw of shape batch x 4; got (3, 2)",
    ),
    "raw_dtype": (lambda: N(2)(torch.zeros(3, 4).int()), TypeError, "raw .* got torch.int32"),
    "raw_list": (lambda: N(2)([0.0]), TypeError, "floating point tensor; got list"),
    "hidden": (lambda: MLP(2, [0], **small), ValueError, "hidden to be a positive number"),
    "in_shape": (lambda: MLP(-2, [3], **small), ValueError, "in_shape to be a positive number"),
    "head_class": (lambda: MLP(2, [3], head=N), TypeError, "Expected head to be an nn.Module"),
    "head_plain": (lambda: MLP(2, [3], head=nn.ReLU()), TypeError, "with event_shape and params"),
    "activation_made": (lambda: MLP(2, [3], activation=nn.ReLU(), **small), TypeError, "nn.ReLU"),
    "activation_function": (
        lambda: MLP(2, [3], activation=lambda: torch.relu, **small),
        TypeError,
        "activation to make an nn.Module",
    ),
    "mlp_shape": (
        lambda: MLP((2, 3), [3], **small)(torch.zeros(4, 3, 2)),
        ValueError,
        "x of shape batch x 2 x 3; got (4, 3, 2). Reshape x",
    ),
    "mlp_scalar": (
        lambda: MLP(2, [3], **small)(torch.tensor(1.0)),
        ValueError,
        "batch x 2; got ()",
    ),
    "mlp_dtype": (lambda: MLP(2, [3], **small)(torch.zeros(4, 2).long()), TypeError, "torch.int64"),
    "encoder_rank": (
        lambda: lvm_nn.ConvEncoder((8, 8), [3], **small),
        ValueError,
        "in_shape with three sizes, C x H x W; got (8, 8). Write (1, 28, 28)",
    ),
    "encoder_channels": (
        lambda: lvm_nn.ConvEncoder((1, 8, 8), [], **small),
        ValueError,
        "channels with at least 1 size",
    ),
    "encoder_shape": (
        lambda: lvm_nn.ConvEncoder((1, 8, 8), [3], **small)(torch.zeros(4, 8, 8)),
        ValueError,
        "x of shape batch x 1 x 8 x 8; got (4, 8, 8)",
    ),
    "decoder_rank": (
        lambda: lvm_nn.ConvDecoder(2, [3], head=N(64)),
        ValueError,
        "event_shape of the head with three sizes, C x H x W; got (64,)",
    ),
    "decoder_channels": (
        lambda: lvm_nn.ConvDecoder(2, [], head=N((1, 8, 8))),
        ValueError,
        "channels with at least 1 size",
    ),
    "decoder_shape": (
        lambda: lvm_nn.ConvDecoder(2, [3], head=N((1, 8, 8)))(torch.zeros(4, 3)),
        ValueError,
        "z of shape batch x 2; got (4, 3)",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, error, match):
    pattern = match if ".*" in match else re.escape(match)
    with pytest.raises(error, match=pattern):
        call()
