"""PixelCNN: densities that sum to one, pixels that see what they may and all of it, true draws."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pyro_lvm as lvm
from pyro_lvm.distributions import Autoregressive, Incomplete
from pyro_lvm.nn import MLP, BernoulliHead, NormalHead, PixelCNN

THREE = (3, 3)


def network(image_shape=THREE, channels=3, layers=3, *, seed=0, scale=1.5, **settings):
    """One with weights large enough for pixels to depend on each other visibly."""
    torch.manual_seed(seed)
    net = PixelCNN(image_shape, channels, layers, **settings)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(3 * scale if "context" in name else scale)
            if name == "position_bias":  # else zero at the start
                parameter.normal_()
    return net


def all_images(event_shape, levels=2):
    """Every image there is, ``levels^D x event``."""
    images = list(itertools.product(range(levels), repeat=math.prod(event_shape)))
    return torch.tensor(images, dtype=torch.get_default_dtype()).reshape(-1, *event_shape)


def conditional_vae(latents=2, **settings):
    torch.manual_seed(5)
    encoder = MLP(9, [8], head=NormalHead(latents))
    with torch.no_grad():
        encoder.layers[-1].weight[:latents].mul_(12.0)  # means that differ from image to image
    return lvm.models.PixelCNNVAE(encoder, network(context_features=latents, scale=2.0), **settings)


def bits(num=12, pixels=9):
    return torch.randint(2, (num, pixels)).to(torch.get_default_dtype())


# --------------------------------------------------------------------------------- the density


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize(
    ("image_shape", "levels"), [((3, 3), 2), ((1, 3, 3), 2), ((2, 4), 2), ((2, 2), 3), ((1, 5), 4)]
)
def test_log_prob_sums_to_one(float64, image_shape, levels, context_features):
    net = network(image_shape, num_categories=levels, context_features=context_features)
    p = net() if context_features is None else net(2 * torch.randn(4, 1, context_features))
    assert p.event_shape == (image_shape if len(image_shape) == 3 else (math.prod(image_shape),))
    log_prob = p.log_prob(all_images(p.event_shape, levels))
    assert log_prob.exp().std() > 1e-4  # not all images alike
    total = log_prob.logsumexp(-1)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)


def test_log_prob_is_the_sum_of_factors(float64):
    net, x = network(), bits()
    factors = torch.where(
        x == 1, net.logits(x)[..., 0].sigmoid(), 1 - net.logits(x)[..., 0].sigmoid()
    )
    torch.testing.assert_close(net().log_prob(x), factors.log().sum(-1))
    grey, levels = network(num_categories=4), torch.randint(4, (12, 9))
    shares = grey.logits(levels).softmax(-1)  # N x D x K
    factors = shares.gather(-1, levels[..., None])[..., 0]
    torch.testing.assert_close(grey().log_prob(levels), factors.log().sum(-1))
    torch.testing.assert_close(grey().log_prob(levels.double()), factors.log().sum(-1))


def reference_logits(net, image, z):
    """The raw numbers of every pixel of one image, position by position, from the definition."""

    def gate(raw):
        half = len(raw) // 2
        return raw[:half].tanh() / (1 + (-raw[half:]).exp())

    def at(values, r, c):
        inside = 0 <= r < net.height and 0 <= c < net.width
        return values[r, c] if inside else torch.zeros(values.shape[2:])

    positions = list(itertools.product(range(net.height), range(net.width)))
    x = 2 * image.reshape(net.height, net.width, 1) / (net.num_categories - 1) - 1
    v = torch.stack([at(x, r - 1, c) for r, c in positions]).reshape(net.height, net.width, 1)
    h = torch.stack([at(x, r, c - 1) for r, c in positions]).reshape(net.height, net.width, 1)
    for block in net.blocks:
        s = block.vertical.weight.shape[-1] // 2
        bias = torch.zeros(4 * block.mix.out_channels) if z is None else block.context.weight.mv(z)
        new_v, new_h = [], []
        for r, c in positions:
            raw = block.vertical.bias.clone()
            for up, side in itertools.product(range(s + 1), range(-s, s + 1)):
                raw += block.vertical.weight[:, :, s - up, s + side] @ at(v, r - up, c + side)
            link = block.link.weight[:, :, 0, 0] @ raw + block.link.bias
            across = block.horizontal.bias.clone()
            for back in range(s + 1):
                across += block.horizontal.weight[:, :, 0, s - back] @ at(h, r, c - back)
            here = bias
            if net.position_bias is not None and block is net.blocks[0]:
                here = bias + net.position_bias[:, r, c]
            bias_v, bias_h = here.chunk(2)
            new = gate(across + link + bias_h)
            new_v.append(gate(raw + bias_v))
            new_h.append(h[r, c] + block.mix.weight[:, :, 0, 0] @ new + block.mix.bias)
        v, h = (torch.stack(n).reshape(net.height, net.width, -1) for n in (new_v, new_h))
    first, last = net.readout[1], net.readout[3]
    hidden = (h.relu() @ first.weight[:, :, 0, 0].T + first.bias).relu()
    return (hidden @ last.weight[:, :, 0, 0].T + last.bias).reshape(len(positions), -1)


@pytest.mark.parametrize("position_bias", [False, True])
@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("context_features", [None, 2])
def test_logits_by_their_definition(float64, levels, context_features, position_bias):
    settings = {
        "context_features": context_features,
        "num_categories": levels,
        "position_bias": position_bias,
    }
    net = network((4, 3), 2, 3, kernel_size=3, first_kernel_size=5, **settings)
    x = torch.randint(levels, (3, 12)).double()
    z = None if context_features is None else torch.randn(3, context_features)
    found = net.logits(x, z)
    assert found.shape == (3, 12, 1 if levels == 2 else 3)
    for i in range(3):
        expected = reference_logits(net, x[i], None if z is None else z[i])
        torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-12)


def seen(*args, **settings):
    """Which pixels each pixel's logit depends on, ``D x D``, in any of some networks.

    In one of them a rectifier may be shut.
    """
    found = []
    for seed in range(4):
        net = network(*args, seed=seed, scale=3.0, **settings)
        x = torch.rand(net.height * net.width)
        logits = torch.autograd.functional.jacobian(lambda x, n=net: n.logits(x[None])[0, :, 0], x)
        found.append(logits != 0)
    return torch.stack(found).any(0)


@pytest.mark.parametrize(
    ("image_shape", "layers", "settings"),
    [
        ((5, 5), 5, {"first_kernel_size": 3}),
        ((5, 5), 2, {"first_kernel_size": 7, "kernel_size": 7}),
        ((4, 7), 3, {"kernel_size": 7}),
        ((7, 3), 4, {}),
        ((1, 6), 4, {}),
        ((6, 1), 4, {}),
    ],
)
def test_a_pixel_sees_all_before_it_and_none_after(float64, image_shape, layers, settings):
    """No blind spot: the corner at the upper right too."""
    pixels = math.prod(image_shape)
    before = torch.ones(pixels, pixels, dtype=torch.bool).tril(-1)
    assert torch.equal(seen(image_shape, 4, layers, **settings), before)


@pytest.mark.parametrize(("layers", "further"), [(1, 0), (2, 1)])
def test_how_far_a_pixel_sees(float64, layers, further):
    row, column = 5, 4
    found = seen((7, 9), 4, layers, first_kernel_size=3)[row * 9 + column].reshape(7, 9)
    expected = torch.zeros(7, 9, dtype=torch.bool)
    reach = 1 + further
    expected[row - 1 - reach : row, column - reach : column + reach + 1] = True
    expected[row, column - 1 - reach : column] = True
    if further:  # through pixels to the left, which see above them
        expected[row - 2 : row, column - 2 : column] = True
    assert torch.equal(found, expected)


def test_the_bias_tells_where_a_pixel_is():
    """Far from the borders pixels are alike without it; at the start they are with it, too."""
    blank = torch.zeros(1, 11 * 11)
    for settings, alike in [({}, True), ({"position_bias": True}, False)]:
        net = network((11, 11), 8, 2, first_kernel_size=3, **settings)
        middle = net.logits(blank).reshape(11, 11)[5:9, 4:7]
        assert (middle.std() < 1e-6) == alike
    net = PixelCNN((11, 11), 8, 2, first_kernel_size=3, position_bias=True)
    assert net.logits(blank).reshape(11, 11)[5:9, 4:7].std() < 1e-6


# ------------------------------------------------------------------------------------- draws


class Recomputed(PixelCNN):
    """The same network without a memory: all of the image for every pixel."""

    def steps(self, num_values, context=None):
        image = torch.zeros(num_values, math.prod(self.event_shape)).double()
        for i in range(image.shape[1]):
            image[:, i] = yield self.logits(image, context)[:, i]


NETWORKS = {
    "binary": ((6, 5), 3, {}),
    "an image event": ((1, 4, 6), 3, {"first_kernel_size": 3}),
    "one layer": ((4, 4), 1, {}),
    "wide kernels": ((5, 6), 3, {"kernel_size": 5, "first_kernel_size": 9}),
    "kernels of one pixel": ((5, 4), 2, {"kernel_size": 1, "first_kernel_size": 1}),
    "context": ((6, 5), 3, {"context_features": 2}),
    "levels": ((4, 5), 3, {"num_categories": 5}),
    "levels and context": ((5, 4), 2, {"num_categories": 3, "context_features": 3}),
    "position": ((4, 5), 3, {"position_bias": True}),
    "position of one row": ((1, 6), 2, {"position_bias": True}),
    "position and context": ((5, 4), 2, {"position_bias": True, "context_features": 2}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_draws_are_those_without_a_memory(float64, name):
    image_shape, layers, settings = NETWORKS[name]
    cached = network(image_shape, 4, layers, scale=2.0, **settings)
    naive = Recomputed(image_shape, 4, layers, **settings)
    naive.load_state_dict(cached.state_dict())
    context = torch.randn(40, settings.get("context_features", 1))
    args = (context,) if "context_features" in settings else ()
    draws = []
    for net in (cached, naive):
        pyro.set_rng_seed(3)
        draws.append(net(*args).sample((2,) if args else (80,)))
    assert torch.equal(*draws)
    assert draws[0].float().std() > 0.2
    flat = draws[0].reshape(-1, *cached.event_shape)
    steps = cached.steps(80, context.repeat(2, 1) if args else None)
    raw = [steps.send(pixel) for pixel in (None, *flat.flatten(1).unbind(-1)[:-1])]
    expected = cached.logits(flat, context.repeat(2, 1) if args else None)
    torch.testing.assert_close(torch.stack(raw, 1), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_draw_costs_as_much_as_its_density(name):
    """Every convolution is computed once at every pixel, and not for all pixels at each."""
    image_shape, layers, settings = NETWORKS[name]
    net = network(image_shape, 4, layers, **settings)
    p = net(torch.randn(7, size)) if (size := settings.get("context_features")) else net()
    costs = []
    with torch.no_grad():
        for run in (lambda: p.sample((3,)), lambda: p.log_prob(p.sample((3,)))):
            with FlopCounterMode(display=False) as counter:
                run()
            costs.append(counter.get_total_flops())
    assert costs[1] == 2 * costs[0]


@pytest.mark.parametrize(("image_shape", "levels"), [((3, 3), 2), ((1, 2, 2), 3)])
@pytest.mark.parametrize("context_features", [None, 2])
def test_draws_follow_the_density(image_shape, levels, context_features):
    net = network(image_shape, num_categories=levels, context_features=context_features, scale=1.7)
    p = net() if context_features is None else net(torch.tensor([[1.0, -2.0], [-1.0, 0.5]]))
    n, images = 20_000, all_images(p.event_shape, levels)
    draws = p.sample((n,))
    assert draws.shape == (n, *p.batch_shape, *p.event_shape)
    assert draws.dtype == (torch.float32 if levels == 2 else torch.int64)
    p_values = p.expand((len(images), *p.batch_shape)).log_prob(
        images.reshape(len(images), *[1] * len(p.batch_shape), *p.event_shape)
    )
    probability = p_values.exp().detach().double().reshape(len(images), -1)
    digits = levels ** torch.arange(images[0].numel()).flip(0)
    index = (draws.reshape(n, -1, images[0].numel()).long() * digits).sum(-1)  # n x batch
    for column, expected in zip(index.T, probability.T, strict=True):
        found = torch.bincount(column, minlength=len(images)) / n
        error = (expected * (1 - expected) / n).sqrt()
        likely = expected * n > 5  # for rarer ones the normal law is no guide
        assert ((found - expected).abs() < 5 * error)[likely].all()
        chi_square = (n * (found - expected) ** 2 / expected)[likely].sum()
        degrees = int(likely.sum())
        assert abs(chi_square - degrees) < 5 * math.sqrt(2 * degrees)
    if context_features is not None:
        assert (probability[:, 0] - probability[:, 1]).abs().max() > 5 * error.max()


def test_draws_of_levels_are_never_out_of_range():
    p = network((2, 2), num_categories=3)()
    raw = torch.tensor([[0.0, 0.0, -1e9], [-1e9, 0.0, 0.0], [0.0, -1e9, 0.0]]).repeat(4000, 1)
    draws = p._draw(raw).reshape(-1, 3)
    assert [sorted(set(d.tolist())) for d in draws.T] == [[0, 1], [1, 2], [0, 2]]


def test_the_last_level_has_what_rounding_leaves(monkeypatch):
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)
    p = network((2, 2), num_categories=3)()
    assert p._draw(torch.zeros(5, 3)).tolist() == [2] * 5


# ------------------------------------------------------------------- shapes, particles, numbers


def test_shapes_of_a_batch(device):
    net = network((4, 3), context_features=2).to(device)
    z = torch.randn(5, 6, 2, device=device)  # K x N x F
    p = net(z)
    assert (p.batch_shape, p.event_shape) == ((5, 6), (12,))
    x = p.sample()
    assert x.shape == (5, 6, 12)
    assert x.device.type == device
    assert p.sample((2, 3)).shape == (2, 3, 5, 6, 12)
    one = x[0]  # data of all particles
    expected = torch.stack(
        [torch.stack([net(c).log_prob(d) for c, d in zip(k, one, strict=True)]) for k in z]
    )
    torch.testing.assert_close(p.log_prob(one), expected)
    more = net(z[0]).expand((5, 6))
    assert more.sample().shape == (5, 6, 12)
    torch.testing.assert_close(more.log_prob(one), net(z[0]).log_prob(one).expand(5, 6))
    torch.testing.assert_close(
        net(z[:, :1]).expand((5, 6)).log_prob(x)[:, 3], net(z[:, 0]).log_prob(x[:, 3])
    )


def test_shapes_without_context():
    net = network((1, 4, 3))
    p, x = net(), bits(6, 12).reshape(6, 1, 4, 3)
    assert (p.batch_shape, p.event_shape) == ((), (1, 4, 3))
    assert p.sample().shape == (1, 4, 3)
    many = p.expand((5, 6))
    assert many.batch_shape == (5, 6)
    assert many.sample((2,)).shape == (2, 5, 6, 1, 4, 3)
    torch.testing.assert_close(many.log_prob(x), p.log_prob(x).expand(5, 6))
    torch.testing.assert_close(many.log_prob(x[0]), p.log_prob(x[0]).expand(5, 6))
    assert p.log_prob(x.reshape(2, 3, 1, 4, 3)).shape == (2, 3)


def test_data_are_run_once_for_all_particles_without_context():
    net, x = network(), bits(6)
    rows = []
    net.blocks[0].horizontal.register_forward_hook(lambda *args: rows.append(len(args[-1])))
    net().expand((5, 6)).log_prob(x)
    assert rows == [6]


def test_double_precision():
    net = network(context_features=2).double()
    p = net(torch.randn(4, 2).double())
    assert p.sample().dtype == torch.float64
    assert p.log_prob(bits(4).double()).dtype == torch.float64
    half, whole = network(), network().double()
    x = bits(4)
    torch.testing.assert_close(half().log_prob(x), whole().log_prob(x).float())


@pytest.mark.usefixtures("float64")
def test_gradients():
    net, x = network(context_features=2), bits(4)
    z = torch.randn(4, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: net(z).log_prob(x), (z,))
    net(z).log_prob(x).sum().backward()
    assert all(p.grad.abs().max() > 1e-8 for p in net.parameters())
    assert z.grad.abs().min() > 0
    graphs = []  # nothing is kept for a gradient that draws do not have
    net.readout.register_forward_hook(lambda *args: graphs.append(args[-1].requires_grad))
    assert not net(z).sample().requires_grad
    assert graphs == [False] * 9
    for parameter in (net.blocks[1].vertical.weight, net.blocks[0].link.weight):
        step = 1e-6 * torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            parameter.data += sign * step
            values.append(net(z).log_prob(x).sum().item())
            parameter.data -= sign * step
        assert (values[0] - values[1]) / 2 == pytest.approx(
            (parameter.grad * step).sum().item(), rel=1e-5
        )


def test_support_is_looked_at():
    p = network()()
    assert p.support.is_discrete
    assert p.support.event_dim == 1
    with pytest.raises(ValueError, match="support"):
        p.log_prob(torch.full((9,), 0.5))
    levels = network((1, 3, 3), num_categories=4)()
    assert levels.support.event_dim == 3
    levels.log_prob(torch.full((1, 3, 3), 3))
    for bad in (4, -1):
        with pytest.raises(ValueError, match="support"):
            levels.log_prob(torch.full((1, 3, 3), bad))
    grey = torch.full((4, 9), 0.5)
    with pytest.raises(ValueError, match="support"):
        p.expand((4,)).log_prob(grey)
    with pyro.validation_enabled(False):
        network()().expand((4,)).log_prob(grey)
    assert p.support.check(p.sample((4,))).all()
    assert levels.support.check(levels.sample((4,))).all()


@pytest.mark.parametrize("moment", ["mean", "variance", "stddev"])
def test_no_moments(moment):
    with pytest.raises(NotImplementedError, match=r"no closed form\. Take draws"):
        getattr(network()(), moment)


# ------------------------------------------------------------------------------------ as pairs


def as_recorded(graph, inputs):
    """A backend that runs what was recorded as it is."""
    return graph


PAIRS = {
    "density": lambda: lvm.models.Density(network()),
    "density of positions": lambda: lvm.models.Density(network(position_bias=True)),
    "density of levels": lambda: lvm.models.Density(network(num_categories=3)),
    "vae": conditional_vae,
    "vae of images": lambda: lvm.models.PixelCNNVAE(
        lvm.nn.ConvEncoder((1, 3, 3), [4], head=NormalHead(2)),
        network((1, 3, 3), context_features=2),
    ),
}


def data_of(name):
    return bits().reshape(-1, 1, 3, 3) if name.endswith("images") else bits()


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("name", PAIRS)
def test_recorded_loss_is_that_of_python(float64, name, particles):
    pair, x = PAIRS[name](), data_of(name)
    elbo = lvm.TraceInfo_ELBO(num_particles=particles, vectorize_particles=particles > 1)
    module = lvm.compile(elbo, pair.model, pair.guide, backend=as_recorded)
    module.initialize(x)
    assert module.fallback_reason is None
    parameters, results = list(module.parameters()), []
    for loss in (module, lambda x: elbo.differentiable_loss(pair.model, pair.guide, x)):
        pyro.set_rng_seed(2)
        value = loss(x)
        results.append((value.detach(), torch.autograd.grad(value, parameters)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
def test_fit_save_and_load(name, tmp_path):
    pair, x = PAIRS[name](), data_of(name)
    fit = lvm.fit(pair.model, pair.guide, x, epochs=3, batch_size=4, progress=False)
    assert fit.history["loss"][-1] < fit.history["loss"][0]
    lvm.save(pair, tmp_path / "pair.pt")
    loaded = lvm.load(tmp_path / "pair.pt")
    assert repr(loaded) == repr(pair)
    results = []
    for each in (pair, loaded):
        pyro.set_rng_seed(1)
        trace = poutine.trace(each.guide).get_trace(x)
        replayed = poutine.trace(poutine.replay(each.model, trace=trace)).get_trace(x)
        results.append((replayed.log_prob_sum().detach(), each.sample(3)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_fit_refuses_grey_images():
    pair = lvm.models.Density(network())
    with pytest.raises(ValueError, match="support"):
        lvm.fit(pair.model, pair.guide, torch.rand(8, 9), epochs=1, progress=False)


def test_density_is_exact():
    pair, x = lvm.models.Density(network()), bits(20)
    score = lvm.marginal.exact(pair.model, pair.guide, x)
    torch.testing.assert_close(score.log_prob, network()().log_prob(x).detach())


@pytest.mark.usefixtures("float64")
def test_log_marginal_of_a_vae():
    """Against a sum over a grid of z."""
    vae, x = conditional_vae(latents=1), bits(8)
    z = torch.linspace(-8, 8, 1601)[:, None]
    prior = dist.Normal(0.0, 1.0).log_prob(z) + math.log(0.01)
    with torch.no_grad():
        exact = (vae.decode(z[:, None]).log_prob(x) + prior).logsumexp(0)
        spread = vae.decode(z[::400, None]).log_prob(x).std(0)
    assert spread.min() > 0.1  # z matters
    score = lvm.marginal.importance_sampling(vae.model, vae.guide, x, num_samples=4000)
    assert ((score.log_prob - exact).abs() < 5 * score.std_error).all()
    assert score.std_error.max() < 0.2


# ------------------------------------------------------------------------- what a VAE shows


def expectation(p):
    """E[x] of a distribution over 3 x 3 images, by enumeration, ``batch x 9``."""
    images = all_images((9,))
    log_prob = p.log_prob(images.reshape(-1, *[1] * len(p.batch_shape), 9))  # 512 x batch
    return torch.einsum("i...,id->...d", log_prob.exp(), images).detach()


def test_reconstructions_are_draws():
    vae, x, n = conditional_vae(), bits(6), 4000
    one = vae.reconstruct(x)
    assert one.shape == x.shape
    assert set(one.unique().tolist()) <= {0.0, 1.0}
    mean = expectation(vae.decode(vae.encode(x).mean))
    error = (mean * (1 - mean) / n).sqrt()
    assert ((vae.reconstruct(x, num_draws=n) - mean).abs() < 5 * error).all()
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[:, 3:6] = False
    other = expectation(vae.decode(vae.encode(x * mask).mean))
    assert (other - mean).abs().max() > 9 * error.max()
    error = (other * (1 - other) / n).sqrt()
    assert ((vae.reconstruct(x, mask, num_draws=n) - other).abs() < 5 * error).all()


def test_interpolations_are_draws():
    vae, start, end, n = conditional_vae(), bits(2), bits(2), 4000
    assert vae.interpolate(start, end).shape == (8, 2, 9)
    assert set(vae.interpolate(start, end, 3).unique().tolist()) <= {0.0, 1.0}
    found = vae.interpolate(start, end, 4, num_draws=n)
    a, b = vae.encode(start).mean, vae.encode(end).mean
    assert (expectation(vae.decode(a)) - expectation(vae.decode(b))).abs().max() > 0.1
    for s in range(4):
        mean = expectation(vae.decode(a + s / 3 * (b - a)))
        error = (mean * (1 - mean) / n).sqrt()
        assert ((found[s] - mean).abs() < 5 * error).all()


def test_what_else_a_vae_shows():
    vae = conditional_vae()
    draws = vae.sample(5)
    assert draws.shape == (5, 9)
    assert set(draws.unique().tolist()) <= {0.0, 1.0}
    with pytest.raises(NotImplementedError, match="Take draws"):
        vae.sample(5, mean=True)
    levels = lvm.models.PixelCNNVAE(vae.encoder, network(context_features=2, num_categories=3))
    x = bits()
    assert levels.reconstruct(x).dtype == torch.int64
    assert levels.reconstruct(x, num_draws=4).dtype == torch.float32
    report = lvm.diagnostics.collapse_report(vae.model, vae.guide, x, num_draws=12)
    assert report.num_units == 2
    idata = lvm.to_arviz(vae.model, vae.guide, x, num_samples=3)
    assert "posterior" in idata.groups() if callable(idata.groups) else idata.groups


# ------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", ["density", "vae", "vae of images"])
def test_missing_pixels_are_refused(name):
    """The rest of an image has no marginal: a number would be that of another model."""
    pair, x = PAIRS[name](), data_of(name)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, 0] = False
    for model, args in ((lvm.masked(pair.model, x=mask), (x,)), (pair.model, (x, mask))):
        with pytest.raises(
            ValueError, match=r"Site 'x' has no such marginal\..*got Autoregressive"
        ):
            lvm.TraceInfo_ELBO().loss(model, lambda *args: pair.guide(x), *args)
    with pytest.raises(ValueError, match="got Autoregressive"):
        lvm.fit(pair.model, pair.guide, (x, mask), epochs=1, progress=False)


def test_images_that_are_missing_as_a_whole():
    pair, x = lvm.models.Density(network()), bits(6)
    mask = torch.tensor([True, False, True, True, False, True])
    with_nan = torch.where(mask[:, None], x, torch.nan)
    found = -lvm.TraceInfo_ELBO().loss(pair.model, pair.guide, with_nan, mask)
    assert found == pytest.approx(pair.log_prob(x)[mask].sum().item(), rel=1e-5)
    given = Incomplete(network()().expand((6,)), mask[:, None]).sample_given(x)
    assert torch.equal(given[mask], x[mask])
    assert set(given.unique().tolist()) <= {0.0, 1.0}
    levels = Incomplete(network(num_categories=4)().expand((6,)), mask[:, None])
    expected = levels.base_dist.log_prob(x)
    torch.testing.assert_close(levels.log_prob(with_nan), torch.where(mask, expected, 0.0))


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: PixelCNN((9,)), ValueError, "two sizes, H x W"),
        (lambda: PixelCNN((1, 1, 3, 3)), ValueError, r"or three, 1 x H x W; got \(1, 1, 3, 3\)"),
        (lambda: PixelCNN((3, 8, 8)), ValueError, "one channel; got 3"),
        (lambda: PixelCNN((0, 3)), ValueError, "image_shape to be a positive number"),
        (lambda: PixelCNN((2.5, 3)), TypeError, "image_shape to be one or more integers"),
        (lambda: PixelCNN(THREE, 0), ValueError, "channels to be a positive integer"),
        (lambda: PixelCNN(THREE, layers=0), ValueError, "layers to be a positive integer"),
        (lambda: PixelCNN(THREE, context_features=0), ValueError, "context_features"),
        (lambda: PixelCNN(THREE, num_categories=1), ValueError, "num_categories .*>= 2; got 1"),
        (lambda: PixelCNN(THREE, num_categories=2.5), TypeError, "num_categories"),
        (lambda: PixelCNN(THREE, kernel_size=4), ValueError, "kernel_size to be odd; got 4. Try 5"),
        (lambda: PixelCNN(THREE, first_kernel_size=2), ValueError, "first_kernel_size to be odd"),
        (lambda: PixelCNN(THREE, kernel_size=0), ValueError, "kernel_size to be a positive"),
        (
            lambda: network()(torch.randn(4, 2)),
            ValueError,
            "Expected no context; got a context. .* or build it with context_features",
        ),
        (
            lambda: network(context_features=2)(),
            ValueError,
            "Expected a context; got no context. .* or build it without context_features",
        ),
        (lambda: network(context_features=2)(torch.randn(4, 3)), ValueError, "batch x 2; got"),
        (lambda: network(context_features=2)(torch.zeros(4, 2).long()), TypeError, "floating"),
        (
            lambda: lvm.models.PixelCNNVAE(
                MLP(9, [], head=NormalHead(3)), network(context_features=2)
            ),
            ValueError,
            r"z of shape \(3,\), .* got one of context_features=2. Build it with "
            "context_features=3",
        ),
        (
            lambda: lvm.models.PixelCNNVAE(MLP(9, [], head=NormalHead(3)), network()),
            ValueError,
            "context_features=None",
        ),
        (lambda: conditional_vae().reconstruct(bits(), num_draws=0), ValueError, "num_draws"),
        (lambda: conditional_vae().interpolate(bits(), bits(), 1), ValueError, "num_steps >= 2"),
        (
            lambda: conditional_vae(prior=dist.Normal(torch.zeros(2), 1.0)),
            ValueError,
            "no batch shape",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_decoders_of_other_kinds():
    """Networks that say nothing of their context are taken as they are."""

    class Decoder(nn.Module):
        def forward(self, z):
            return Autoregressive(network(context_features=2), (9,), context=z)

    vae = lvm.models.PixelCNNVAE(MLP(9, [], head=NormalHead(2)), Decoder())
    assert vae.reconstruct(bits(4)).shape == (4, 9)
    independent = MLP(2, [], head=BernoulliHead(9))
    assert lvm.models.PixelCNNVAE(vae.encoder, independent).reconstruct(bits(4)).shape == (4, 9)
