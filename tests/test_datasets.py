import gzip
import math
import struct
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from torch.distributions import MultivariateNormal

from pyro_lvm import datasets
from pyro_lvm.datasets import LinearGaussian, linear_gaussian

DATA = Path(__file__).parents[1].parent / "shared" / "data"
TOYS = {
    "two_moons": datasets.two_moons,
    "pinwheel": datasets.pinwheel,
    "ring_of_gaussians": datasets.ring_of_gaussians,
}


def needs(folder):
    return pytest.mark.skipif(not (DATA / folder).exists(), reason=f"no {folder} in {DATA}")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def global_random_state():
    """The global random state is what it was, at the end of the test."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    yield
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


# ---------------------------------------------------------------------------------------- digits


def all_rows(split):
    return torch.cat([split.train, split.validation, split.test])


def all_labels(split):
    return torch.cat([split.train_labels, split.validation_labels, split.test_labels])


def sklearn_digits():
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


# In half precision rounding would show at once; in float32 it would once in a million pixels.
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_digits_give_back_the_grey_levels_and_labels(dtype):
    split = datasets.digits(dtype=dtype)
    rows = all_rows(split)
    assert rows.dtype == dtype
    assert rows.min() >= 0
    assert rows.max() < 1
    found = torch.cat([torch.floor(17 * rows).long(), all_labels(split).unsqueeze(1)], 1)
    levels, labels = sklearn_digits()
    expected = np.concatenate([levels, labels[:, None]], axis=1).astype(int)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))


def test_digits_are_uniform_within_a_level():
    u = 17 * all_rows(datasets.digits(dtype=torch.float64)) % 1
    standard_error = math.sqrt(1 / 12 / u.numel())
    assert abs(u.mean() - 0.5) < 5 * standard_error
    # Var (u - 1/2)^2 = 1/80 - 1/144
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / u.numel())


def test_digits_sizes():
    split = datasets.digits()
    assert split.train.shape == (1297, 64)
    assert split.validation.shape == split.test.shape == (250, 64)
    assert split.train_labels.shape == (1297,)
    assert split.train_labels.dtype == torch.int64
    assert split.image_shape == (8, 8)
    assert datasets.digits(validation=0, test=100).train.shape == (1697, 64)


def test_digits_parts_are_disjoint():
    # The dequantised rows are all different, so that a row names its image.
    rows = all_rows(datasets.digits())
    assert len(torch.unique(rows, dim=0)) == len(rows) == 1797


def test_digits_depend_on_the_seed_alone(global_random_state):
    first, again, other = (datasets.digits(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(all_rows(first), all_rows(again))
    assert torch.equal(all_labels(first), all_labels(again))
    assert not torch.equal(first.train_labels, other.train_labels)
    in_double = datasets.digits(seed=1, dtype=torch.float64)
    torch.testing.assert_close(in_double.train.float(), first.train, atol=3e-6, rtol=0)


def test_digits_test_set_does_not_depend_on_the_validation_set():
    assert torch.equal(datasets.digits().test, datasets.digits(validation=10).test)


@pytest.mark.parametrize("sizes", [(-1, 10), (10, -1), (1797, 0), (1000, 1000)])
def test_digits_refuse_sizes(sizes):
    with pytest.raises(ValueError, match="held-out sizes"):
        datasets.digits(validation=sizes[0], test=sizes[1])


def test_split_prints_shapes():
    assert repr(datasets.digits()) == (
        "Split(train=1297 x 64, validation=250 x 64, test=250 x 64, labels=int64, "
        "image_shape=(8, 8))"
    )


# ----------------------------------------------------------------------------------------- mnist


def idx(array):
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def tiny_mnist():
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": rng.integers(0, 256, (12, 3, 4), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(12, dtype=np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (5, 3, 4), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(20, 25, dtype=np.uint8),
    }


def write_mnist(path, arrays, *, packed):
    folder = path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        content = idx(array)
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_reads_idx_files(tmp_path, packed, global_random_state):
    arrays = tiny_mnist()
    write_mnist(tmp_path, arrays, packed=packed)
    split = datasets.mnist(tmp_path, validation=4, seed=3)
    assert split.image_shape == (3, 4)
    assert split.train.shape == (8, 12)
    assert split.validation.shape == (4, 12)
    assert split.train.dtype == torch.float32

    images = torch.from_numpy(arrays["train-images-idx3-ubyte"]).flatten(1) / 255
    torch.testing.assert_close(split.train, images[split.train_labels])
    torch.testing.assert_close(split.validation, images[split.validation_labels])
    labels = torch.cat([split.train_labels, split.validation_labels])
    assert sorted(labels.tolist()) == list(range(12))

    test = torch.from_numpy(arrays["t10k-images-idx3-ubyte"]).flatten(1) / 255
    torch.testing.assert_close(split.test, test)
    assert split.test_labels.tolist() == list(range(20, 25))

    again, other = (datasets.mnist(tmp_path, validation=4, seed=seed) for seed in (3, 4))
    assert torch.equal(split.train, again.train)
    assert not torch.equal(split.train, other.train)


def test_mnist_prefers_unpacked_files(tmp_path):
    folder = write_mnist(tmp_path, tiny_mnist(), packed=False)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"not read")
    assert datasets.mnist(tmp_path, validation=2).train.shape == (10, 12)


def test_mnist_names_the_missing_file(tmp_path):
    folder = write_mnist(tmp_path, tiny_mnist(), packed=True)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"t10k-labels-idx1-ubyte.*MNIST/raw"):
        datasets.mnist(tmp_path, validation=2)


TINY_IMAGES = idx(tiny_mnist()["train-images-idx3-ubyte"])
DAMAGED = {
    "magic": (idx(np.zeros(3, np.uint8)), "magic number 2051; got 2049"),
    "empty": (b"", "magic number 2051"),
    "header only": (TINY_IMAGES[:10], "magic number 2051"),
    "too short": (TINY_IMAGES[:-1], "Expected 144 values"),
    "too long": (TINY_IMAGES + b"x", "got 145"),
    "fewer images": (idx(np.zeros((11, 3, 4), np.uint8)), "11 images and 12 labels"),
    "other size": (idx(np.zeros((12, 4, 4), np.uint8)), r"\(4, 4\) and \(3, 4\)"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_mnist_refuses_damaged_files(tmp_path, content, message):
    folder = write_mnist(tmp_path, tiny_mnist(), packed=False)
    (folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        datasets.mnist(tmp_path, validation=2)


@pytest.mark.parametrize("damage", ["cut", "no gzip", "flipped"])
def test_mnist_refuses_damaged_gzip(tmp_path, damage):
    folder = write_mnist(tmp_path, tiny_mnist(), packed=True)
    file = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(file.read_bytes())
    content[-6] ^= 0xFF  # in the checksum
    file.write_bytes(
        {"cut": file.read_bytes()[:-20], "no gzip": b"?" * 50, "flipped": content}[damage]
    )
    with pytest.raises(ValueError, match="to be gzipped"):
        datasets.mnist(tmp_path, validation=2)


def test_mnist_refuses_to_hold_out_everything(tmp_path):
    write_mnist(tmp_path, tiny_mnist(), packed=True)
    with pytest.raises(ValueError, match="held-out sizes"):
        datasets.mnist(tmp_path)


@needs("MNIST")
def test_real_mnist():
    split = datasets.mnist(DATA)
    assert split.train.shape == (50000, 784)
    assert split.validation.shape == split.test.shape == (10000, 784)
    assert split.image_shape == (28, 28)
    labels = torch.cat([split.train_labels, split.validation_labels])
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(labels).tolist() == counts
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.bincount(split.test_labels).tolist() == counts
    images = torch.cat([split.train, split.validation])
    assert images.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert images.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert images.max() == 1


# -------------------------------------------------------------------------------------- binarised


def write_binarized(path, **arrays):
    folder = path / "BinarizedMNIST"
    folder.mkdir()
    np.savez(folder / "binarized_mnist_packed.npz", **arrays)
    return folder / "binarized_mnist_packed.npz"


def tiny_bits():
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 2, (num, 784), dtype=np.uint8)
        for name, num in [("train", 4), ("valid", 3), ("test", 2)]
    }


def test_binarized_mnist_reads_bits(tmp_path):
    bits = tiny_bits()
    write_binarized(tmp_path, **{name: np.packbits(x, axis=1) for name, x in bits.items()})
    split = datasets.binarized_mnist(tmp_path)
    assert np.array_equal(split.train.numpy(), bits["train"])
    assert np.array_equal(split.validation.numpy(), bits["valid"])
    assert np.array_equal(split.test.numpy(), bits["test"])
    assert split.train.dtype == torch.float32
    assert split.train_labels is split.validation_labels is split.test_labels is None
    assert "labels=none" in repr(split)


def test_binarized_mnist_refuses_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"BinarizedMNIST/binarized_mnist_packed\.npz"):
        datasets.binarized_mnist(tmp_path)
    packed = {name: np.packbits(x, axis=1) for name, x in tiny_bits().items()}
    file = write_binarized(tmp_path, **packed)
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a zip archive"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="arrays train, valid and test"):
            datasets.binarized_mnist(tmp_path)
    np.savez(file, train=packed["train"], test=packed["test"])
    with pytest.raises(ValueError, match="valid"):
        datasets.binarized_mnist(tmp_path)
    np.savez(file, **{**packed, "test": tiny_bits()["test"]})
    with pytest.raises(ValueError, match=r"98 bytes.*\(2, 784\)"):
        datasets.binarized_mnist(tmp_path)


@needs("BinarizedMNIST")
def test_real_binarized_mnist():
    split = datasets.binarized_mnist(DATA)
    assert [len(split.train), len(split.validation), len(split.test)] == [50000, 10000, 10000]
    means = [part.mean().item() for part in (split.train, split.validation, split.test)]
    assert means == pytest.approx([0.13056, 0.13113, 0.13251], abs=5e-6)
    assert set(split.test.unique().tolist()) == {0.0, 1.0}


def test_binarize_draws_bernoulli():
    x = torch.tensor([0.0, 0.2, 0.7, 1.0]).expand(10_000, 4)
    drawn = datasets.binarize(x, generator=generator())
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert drawn.dtype == x.dtype
    tolerance = 5 * (x[0] * (1 - x[0]) / len(x)).sqrt()
    assert (drawn.mean(0) - x[0]).abs().le(tolerance).all()  # exactly so where x is 0 or 1
    assert torch.equal(drawn, datasets.binarize(x, generator=generator()))
    assert not torch.equal(drawn, datasets.binarize(x, generator=generator(1)))


@pytest.mark.parametrize("value", [-0.1, 1.1, 255.0, math.nan])
def test_binarize_refuses_what_is_no_grey_value(value):
    with pytest.raises(ValueError, match="Expected"):
        datasets.binarize(torch.tensor([[0.5, value]]))


# ---------------------------------------------------------------------------------- low dimension


@needs("faithful")
def test_real_old_faithful():
    x = datasets.old_faithful(DATA)
    assert x.shape == (272, 2)
    assert x.dtype == torch.float64
    assert x.mean(0).tolist() == pytest.approx([3.4878, 70.897], abs=5e-4)
    assert x.std(0).tolist() == pytest.approx([1.1414, 13.595], abs=5e-4)


def test_old_faithful_refuses_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"faithful/faithful\.csv"):
        datasets.old_faithful(tmp_path)
    (tmp_path / "faithful").mkdir()
    file = tmp_path / "faithful" / "faithful.csv"
    header = '"eruptions","waiting"\n'
    for rows in ("3.6,79\n" * 271, "3.6\n" * 272, "3.6,?\n" * 272, "3.6,79\n1\n"):
        file.write_text(header + rows)
        with pytest.raises(ValueError, match="faithful"):
            datasets.old_faithful(tmp_path)


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_toys(toy):
    x = toy(50, generator=generator())
    assert x.shape == (50, 2)
    assert x.isfinite().all()
    assert torch.equal(x, toy(50, generator=generator()))
    assert not torch.equal(x, toy(50, generator=generator(1)))
    assert toy(1).shape == (1, 2)
    with pytest.raises(ValueError, match="num_data"):
        toy(0)


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_toys_leave_the_global_random_state(toy, global_random_state):
    toy(5, generator=generator())


def test_two_moons_lie_on_two_arcs():
    x = datasets.two_moons(10_000, generator=generator()).double()
    upper = (x.norm(dim=1) - 1).abs()
    lower = ((x - torch.tensor([1.0, 0.5])).norm(dim=1) - 1).abs()
    # The distance to an arc is noise of scale 0.1; none of 10 000 is 5 scales away.
    assert torch.minimum(upper, lower).max() < 0.5
    # Each arc has the centre of mass 2 / pi above or below its own centre: (0, 0) and (1, 1/2).
    expected = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert ((x.mean(0) - expected).abs() < 5 * x.std(0) / 100).all()


def test_pinwheel_has_five_equal_arms():
    x = datasets.pinwheel(100_000, generator=generator()).double()
    # Turned by a fifth of a circle the law is the same: the mean is zero, the covariance round.
    assert (x.mean(0).abs() < 5 * x.std(0) / math.sqrt(len(x))).all()
    assert abs((x[:, 0] * x[:, 1]).mean()) < 5 * (x[:, 0] * x[:, 1]).std() / math.sqrt(len(x))
    # E r^2 + E t^2 = 1 + 0.3^2 + 0.1^2
    square = x.square().sum(1)
    assert abs(square.mean() - 1.1) < 5 * square.std() / math.sqrt(len(x))
    # Var r^2 + Var t^2, with Var r^2 = 4 E[r]^2 s^2 + 2 s^4
    variance = 4 * 0.3**2 + 2 * 0.3**4 + 2 * 0.1**4
    deviation = (square - 1.1).square()
    assert abs(deviation.mean() - variance) < 5 * deviation.std() / math.sqrt(len(x))
    # Turned back by its radius, a point lies near the axis of one of five arms.
    angle = torch.atan2(x[:, 1], x[:, 0]) - x.norm(dim=1).exp() / 4
    resultant = torch.polar(torch.ones_like(angle), 5 * angle).mean().abs()
    assert resultant > 0.6  # 0 if there were no arms


def test_ring_density_integrates_to_one():
    side = torch.linspace(-4, 4, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    mass = datasets.ring_of_gaussians_log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-9)


def test_ring_density_is_that_of_the_draws():
    # E_p[f / p] = integral of f, with f a normal density that does not share p's symmetry.
    x = datasets.ring_of_gaussians(40_000, generator=generator()).double()
    log_prob = datasets.ring_of_gaussians_log_prob(x)
    f = torch.distributions.Normal(torch.tensor([2.0, 0.0]).double(), 0.2).log_prob(x).sum(1)
    ratio = (f - log_prob).exp()  # 8 at this component, 0 elsewhere
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / math.sqrt(len(x))
    # E |x|^2 = 2^2 + 2 * 0.2^2
    square = x.square().sum(1)
    assert abs(square.mean() - 4.08) < 5 * square.std() / math.sqrt(len(x))
    # The entropy of eight components that hardly overlap: log 8 + log(2 pi e 0.2^2).
    entropy = math.log(8) + math.log(2 * math.pi * math.e * 0.04)
    standard_error = log_prob.std() / math.sqrt(len(x))
    assert abs(-log_prob.mean() - entropy) < 5 * standard_error + 1e-3


def test_ring_density_refuses_other_shapes():
    with pytest.raises(ValueError, match="N x 2"):
        datasets.ring_of_gaussians_log_prob(torch.zeros(3, 3))


# ------------------------------------------------------------------------------ reference problem


def factor_analysis(num_features=5, num_latents=2):
    ppca = linear_gaussian(num_features, num_latents, seed=1)
    scale = 0.3 + torch.rand(num_features, generator=generator(), dtype=torch.float64)
    return LinearGaussian(ppca.W, ppca.loc, scale)


PROBLEMS = {
    "ppca": linear_gaussian(5, 2),
    "factor analysis": factor_analysis(),
    "one by one": linear_gaussian(1, 1, scale=2.0),
    "more latents than features": factor_analysis(2, 4),
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def marginal(problem):
    covariance = problem.W @ problem.W.T + problem.scale.square().diag()
    return MultivariateNormal(problem.loc, covariance)


@problems
def test_log_prob_is_the_multivariate_normal(problem, device):
    problem = problem.to(device)
    x = problem.sample(20)
    torch.testing.assert_close(
        problem.log_prob(x), marginal(problem).log_prob(x), atol=1e-10, rtol=1e-10
    )


@problems
def test_posterior_obeys_bayes_rule(problem):
    x = problem.sample(20, generator())
    loc, scale_tril = problem.posterior(x)
    num_latents = problem.W.shape[1]
    assert loc.shape == (20, num_latents)
    assert torch.equal(scale_tril, scale_tril.tril())
    z = torch.randn(20, num_latents, generator=generator(1), dtype=x.dtype)  # anywhere
    log_prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    noise = torch.distributions.Normal(z @ problem.W.T + problem.loc, problem.scale)
    log_posterior = MultivariateNormal(loc, scale_tril=scale_tril).log_prob(z)
    log_joint = log_prior + noise.log_prob(x).sum(-1)
    torch.testing.assert_close(
        log_joint - log_posterior, problem.log_prob(x), atol=1e-10, rtol=1e-10
    )


@problems
def test_sample_has_the_moments_of_the_marginal(problem):
    num_data = 20_000
    x = problem.sample(num_data, generator())
    expected = marginal(problem)
    mean_error = expected.stddev / math.sqrt(num_data)
    assert ((x.mean(0) - problem.loc).abs() < 5 * mean_error).all()
    C, variance = expected.covariance_matrix, expected.variance
    # The variance of a sample covariance of Gaussians: (C_ij^2 + C_ii C_jj) / N.
    covariance_error = ((C.square() + variance.outer(variance)) / num_data).sqrt()
    centred = x - problem.loc
    assert ((centred.T @ centred / num_data - C).abs() < 5 * covariance_error).all()


@problems
def test_every_importance_weight_of_the_pair_is_the_marginal(problem, device):
    problem = problem.to(device)
    x = problem.sample(7)
    with pyro.plate("particles", 3, dim=-2):
        guide_trace = poutine.trace(problem.guide).get_trace(x)
        replayed = poutine.replay(problem.model, trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(x)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    log_weight = (
        model_trace.nodes["x"]["log_prob"]
        + model_trace.nodes["z"]["log_prob"]
        - guide_trace.nodes["z"]["log_prob"]
    )
    assert log_weight.shape == (3, 7)
    assert model_trace.nodes["data"]["type"] == "sample"  # the plate
    torch.testing.assert_close(log_weight, problem.log_prob(x).expand(3, 7), atol=1e-10, rtol=1e-10)


def test_linear_gaussian_is_seeded(global_random_state):
    first, again, other = (linear_gaussian(4, 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.W, again.W)
    assert not torch.equal(first.W, other.W)
    assert first.W.shape == (4, 2)
    assert first.scale.tolist() == [0.5] * 4
    single = linear_gaussian(4, 2, dtype=torch.float32)
    assert single.W.dtype == single.scale.dtype == torch.float32
    assert torch.equal(single.W, first.W.float())
    x = first.sample(3, generator())
    assert torch.equal(x, first.sample(3, generator()))


W, B, S = torch.ones(3, 2), torch.zeros(3), torch.ones(3)
REFUSED = {
    "rank of W": (lambda: LinearGaussian(B, B, S), ValueError, "W with 2 dimension"),
    "length of loc": (lambda: LinearGaussian(W, B[:2], S), ValueError, "loc with an entry"),
    "length of scale": (lambda: LinearGaussian(W, B, S[:1]), ValueError, "scale with an entry"),
    "scale zero": (lambda: LinearGaussian(W, B, 0 * S), ValueError, "positive"),
    "integer W": (lambda: LinearGaussian(W.long(), B, S), TypeError, "floating"),
    "NaN": (lambda: LinearGaussian(W, B * math.nan, S), ValueError, "finite"),
    "no latent": (lambda: linear_gaussian(3, 0), ValueError, "num_latents"),
    "no feature": (lambda: linear_gaussian(0, 1), ValueError, "num_features"),
    "negative scale": (lambda: linear_gaussian(3, 1, scale=-1.0), ValueError, "positive"),
    "width of x": (lambda: LinearGaussian(W, B, S).log_prob(W), ValueError, "N x 3"),
    "rank of x": (lambda: LinearGaussian(W, B, S).posterior(B), ValueError, "x with 2"),
    "no sample": (lambda: LinearGaussian(W, B, S).sample(0), ValueError, "num_data"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_linear_gaussian_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()
