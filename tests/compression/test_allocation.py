from bisect import bisect_right
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oats_vision.compression.allocation import allocate, lower_hull, refined

costs = st.lists(st.floats(0, 100, width=16), min_size=2, max_size=5)
curves = costs.map(lambda ys: [(float(x), y) for x, y in enumerate(ys)])


def slopes(curve):
    return [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairwise(curve)]


def cost_at(curve, parameters):
    """On the lines between a curve's points; flat beyond them."""
    i = bisect_right(curve, parameters, key=lambda point: point[0])
    if i in (0, len(curve)):
        return curve[min(i, len(curve) - 1)][1]
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    return y0 + (y1 - y0) * (parameters - x0) / (x1 - x0)


@given(curves)
def test_the_hull_is_convex_falls_and_no_point_lies_below_it(curve):
    hull = lower_hull(curve)
    assert set(hull) <= set(curve)
    assert hull[0] == curve[0]
    assert slopes(hull) == sorted(slopes(hull))
    assert all(slope < 0 for slope in slopes(hull))
    assert all(cost_at(hull, x) <= y + 1e-9 for x, y in curve)


@given(st.lists(curves, min_size=1, max_size=3), st.integers(0, 9))
def test_no_other_way_to_share_out_costs_less(curves, total):
    """All whole numbers of parameters for each part, tried one by one, at the costs that the hulls give."""
    hulls = [lower_hull(curve) for curve in curves]
    kept = allocate(curves, total)
    most = sum(hull[-1][0] for hull in hulls)
    assert sum(kept) == pytest.approx(min(total, most))
    ours = sum(map(cost_at, hulls, kept))
    ways = product(*(range(len(curve)) for curve in curves))
    others = [sum(map(cost_at, hulls, way)) for way in ways if sum(way) <= total]
    assert ours == pytest.approx(min(others), abs=1e-6)


def test_equal_curves_get_equal_shares_and_a_steeper_one_gets_more():
    curve = refined([(x, 2.0**-x) for x in (1, 4, 8)])
    assert allocate([curve, curve], 8) == pytest.approx([4, 4], abs=0.3)
    steeper = [(x, 8 * y) for x, y in curve]
    low, high = allocate([curve, steeper], 8)
    # where 2^-x = 8 2^-y: three more
    assert (low, high) == pytest.approx((2.5, 5.5), abs=0.3)


def test_each_part_keeps_its_least_and_a_total_below_that_is_an_error():
    curves = [[(3.0, 1.0), (5.0, 0.0)], [(2.0, 9.0), (5.0, 0.0)], [(4.0, 7.0)]]
    assert allocate(curves, 10) == [3, 3, 4]
    with pytest.raises(ValueError, match="keep 9 parameters at least, and there are 8"):
        allocate(curves, 8)


def test_between_points_the_logarithm_of_the_cost_is_on_a_parabola():
    fine = refined([(x, 2.0 ** -(x + x * x / 4)) for x in (0, 2, 6)], steps=2)
    assert [x for x, _ in fine] == [0, 1, 2, 4, 6]
    assert [y for _, y in fine] == pytest.approx([2.0 ** -(x + x * x / 4) for x in (0, 1, 2, 4, 6)])
    assert refined([(0, 8.0), (2, 2.0), (3, 0.0)], steps=2) == [(0, 8), (1, 5), (2, 2), (2.5, 1), (3, 0)]
    assert refined([(4, 3.0)]) == [(4, 3.0)]
