"""The examples run, with a few steps, and leave what they promise."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray

import pyro_lvm as lvm

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = (
    "aggregate_posterior",
    "comparison",
    "mixture_means",
    "reconstructions",
    "samples",
    "training",
)


def test_digits(tmp_path):
    command = [sys.executable, str(EXAMPLES / "digits.py"), "--short", "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "What the ELBO hides" in done.stdout
    assert done.stderr.strip() == ""  # nothing to worry a reader with
    assert "1297 training, 250 validation and 250 test images" in done.stdout
    for name in PICTURES:
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(PICTURES)
    assert len(list(tmp_path.glob("*.nc"))) == 5
    assert not list(tmp_path.glob("*.part"))
    test = lvm.datasets.digits().test.numpy()  # what is scored is what was held out
    for path in tmp_path.glob("*.nc"):
        with xarray.open_datatree(path) as groups:
            np.testing.assert_array_equal(groups["observed_data"]["x"], test)


SHORT = ["--epochs", "1", "--images", "20", "--samples", "20", "--device", "cpu"]
PAGES = {  # example -> further options, and what it says
    "bayesian_die": ([], ["Evidence log p(throws)", "NUTS", "in MCSE"]),
    "conditional_gan": ([], ["seed 0", "the classifier agrees with"]),
    "conditional_vae": ([], ["given the label, log p(x)", "a classifier of real digits agrees"]),
    "density_baselines": ([], ["bits/dim", "Gaussian, full", "kernel density"]),
    "gan": ([], ["GAN, seed 0", "GMMN, seed 0"]),
    "gmm": ([], []),
    "log_marginal": (
        ["--images", "5", "--temperatures", "5"],
        ["naive, 10,000", "annealed, 16 chains", "log p(x) between", "amortisation gap"],
    ),
    "missing_pixels": ([], []),
    "mixture_vae": ([], ["normal", "mixture", "vamp", "flow", "layers"]),
    "mnist_table": (
        ["--rows", "vae", "pixelcnn", "semi_supervised", "conditional_vae", "gaussian", "gan"],
        ["binary images", "grey images", "x | y", "a Gaussian kernel of width"],
    ),
    "own_story": ([], []),
    "pixelcnn": ([], ["VAE, InfoVAE", "I(x; z)"]),
    "posterior_of_z": ([], []),
    "semi_supervised": ([], ["Test error with 100 labels", "semi-supervised VAE"]),
    "vae": ([], ["log p(x) =", "I(x; z), bound from below"]),
}


def main_of(name, monkeypatch, options):
    """Run an example here, where the libraries are loaded already."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    importlib.import_module(name).main()


@pytest.mark.parametrize("name", PAGES)
def test_page(name, tmp_path, monkeypatch, capfd):
    """One epoch of each on the digits: it says what it promises, and leaves its picture."""
    options, texts = PAGES[name]
    main_of(name, monkeypatch, [*SHORT, *options, "--out", str(tmp_path)])
    said = capfd.readouterr()
    for text in texts:
        assert text in said.out
    assert said.err == ""
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("options", "epochs"), [([], 100), (["--data", "folder"], 12), (["--epochs", "7"], 7)]
)
def test_few_images_take_more_epochs(options, epochs, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    common = importlib.import_module("common")
    parser = common.parser("One page.", epochs=12, of_digits=100)
    args = parser.parse_args([*options, "--out", str(tmp_path)])
    assert common.ready(args).epochs == epochs


def test_every_example_is_run():
    others = {"common", "digits", "infovae_toy", "memory_mapped", "nuts", "page"}
    others.add("digit_classifier")  # by those that ask it
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PAGES, *others}


@pytest.fixture(scope="module")
def toy():
    """The module ``examples/infovae_toy.py``."""
    spec = importlib.util.spec_from_file_location("infovae_toy", EXAMPLES / "infovae_toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_infovae_toy(tmp_path):
    example = str(EXAMPLES / "infovae_toy.py")
    done = subprocess.run(
        [sys.executable, example, "--epochs", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
    assert len([line for line in done.stdout.splitlines() if "normal" in line]) == 18
    assert (tmp_path / "infovae_toy.png").stat().st_size > 5_000


@pytest.mark.parametrize(("slope", "noise"), [(0.7, 0.5), (1.5, 0.1), (-2.0, 0.005)])
def test_infovae_toy_measures_a_linear_gaussian_model(toy, slope, noise):
    """x = slope z + noise e; q(z | x) = N(0.4 x + 0.1, 0.3^2)."""

    def encode(x):
        return dist.Normal(0.4 * x + 0.1, 0.3).to_event(1)

    def decode(z):
        return dist.Normal(slope * z, noise).to_event(1)

    found = toy.measure(encode, decode)
    total = slope**2 + noise**2
    kl_post, nll = 0.0, 0.0
    for x in (-1.0, 1.0):
        loc, scale = 0.4 * x + 0.1, 0.3
        q = dist.Normal(torch.tensor(loc), scale)
        posterior = dist.Normal(torch.tensor(slope * x / total), noise / math.sqrt(total))
        kl_post += dist.kl.kl_divergence(q, posterior).item() / 2
        squares = (x - slope * loc) ** 2 + (slope * scale) ** 2
        nll += (math.log(noise) + math.log(2 * math.pi) / 2 + squares / (2 * noise**2)) / 2
    assert found["KL post"] == pytest.approx(kl_post, rel=1e-5)
    assert found["-log p(x|z)"] == pytest.approx(nll, rel=1e-5)
    assert found["std"] == pytest.approx(0.5, abs=1e-9)  # of means +-0.4 and a scale of 0.3
    coarser = toy.measure(encode, decode, points=1 << 16)
    assert found == pytest.approx(coarser, rel=1e-6)


def test_infovae_toy_measures_the_distance_to_the_prior(toy):
    found = toy.measure(
        lambda x: dist.Normal(torch.full_like(x, 0.6), 0.3).to_event(1),  # the same for every x
        lambda z: dist.Normal(z, 1.0).to_event(1),
    )
    expected = -math.log(0.3) + (0.3**2 + 0.6**2 - 1) / 2
    assert found["KL prior"] == pytest.approx(expected, abs=1e-9)


def test_infovae_toy_refuses_a_guide_that_the_points_miss(toy):
    with pytest.raises(ValueError, match="to sum to 1"):
        toy.measure(
            lambda x: dist.Normal(11.9 + 0 * x, 1.0).to_event(1),
            lambda z: dist.Normal(z, 1.0).to_event(1),
        )


def test_infovae_toy_skew_normals_make_up_the_prior(toy):
    """Whatever the skew, since Phi(-u) + Phi(u) = 1."""
    found = toy.measure(
        lambda x: toy.SkewNormal(0 * x, 1 + 0 * x, 7 * x).to_event(1),
        lambda z: dist.Normal(torch.tanh(z), 1.0).to_event(1),
    )
    assert found["KL prior"] == pytest.approx(0.0, abs=1e-9)
    assert found["std"] == pytest.approx(1.0, abs=1e-9)


def test_infovae_toy_skew_normal_draws(toy):
    torch.manual_seed(0)
    loc, scale, skew = (
        torch.tensor([0.3, -1.0]),
        torch.tensor([2.0, 0.5]),
        torch.tensor([4.0, -1.5]),
    )
    q = toy.SkewNormal(loc, scale, skew)
    z = q.rsample((100_000,))
    delta = skew / (1 + skew**2).sqrt()
    mean, variance = loc + scale * delta * math.sqrt(2 / math.pi), 1 - 2 * delta**2 / math.pi
    error = scale * variance.sqrt() / math.sqrt(len(z))
    assert ((z.mean(0) - mean).abs() < 5 * error).all()
    grid = torch.linspace(-20, 20, 40_001, dtype=torch.float64)[:, None]
    density = toy.SkewNormal(loc.double(), scale.double(), skew.double()).log_prob(grid).exp()
    torch.testing.assert_close(density.sum(0) * 1e-3, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close((grid * density).sum(0) * 1e-3, mean.double())


def ideal_decoder(q, floor):
    """The mean and the standard deviation of x given z under x -> q(z | x), the latter floored."""

    def decode(z):  # Z x 1 x 1
        minus, plus = (q(torch.full_like(z, x)).log_prob(z) for x in (-1.0, 1.0))
        u = (plus - minus)[..., None] / 2
        return dist.Normal(torch.tanh(u), (1 / torch.cosh(u)).clamp(min=floor)).to_event(1)

    return decode


@pytest.mark.parametrize(
    ("objective", "floor", "m", "t", "kl_prior", "kl_post", "nll"),
    [
        ("ELBO", 0.5, 0.858, 0.514, 0.09, 0.09, 0.45),
        ("ELBO", 0.1, 0.934, 0.357, 0.35, 0.22, -1.26),
        ("ELBO", 0.02, 0.953, 0.304, 0.50, 0.27, -2.90),
        ("InfoVAE, alpha 0", 0.5, 0.546, 0.814, 0.001, 0.06, 1.16),
        ("InfoVAE, alpha 0", 0.1, 0.582, 0.780, 0.003, 0.18, 1.08),
        ("InfoVAE, alpha 0", 0.02, 0.582, 0.780, 0.003, 0.18, 1.08),
        ("InfoVAE, alpha 1", 0.5, 0.609, 0.749, 0.004, 0.08, 1.05),
        ("InfoVAE, alpha 1", 0.1, 0.637, 0.713, 0.007, 0.34, 0.91),
        ("InfoVAE, alpha 1", 0.02, 0.638, 0.712, 0.007, 0.40, 0.91),
    ],
)
def test_infovae_toy_best_normals(toy, objective, floor, m, t, kl_prior, kl_post, nll):
    """Against a simplex search from several starts, whose integrals were others."""
    best = toy.best_normal(objective, floor)
    assert best == pytest.approx((m, t), abs=0.003)
    found = toy.measure(*toy.normal_pair(*best, floor))
    assert found["KL prior"] == pytest.approx(kl_prior, abs=0.006)
    assert found["KL post"] == pytest.approx(kl_post, abs=0.006)
    assert found["-log p(x|z)"] == pytest.approx(nll, abs=0.01)
    loss = toy.normal_loss(*best, objective, floor)
    for dm, dt in ((0.03, 0.0), (-0.03, 0.0), (0.0, 0.03), (0.0, -0.03), (0.3, -0.3), (-0.4, 0.2)):
        assert toy.normal_loss(best[0] + dm, best[1] + dt, objective, floor) > loss


@pytest.mark.parametrize(("m", "t"), [(0.3, 0.9), (0.9, 0.3)])
@pytest.mark.parametrize(("alpha", "lambda_"), [(0.0, 1.0), (0.0, 500.0), (1.0, 500.0)])
def test_infovae_toy_loss_of_normals(toy, monkeypatch, alpha, lambda_, m, t):
    """The closed forms are the integrals."""
    monkeypatch.setitem(toy.OBJECTIVES, "this", (alpha, lambda_))
    z = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    plus, minus, prior = (dist.Normal(a, b).log_prob(z) for a, b in ((m, t), (-m, t), (0.0, 1.0)))
    kl = (plus.exp() * (plus - prior)).sum() * 0.01
    apart = ((plus.exp() + minus.exp()) / 2 - prior.exp()) * 0.01
    mmd = apart @ torch.exp(-((z[:, None] - z) ** 2)) @ apart
    nll = toy.measure(*toy.normal_pair(m, t, 0.1))["-log p(x|z)"]
    expected = nll + (1 - alpha) * kl + (alpha + lambda_ - 1) * mmd
    assert toy.normal_loss(m, t, "this", 0.1) == pytest.approx(expected.item(), rel=1e-6)


def test_infovae_toy_best_decoder(toy):
    """It is made of the moments of x given z under q(z | x), the deviation floored."""
    encode, decode = toy.normal_pair(0.8, 0.5, 0.3)
    z = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None, None]
    found, expected = decode(z).base_dist, ideal_decoder(encode, 0.3)(z).base_dist
    torch.testing.assert_close(found.loc, expected.loc)
    torch.testing.assert_close(found.scale, expected.scale)


@pytest.mark.parametrize("floor", [0.5, 0.1, 0.02])
def test_infovae_toy_half_normals_are_best(toy, floor):
    """Of all q(z | x), and under every objective, up to 0.0004 nats; both distances vanish.

    Under q the datum +1 has probability r given z, and the ideal decoder pays
    -log p(x | z) = log s + log(2 pi) / 2 + excess(r). An ELBO is at most
    -E_z[-log p(x | z)] - (log 2 - E_z[entropy(r)]), as KL(q(z) || p(z)) is not negative.
    """
    r = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    variance = 4 * r * (1 - r)
    scale = variance.sqrt().clamp(min=floor)
    excess = (scale / floor).log() + variance / (2 * scale**2)
    entropy = -torch.xlogy(r, r) - torch.xlogy(1 - r, 1 - r)
    assert (entropy - excess).max() < 4e-4  # 0 at r = 0 and r = 1, where half normals are
    best = math.log(floor) + math.log(2 * math.pi) / 2

    losses = []
    for skew in (20.0, 200.0, 2000.0):

        def q(x, skew=skew):
            return toy.SkewNormal(0 * x, 1 + 0 * x, skew * x).to_event(1)

        found = toy.measure(q, ideal_decoder(q, floor))
        assert found["KL prior"] == pytest.approx(0.0, abs=1e-9)
        losses.append((found["-log p(x|z)"] - best, found["KL post"]))
    for coarse, fine in itertools.pairwise(losses):
        assert fine < tuple(value / 9 for value in coarse)  # as 1 / skew
    assert max(losses[-1]) < 0.01
