import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.contour import QuadContourSet
from matplotlib.path import Path

from pyro_lvm import datasets, plots

MASSES = [0.95, 0.80, 0.50]


@pytest.fixture(autouse=True)
def _no_figure_left_open():
    yield
    plt.close("all")


def comparison():
    return pd.DataFrame(
        {
            "mean": [54.0, 53.5, 40.0],
            "se": [1.0, 1.5, 2.0],
            "diff": [0.0, -0.5, -14.0],
            "dse": [0.0, 0.25, 0.75],
        },
        index=["vae", "gmm", "pca"],
    )


def history():
    return {
        "loss": [3.0, 2.0, 1.0],
        "kl[z]": [0.5, 0.75, 1.0],
        "validation/loss": [4.0, 3.0, 3.5],
    }


def draws(num_data, seed=0):
    generator = torch.Generator().manual_seed(seed)
    skew = torch.tensor([[1.5, 0.8], [0.0, 0.4]])
    return torch.randn(num_data, 2, generator=generator) @ skew + torch.tensor([1.0, -2.0])


def posteriors():
    return {"draws": draws(200)[:, 0], "exact": torch.distributions.Beta(2.0, 3.0)}


IMAGES = torch.linspace(0, 1, 80).reshape(5, 4, 4)
PLOTS = {
    "plot_images": lambda **kw: plots.plot_images(IMAGES, **kw),
    "plot_reconstructions": lambda **kw: plots.plot_reconstructions(IMAGES, IMAGES / 2, **kw),
    "plot_means": lambda **kw: plots.plot_means(IMAGES[:3], weights=torch.ones(3), **kw),
    "plot_aggregate_posterior": lambda **kw: plots.plot_aggregate_posterior(draws(100), **kw),
    "plot_history": lambda **kw: plots.plot_history(history(), **kw),
    "plot_comparison": lambda **kw: plots.plot_comparison(comparison(), **kw),
    "plot_densities": lambda **kw: plots.plot_densities(posteriors(), "p", **kw),
}
every_plot = pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS)


def test_every_plot_is_in_the_list():
    elsewhere = {"plot_bidirectional", "plot_collapse"}  # with what they draw
    assert sorted({*PLOTS, *elsewhere}) == plots.__all__


@every_plot
def test_plot_returns_the_axes_that_it_was_given(plot):
    _, axes = plt.subplots(1, 2)
    assert plot(ax=axes[1]) is axes[1]
    assert not axes[0].has_data()
    assert plt.get_fignums() == [1]


@every_plot
def test_plot_makes_a_figure_of_its_own(plot):
    _, other = plt.subplots()
    ax = plot()
    assert ax is not other
    assert not other.has_data()
    assert plt.get_fignums() == [1, 2]
    assert ax.figure.axes == [ax]


@every_plot
def test_plot_keeps_text_inside_its_figure(plot):
    ax = plot()
    ax.figure.canvas.draw()
    inside = ax.figure.get_tightbbox()
    width, height = ax.figure.get_size_inches()
    assert inside.x0 >= 0
    assert inside.y0 >= 0
    assert inside.x1 <= width
    assert inside.y1 <= height


@every_plot
def test_plot_changes_no_global_state(plot):
    settings = dict(matplotlib.rcParams)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    plot()
    assert dict(matplotlib.rcParams) == settings
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


# ---------------------------------------------------------------------------------------- images


def drawn(ax):
    (image,) = ax.images
    return np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan)


def cells(canvas, height, width, columns, pitch):
    """The images in a canvas of tiles that begin every ``pitch`` rows."""
    for top in range(1, canvas.shape[0], pitch):
        for left in range(1, canvas.shape[1], width + 1)[:columns]:
            yield canvas[top : top + height, left : left + width]


def test_images_are_tiled_row_by_row(device):
    images = torch.rand(5, 3, 2, device=device, requires_grad=True)
    ax = plots.plot_images(images, columns=3)
    a, b, c, d, e = images.detach().cpu().double().numpy()
    n = np.full((3, 2), np.nan)
    column, row = np.full((3, 1), np.nan), np.full((1, 10), np.nan)
    expected = np.concatenate(
        [
            row,
            np.concatenate([column, a, column, b, column, c, column], 1),
            row,
            np.concatenate([column, d, column, e, column, n, column], 1),
            row,
        ]
    )
    np.testing.assert_array_equal(drawn(ax), expected)
    assert ax.images[0].get_clim() == (0, 1)


SHAPES = {
    "N x H x W": ((6, 3, 2), None),
    "N x 1 x H x W": ((6, 1, 3, 2), None),
    "N x D": ((6, 6), (3, 2)),
    "N x D, one channel": ((6, 6), (1, 3, 2)),
}


@pytest.mark.parametrize(("shape", "image_shape"), SHAPES.values(), ids=SHAPES)
def test_images_of_every_shape_look_the_same(shape, image_shape):
    images = torch.linspace(0, 1, 36)
    ax = plots.plot_images(images.reshape(shape), image_shape=image_shape)
    reference = plots.plot_images(images.reshape(6, 3, 2), columns=3)  # 3 = ceil(sqrt(6))
    np.testing.assert_array_equal(drawn(ax), drawn(reference))


@pytest.mark.parametrize("flat", [False, True])
def test_colour_images_keep_their_channels(flat):
    images = torch.rand(2, 3, 4, 5)
    if flat:
        ax = plots.plot_images(images.flatten(1), image_shape=(3, 4, 5))
    else:
        ax = plots.plot_images(images)
    canvas = drawn(ax)
    assert canvas.shape == (6, 13, 3)
    expected = images.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(canvas[1:5, 1:6], expected[0], atol=1e-7)
    np.testing.assert_allclose(canvas[1:5, 7:12], expected[1], atol=1e-7)
    assert (canvas[0] == 1).all()  # the border is white


def test_values_are_clipped():
    images = torch.tensor([-1.0, 0.25, 0.5, 7.0]).reshape(1, 2, 2)
    inner = (slice(1, 3), slice(1, 3))
    np.testing.assert_allclose(drawn(plots.plot_images(images))[inner], [[0, 0.25], [0.5, 1]])
    ax = plots.plot_images(images, vmin=-2, vmax=6)
    np.testing.assert_allclose(drawn(ax)[inner], [[-1, 0.25], [0.5, 6]])
    assert ax.images[0].get_clim() == (-2, 6)
    colour = plots.plot_images(images.expand(1, 3, 2, 2), vmin=-2, vmax=6)
    expected = np.array([[1 / 8, 2.25 / 8], [2.5 / 8, 1]])
    np.testing.assert_allclose(drawn(colour)[inner][..., 2], expected)


def test_bytes_and_half_precision_can_be_drawn():
    images = torch.tensor([[[0, 255], [51, 102]]], dtype=torch.uint8)
    ax = plots.plot_images(images, vmax=255)
    np.testing.assert_array_equal(drawn(ax)[1:3, 1:3], images[0])
    plots.plot_images(torch.rand(2, 3, 3, dtype=torch.bfloat16))


def test_reconstructions_lie_under_their_originals():
    originals, reconstructions = torch.rand(5, 8, 4), torch.rand(5, 8, 4)
    ax = plots.plot_reconstructions(originals, reconstructions, columns=3)
    # A pair is 8 + 1 + 8 rows high, then one of border and one between the pairs.
    pairs = list(cells(drawn(ax), 17, 4, 3, pitch=19))
    for original, reconstruction, pair in zip(originals, reconstructions, pairs, strict=False):
        np.testing.assert_array_equal(pair[:8], original)
        np.testing.assert_array_equal(pair[9:], reconstruction)
    assert np.isnan(pairs[5]).all()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["original", "reconstruction"] * 2
    # Each label is at the middle of the rows that it names.
    assert ax.get_yticks().tolist() == [4.5, 13.5, 23.5, 32.5]


def test_means_carry_their_weights_as_captions():
    loc = torch.rand(5, 10)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0])
    ax = plots.plot_means(loc, weights=weights, image_shape=(5, 2), columns=3)
    # 5 rows of image, one of border, ceil(0.3 * 5) = 2 for the caption.
    tiles = list(cells(drawn(ax), 5, 2, 3, pitch=8))
    np.testing.assert_array_equal(tiles[:5], loc.double().reshape(5, 5, 2))
    texts = [(t.get_text(), *t.get_position()) for t in ax.texts]
    assert [t[0] for t in texts] == ["10.0%", "20.0%", "30.0%", "40.0%", "0.0%"]
    assert [t[1] for t in texts] == [1.5, 4.5, 7.5, 1.5, 4.5]  # the middles of the columns
    assert [t[2] for t in texts] == [7.0] * 3 + [15.0] * 2  # between the rows of images


def test_means_without_weights_have_no_captions():
    ax = plots.plot_means(torch.rand(3, 4, 4))
    assert not ax.texts
    assert drawn(ax).shape == (6, 16)


# --------------------------------------------------------------------------------------- latents


def contour_lines(ax):
    """The contour lines of posterior and prior."""
    posterior, prior = (c for c in ax.collections if isinstance(c, QuadContourSet) and not c.filled)
    return posterior, prior


def share_inside(contours, points):
    """The share of the points within each contour; the regions are nested and without holes."""
    inside = []
    for path in contours.get_paths():
        closed = [Path(polygon) for polygon in path.to_polygons() if len(polygon) > 2]
        hits = np.stack([p.contains_points(points.numpy()) for p in closed])
        inside.append(hits.any(0).mean())
    return inside


def binomial_tolerance(mass, *sizes):
    return 5 * math.sqrt(mass * (1 - mass) * sum(1 / size for size in sizes))


@pytest.mark.parametrize("num_data", [1000, 3000])
def test_contours_enclose_the_stated_mass(num_data):
    ax = plots.plot_aggregate_posterior(draws(num_data), prior=draws(num_data, seed=1) / 2)
    posterior, prior = contour_lines(ax)
    fresh = draws(20_000, seed=2)
    for contours, points in ((posterior, fresh), (prior, fresh / 2)):
        for share, mass in zip(share_inside(contours, points), MASSES, strict=True):
            assert abs(share - mass) < binomial_tolerance(mass, num_data, len(fresh))
    filled = next(c for c in ax.collections if isinstance(c, QuadContourSet) and c.filled)
    np.testing.assert_array_equal(filled.levels, posterior.levels)


def test_contours_of_several_clusters_enclose_the_stated_mass():
    points, fresh = datasets.ring_of_gaussians(3000), datasets.ring_of_gaussians(20_000)
    posterior, _ = contour_lines(plots.plot_aggregate_posterior(points, bandwidth=0.1))
    assert len(posterior.get_paths()[0].to_polygons()) == 8
    for share, mass in zip(share_inside(posterior, fresh), MASSES, strict=True):
        # Levels at the draws' own values sit a little high, each draw adding its own kernel:
        # with clusters as small as the kernel that is a percent or two.
        assert abs(share - mass) < binomial_tolerance(mass, 3000, 20_000) + 0.02


def test_default_prior_is_the_standard_normal():
    _, prior = contour_lines(plots.plot_aggregate_posterior(draws(200)))
    for path, mass in zip(prior.get_paths(), MASSES, strict=True):
        radius = math.sqrt(-2 * math.log(1 - mass))
        np.testing.assert_allclose(np.linalg.norm(path.vertices, axis=1), radius, rtol=5e-3)
        np.testing.assert_allclose(np.ptp(path.vertices, axis=0), 2 * radius, rtol=5e-3)
    assert prior.get_linestyles()[0][1] is not None  # dashed


def test_particles_are_pooled_and_dims_chosen(device):
    z = torch.randn(3, 40, 5, device=device)
    ax = plots.plot_aggregate_posterior(z, dims=(4, 1))
    (scatter,) = ax.lines
    points = np.stack(scatter.get_data(), 1)
    expected = z[..., [4, 1]].reshape(-1, 2).cpu().double().numpy()
    assert sorted(map(tuple, points)) == sorted(map(tuple, expected))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$z_{4}$", "$z_{1}$")
    assert ax.get_aspect() == 1


def test_draws_that_repeat_can_be_drawn():
    z = torch.cat([torch.zeros(900, 2), draws(100)])
    posterior, _ = contour_lines(plots.plot_aggregate_posterior(z))
    assert (np.diff(posterior.levels) > 0).all()


def test_many_points_are_thinned():
    z = draws(10_000)
    ax = plots.plot_aggregate_posterior(z)
    points = {tuple(point) for point in np.stack(ax.lines[0].get_data(), 1)}
    assert len(points) == 3000
    assert points <= set(map(tuple, z.double().numpy()))


def test_the_picture_shows_both_distributions():
    far = torch.randn(500, 2) * 0.1 + 20
    ax = plots.plot_aggregate_posterior(far)
    assert ax.get_xlim()[0] < -2.45
    assert ax.get_xlim()[1] > 20.2


# ------------------------------------------------------------------------- training and comparison


def lines(ax):
    return {line.get_label(): line for line in ax.lines}


def test_history_draws_every_term():
    ax = plots.plot_history(history())
    found = lines(ax)
    assert set(found) == set(history())
    for name, values in history().items():
        assert found[name].get_xdata().tolist() == [1, 2, 3]
        assert found[name].get_ydata().tolist() == values
    assert found["loss"].get_color() == found["validation/loss"].get_color()
    assert found["loss"].get_color() != found["kl[z]"].get_color()
    assert found["loss"].get_linestyle() == "-"
    assert found["validation/loss"].get_linestyle() == "--"
    assert "nats per datum" in ax.get_ylabel()
    legend = {text.get_text() for text in ax.get_legend().get_texts()}
    assert legend == set(history())


def test_history_draws_the_selected_terms():
    assert set(lines(plots.plot_history(history(), terms=["kl[z]"]))) == {"kl[z]"}
    assert set(lines(plots.plot_history(history(), terms=["loss"]))) == {
        "loss",
        "validation/loss",
    }
    assert set(lines(plots.plot_history({"validation/loss": [1.0]}))) == {"validation/loss"}


def test_history_of_one_epoch_can_be_seen():
    assert plots.plot_history({"loss": [1.0]}).lines[0].get_marker() == "o"


def test_history_tells_many_terms_apart():
    ax = plots.plot_history({f"term {k}": [1.0, 2.0] for k in range(20)})
    looks = {(line.get_color(), line.get_marker()) for line in ax.lines}
    assert len(looks) == 20


def intervals(ax):
    """Marker -> its points and the ends of its bars."""
    found = {}
    for points, _, (bars,) in (container.lines for container in ax.containers):
        ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
        found[points.get_marker()] = (points.get_xdata().tolist(), points.get_ydata(), ends)
    return found


def test_comparison_draws_scores_and_paired_differences():
    ax = plots.plot_comparison(comparison())
    found = intervals(ax)
    means, rows, ends = found["o"]
    assert means == [54.0, 53.5, 40.0]
    assert ends == [[53.0, 55.0], [52.0, 55.0], [38.0, 42.0]]
    differences, beside, ends = found["^"]
    assert differences == [53.5, 40.0]
    assert ends == [[53.25, 53.75], [39.25, 40.75]]
    assert (np.abs(beside - rows[1:]) < 0.5).all()
    assert [label.get_text() for label in ax.get_yticklabels()] == ["vae", "gmm", "pca"]
    assert ax.yaxis_inverted()  # the best on top
    assert ax.get_xlabel() == "held-out log p(x), nats per datum"


def test_comparison_of_one_model_has_no_difference():
    assert set(intervals(plots.plot_comparison(comparison()[:1]))) == {"o"}


# ---------------------------------------------------------------------------------------- errors

X = torch.rand(4, 6)
NAN = torch.full((2, 3, 3), math.nan)
REFUSED = {
    "flat without shape": (lambda: plots.plot_images(X), ValueError, "image_shape="),
    "wrong shape": (lambda: plots.plot_images(X, image_shape=(2, 2)), ValueError, "4 values"),
    "two channels": (lambda: plots.plot_images(torch.rand(2, 2, 3, 3)), ValueError, "N x 3 x H"),
    "rank one": (lambda: plots.plot_images(X[0]), ValueError, "image_shape="),
    "no image": (lambda: plots.plot_images(torch.rand(0, 3, 3)), ValueError, "at least one"),
    "NaN image": (lambda: plots.plot_images(NAN), ValueError, "finite"),
    "array": (lambda: plots.plot_images(X.numpy()), TypeError, "torch.Tensor"),
    "no columns": (
        lambda: plots.plot_images(X, image_shape=(2, 3), columns=0),
        ValueError,
        "columns",
    ),
    "vmin": (lambda: plots.plot_images(X, image_shape=(2, 3), vmin=1), ValueError, "vmin"),
    "unpaired": (
        lambda: plots.plot_reconstructions(X, X[:3], image_shape=(2, 3)),
        ValueError,
        "as many reconstructions",
    ),
    "number of weights": (
        lambda: plots.plot_means(X, weights=X[0], image_shape=(2, 3)),
        ValueError,
        "4 non-negative weights",
    ),
    "negative weights": (
        lambda: plots.plot_means(X, weights=-X[:, 0], image_shape=(2, 3)),
        ValueError,
        "non-negative",
    ),
    "one latent": (lambda: plots.plot_aggregate_posterior(X[:, :1]), ValueError, "D >= 2"),
    "rank of z": (lambda: plots.plot_aggregate_posterior(X[0]), ValueError, "N x D"),
    "same dims": (lambda: plots.plot_aggregate_posterior(X, dims=(1, 1)), ValueError, "dims"),
    "dims": (lambda: plots.plot_aggregate_posterior(X, dims=(0, 6)), ValueError, "0 to 5"),
    "rank of prior": (
        lambda: plots.plot_aggregate_posterior(X, prior=X[:, :1]),
        ValueError,
        "prior of shape",
    ),
    "collapsed": (
        lambda: plots.plot_aggregate_posterior(torch.ones(50, 2)),
        ValueError,
        "Expected z with spread",
    ),
    "on a line": (
        lambda: plots.plot_aggregate_posterior(torch.rand(50, 1).expand(50, 2)),
        ValueError,
        "a point or a line",
    ),
    "one draw": (lambda: plots.plot_aggregate_posterior(X[:1]), ValueError, "spread"),
    "bandwidth": (
        lambda: plots.plot_aggregate_posterior(X, bandwidth=0.0),
        ValueError,
        "bandwidth",
    ),
    "unknown term": (
        lambda: plots.plot_history(history(), terms=["elbo"]),
        ValueError,
        r"loss.*kl\[z\].*elbo",
    ),
    "no history": (lambda: plots.plot_history({}), ValueError, "got none"),
    "nested history": (lambda: plots.plot_history({"loss": [[1.0]]}), ValueError, "per epoch"),
    "column": (
        lambda: plots.plot_comparison(comparison().drop(columns="dse")),
        ValueError,
        "without dse",
    ),
    "no model": (lambda: plots.plot_comparison(comparison()[:0]), ValueError, "at least one"),
    "order": (lambda: plots.plot_comparison(comparison()[::-1]), ValueError, "best model first"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_plots_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert not plt.get_fignums()  # and leave no empty figure behind
