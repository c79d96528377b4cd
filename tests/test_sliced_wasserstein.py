"""The sliced Wasserstein distance: exact distances in one dimension, closed forms, its bias."""

import math
import re

import pytest
import torch
from test_divergences import draws

from pyro_lvm.divergences import SlicedWasserstein

each_order = pytest.mark.parametrize("order", [1, 1.5, 2, 3])


def distance_by_repetition(u, v, order):
    """W_p^p of two samples of numbers: each row as often as the other sample has rows."""
    long_u, long_v = u.repeat_interleave(len(v)).sort().values, v.repeat_interleave(len(u))
    return (long_u - long_v.sort().values).abs().pow(order).mean()


@pytest.mark.usefixtures("float64")
@each_order
@pytest.mark.parametrize("sizes", [(6, 6), (1, 5), (4, 6), (7, 3), (30, 17)])
def test_one_dimension_is_exact(order, sizes):
    q, p = draws(*sizes, dim=1)  # both directions of a line give the same
    expected = distance_by_repetition(q[:, 0], p[:, 0], order)
    torch.testing.assert_close(SlicedWasserstein(3, order=order)(q, p), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [(40, 40), (40, 30), (7, 100)])
def test_first_order_in_one_dimension_is_that_of_scipy(sizes):
    stats = pytest.importorskip("scipy.stats")
    q, p = draws(*sizes, dim=1)
    expected = stats.wasserstein_distance(q[:, 0].numpy(), p[:, 0].numpy())
    assert SlicedWasserstein(1, order=1)(q, p).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.usefixtures("float64")
@each_order
def test_repeated_rows_change_nothing(order):
    distance, (q, p) = SlicedWasserstein(5, order=order), draws(6, 6)
    torch.manual_seed(0)
    expected = distance(q, p)
    torch.manual_seed(0)
    torch.testing.assert_close(distance(q.repeat(3, 1), p.repeat(2, 1)), expected)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sizes", [(2000, 2000), (2000, 1500)])
def test_normals_of_one_covariance_have_the_closed_form(sizes):
    """SW_2^2 = E (theta . m)^2 = |m|^2 / D, whatever the covariance is."""
    factor, shift = 0.3 * torch.randn(3, 3), torch.tensor([3.0, -1.0, 0.5])
    values = []
    for _ in range(60):
        q, p = (torch.randn(n, 3) @ factor for n in sizes)
        values.append(SlicedWasserstein(50)(q + shift, p))
    values = torch.stack(values)
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - shift.square().sum() / 3) < 5 * error
    assert error < 0.1


@pytest.mark.usefixtures("float64")
def test_directions_are_uniform():
    """Of two points the distance is E |theta . m|^p, at p = 4: 3 |m|^4 / (D (D + 2))."""
    m = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    values = torch.stack([SlicedWasserstein(50, order=4)(m, 0 * m) for _ in range(200)])
    error = values.std() / math.sqrt(200)
    assert abs(values.mean() - 3 * m.square().sum() ** 2 / 24) < 5 * error


@pytest.mark.usefixtures("float64")
def test_bias_is_upwards_and_falls_with_the_size():
    def mean(size):
        return torch.stack(
            [SlicedWasserstein()(*torch.randn(2, size, 3)) for _ in range(60)]
        ).mean()

    few, some, many = mean(10), mean(100), mean(1000)
    assert few > 4 * some > 16 * many > 0


def test_unit_is_that_of_the_samples_to_the_power():
    q, p = draws(8, 8)
    for order in (1, 2, 3):
        distance = SlicedWasserstein(order=order)
        torch.manual_seed(0)
        expected = distance(q, p) * 10**order
        torch.manual_seed(0)
        torch.testing.assert_close(distance(10 * q, 10 * p), expected)


def test_directions_are_fresh_and_from_the_global_generator():
    distance, (q, p) = SlicedWasserstein(), draws(8, 8)
    torch.manual_seed(3)
    first, second = distance(q, p), distance(q, p)
    torch.manual_seed(3)
    assert distance(q, p) == first != second


@each_order
@pytest.mark.parametrize("sizes", [(5, 5), (5, 3)])
def test_gradient_is_finite_where_points_coincide(order, sizes):
    q, p = (torch.ones(n, 3).requires_grad_() for n in sizes)
    SlicedWasserstein(order=order)(q, p).backward()
    for x in (q, p):
        assert torch.isfinite(x.grad).all()


ERRORS = {
    "no_projections": (lambda: SlicedWasserstein(0), "num_projections to be a positive integer"),
    "order": (lambda: SlicedWasserstein(order=0.5), "order to be a number >= 1; got 0.5"),
    "order_nan": (lambda: SlicedWasserstein(order=math.nan), "order to be a number >= 1; got nan"),
}


@pytest.mark.parametrize(("call", "match"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, match):
    with pytest.raises(ValueError, match=re.escape(match)):
        call()


def test_repr_names_the_settings():
    assert repr(SlicedWasserstein(7)) == "SlicedWasserstein(num_projections=7, order=2)"
