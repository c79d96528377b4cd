"""Overlaid densities: every curve has area one, its peak, and its ends where they should be."""

import math
import warnings

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray

from pyro_lvm import plots

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz


@pytest.fixture(autouse=True)
def _no_figure_left_open():
    yield
    plt.close("all")


def curves(ax):
    return {line.get_label(): line.get_xydata().T for line in ax.lines}


def area(curve):
    return np.trapezoid(curve[1], curve[0])


def mean(curve):
    return np.trapezoid(curve[0] * curve[1], curve[0])


def group(**values):
    """What holds a posterior group, as ArviZ has it: chain x draw x ..."""
    arrays = {
        n: (("chain", "draw", *(f"{n}_dim_{i}" for i in range(v.dim() - 2))), v.numpy())
        for n, v in values.items()
    }
    return {"posterior": xarray.Dataset(arrays)}


@pytest.mark.parametrize("loc", [-3.0, 0.0, 40.0])
@pytest.mark.parametrize("scale", [0.01, 5.0])
def test_draws_and_closed_form_of_a_normal(loc, scale):
    exact = dist.Normal(loc, scale)
    found = curves(
        plots.plot_densities({"draws": exact.sample((20_000,)), "closed form": exact}, "mu")
    )
    assert list(found) == ["draws", "closed form"]
    for name, tolerance in (("draws", 0.1), ("closed form", 0.01)):
        curve = found[name]
        assert area(curve) == pytest.approx(1.0, abs=5e-3)
        assert mean(curve) / area(curve) == pytest.approx(loc, abs=0.05 * scale)
        peak = curve[:, curve[1].argmax()]
        assert peak[0] == pytest.approx(loc, abs=0.3 * scale)
        assert peak[1] == pytest.approx(1 / (scale * math.sqrt(2 * math.pi)), rel=tolerance)
    x, density = found["closed form"]
    assert np.allclose(density, exact.log_prob(torch.as_tensor(x)).exp())


def test_a_density_that_ends_at_its_peak():
    """Beta(1, 4) is 4 (1 - x)^3: 4 at the left end, where plain kernels give half of it."""
    exact = dist.Beta(1.0, 4.0)
    curve = curves(plots.plot_densities({"draws": exact.sample((10_000,))}, "p"))["draws"]
    assert curve[0].min() >= 0
    assert area(curve) == pytest.approx(1.0, abs=0.01)
    assert curve[1][0] == pytest.approx(4.0, rel=0.15)
    flipped = curves(plots.plot_densities({"draws": 1 - exact.sample((10_000,))}, "p"))["draws"]
    assert flipped[1][-1] == pytest.approx(4.0, rel=0.15)
    assert flipped[0].max() <= 1


def test_a_density_that_does_not_end_runs_out():
    """Few draws: what is at the last of them is one kernel, no edge."""
    curve = curves(plots.plot_densities({"draws": torch.randn(60)}, "mu"))["draws"]
    assert area(curve) == pytest.approx(1.0, abs=0.01)
    assert curve[1][[0, -1]].max() < 0.02 * curve[1].max()


def test_a_number_is_chosen_by_coordinates():
    """Draws of both chains, of the entry in the second row and third column."""
    values = torch.randn(2, 500, 2, 3) + torch.arange(6.0).reshape(2, 3) * 100
    values[1] += 10  # the second chain is elsewhere
    ax = plots.plot_densities({"a": group(w=values)}, "w", {"w_dim_0": 1, "w_dim_1": 2})
    curve = curves(ax)["a"]
    assert mean(curve) / area(curve) == pytest.approx(505.0, abs=0.5)
    assert 490 < curve[0].min() < 499
    assert 511 < curve[0].max() < 520
    assert ax.get_xlabel() == "w[1, 2]"


@pytest.mark.parametrize("make", ["InferenceData", "DataTree"])
def test_arvizs_containers(make):
    values = torch.randn(2, 300)
    dataset = group(mu=values)["posterior"]
    if make == "DataTree":
        idata = xarray.DataTree.from_dict({"posterior": dataset})
    elif arviz.__version__.startswith("0."):
        idata = arviz.InferenceData(posterior=dataset)
    else:
        pytest.skip("ArviZ 1 has no container of its own")
    found = curves(plots.plot_densities({"idata": idata, "draws": values.flatten()}, "mu"))
    assert np.allclose(found["idata"], found["draws"], atol=1e-5)


def test_closed_forms_are_dashed_and_all_are_told_apart():
    ax = plots.plot_densities(
        {"a": torch.randn(50), "b": dist.Normal(0.0, 1.0), "c": dist.Normal(1.0, 1.0)}, "mu"
    )
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--", "--"]
    assert len({line.get_color() for line in ax.lines}) == 3
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "c"]


def test_bandwidth_is_a_share_of_the_spread():
    draws = torch.cat([torch.randn(500), torch.randn(500) + 20])
    narrow, wide = (
        curves(plots.plot_densities({"x": draws}, "x", bandwidth=b))["x"] for b in (0.05, 0.5)
    )
    middle = np.abs(narrow[0] - 10).argmin()
    assert narrow[1][middle] < 1e-4 < wide[1][middle]


def test_what_is_refused():
    normal, posterior = dist.Normal(0.0, 1.0), group(p=torch.randn(2, 5, 3))
    for error, match, posteriors, settings in (
        (ValueError, "at least one posterior", {}, {}),
        (TypeError, "draws or a Distribution for 'a'; got int", {"a": 3}, {}),
        (ValueError, "a variable of 'a', among .'p'.; got 'q'", {"a": posterior}, {"var": "q"}),
        (ValueError, r"got dimensions \['p_dim_0'\] as well.*'p_dim_0': 0", {"a": posterior}, {}),
        (ValueError, r"one number for 'a'; got one of shape \(2,\)", {"a": normal.expand([2])}, {}),
        (ValueError, "draws of 'a' that spread; got 7 at 1", {"a": torch.ones(7)}, {}),
        (ValueError, "a with 1 dimension", {"a": torch.randn(4, 2)}, {}),
        (ValueError, "finite values in a", {"a": torch.tensor([1.0, math.nan])}, {}),
        (ValueError, "bandwidth.*positive", {"a": normal}, {"bandwidth": 0.0}),
    ):
        with pytest.raises(error, match=match):
            plots.plot_densities(posteriors, **{"var": "p", **settings})
