"""How a number of parameters is best shared out, on plain numbers: nothing here knows a model or a matrix.

Each part (a weight) has a curve: what it costs to keep so many of its parameters. The sum of the costs is least, for a
given number of parameters in all, where one parameter more would save as much in every part: its cost's slope is the
same everywhere (one Lagrange multiplier). For that each curve must be convex, so that what is filled is its lower hull.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

Point = tuple[float, float]  # parameters kept, cost
STEPS = 32  # into which the way from one measured point of a curve to the next is divided


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The convex, falling part of a curve: no point lies below it, and each of its points is one of them.

    >>> lower_hull([(1, 9.0), (2, 8.0), (3, 1.0), (4, 2.0)])
    [(1, 9.0), (3, 1.0)]
    """
    hull: list[Point] = []
    for x, y in sorted(points):
        if hull and y >= hull[-1][1]:
            continue  # more parameters, and no less cost
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], (x, y)):
            hull.pop()
        hull.append((x, y))
    return hull


def refined(points: Sequence[Point], steps: int = STEPS) -> list[Point]:
    """A curve with points between those that were measured: the parabola through the logarithms of the costs.

    Errors fall about exponentially with what is kept. Straight lines between the points would have corners there, at
    which many parts would stop.

    Args:
        points: with costs of at least 0. With a cost of 0 among them, those are on lines.
    """
    points = sorted(dict(points).items())
    if min(y for _, y in points) <= 0:
        fine = [
            (_between(x0, x1, k / steps), _between(y0, y1, k / steps))
            for (x0, y0), (x1, y1) in pairwise(points)
            for k in range(steps)
        ]
    else:
        logs = [(x, math.log(y)) for x, y in points]
        xs = [_between(x0, x1, k / steps) for (x0, _), (x1, _) in pairwise(points) for k in range(steps)]
        fine = [(x, math.exp(_polynomial(logs, x))) for x in xs]
    return [*fine, *points[-1:]]


def _between(a: float, b: float, share: float) -> float:
    return a + share * (b - a)


def _polynomial(points: Sequence[Point], x: float) -> float:
    """The value at x of the polynomial through all points (Lagrange)."""
    return sum(y * math.prod((x - other) / (own - other) for other, _ in points if other != own) for own, y in points)


def allocate(curves: Sequence[Sequence[Point]], total: float) -> list[float]:
    """Share out parameters so that the sum of the costs is least.

    Args:
        curves: of each part; it keeps as many parameters as the first point of its curve has at least, and as many as
            the last one of its lower hull at most.
        total: to share out.

    Returns:
        The parameters that each part keeps. They add up to the total, or to less if more would save nothing.

    Raises:
        ValueError: the total is less than the least that all parts keep.

    >>> allocate([[(0, 4.0), (1, 1.0), (2, 0.0)], [(0, 2.5), (2, 0.0)]], total=2)
    [1.0, 1.0]
    """
    hulls = [lower_hull(curve) for curve in curves]
    kept = [float(hull[0][0]) for hull in hulls]
    rest = total - sum(kept)
    if rest < -1e-9 * abs(total):
        raise ValueError(f"the parts keep {sum(kept):g} parameters at least, and there are {total:g}")
    # on a convex curve the steps that save most come first, so that sorting them keeps each curve's order
    steps = [(_slope(a, b), part, b[0] - a[0]) for part, hull in enumerate(hulls) for a, b in pairwise(hull)]
    for _, part, length in sorted(steps):
        given = min(length, rest)
        if given <= 0:
            break
        kept[part] += given
        rest -= given
    return kept


def _slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
