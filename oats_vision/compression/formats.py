"""`bits`: a number format for each linear, by what each costs the model's output.

Every linear is decomposed roughly in each of a few formats, and the one that costs least is taken under one total: that
of so many bits a weight in all linears, everything counted (values, positions, scales, U and V).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from oats_vision.compression.allocation import Point, lower_hull
from oats_vision.compression.budgets import PartBudget, planned
from oats_vision.compression.curves import Weight, costs
from oats_vision.compression.methods import LinearMethod
from oats_vision.compression.settings import CompressionSettings
from oats_vision.core.budget import Budget
from oats_vision.core.grid import Grid
from oats_vision.errors import ConfigError

log = logging.getLogger(__name__)

# all weights are kept: positions and U V, in place of bits, lose more than they save at every total (docs/results.md)
FORMATS = tuple(
    Grid(bits, group_size, normal=bits <= 4)
    for bits, group_size in ((2, 128), (2, 64), (3, 128), (3, 64), (4, 128), (4, 64), (5, 128), (6, 128), (8, 128))
)

# exponent of the level of a linear's costs: how far gradients are believed that one linear matters more than another.
# On text they tell too much of the calibration's own: SmolLM2 loses less at 0.5 than at 1 by 3.5 bits and more, and no
# more by 2.5. On pictures it makes no difference (docs/results.md)
TRUST: dict[str, float] = {"pictures": 1.0, "sequences": 0.5}


def budget(format: Grid, out_features: int, in_features: int) -> Budget:
    """Of one weight in a format."""
    return Budget(0, out_features * in_features, grid=format)


@dataclass(frozen=True)
class Offer:
    """A linear in one format: bytes that are stored, and what it costs the model's output.

    format: None where nothing is known of the linear, which stays as it was planned.
    """

    format: Grid | None
    bytes: int
    cost: float

    @classmethod
    def of(cls, format: Grid, in_features: int, parts: Sequence[PartBudget], cost: float) -> "Offer":
        """Of a linear all of whose parts have a format."""
        return cls(format, stored_bytes(in_features, in_format(format, in_features, parts)), cost)


def in_format(format: Grid, in_features: int, parts: Sequence[PartBudget]) -> list[PartBudget]:
    """Parts with their budgets in a format."""
    return [replace(part, budget=budget(format, part.out_features, in_features)) for part in parts]


def stored_bytes(in_features: int, parts: Sequence[PartBudget]) -> int:
    """Of a linear with a format, in which nothing but the bias is floating."""
    return planned(in_features, False, parts).stored_bytes(itemsize=0)


def check_bits(bits: float, parts: dict[str, dict[str, list[PartBudget]]], widths: dict[str, dict[str, int]]) -> None:
    """See that a model can have so few bits a weight.

    Args:
        parts: by block and linear. widths: in_features of each linear.

    Raises:
        ConfigError: its smallest formats have more.
    """
    least = weights = 0
    for block, linears in parts.items():
        for name, of_linear in linears.items():
            width = widths[block][name]
            least += min(Offer.of(one, width, of_linear, 0.0).bytes for one in FORMATS)
            weights += width * sum(part.out_features for part in of_linear)
    if least > int(bits * weights / 8):
        raise ConfigError(
            f"`bits` must be at least {math.ceil(800 * least / weights) / 100:g} for this model, got {bits:g}"
        )


def choose(offers: Sequence[Sequence[Offer]], total: int) -> list[Offer]:
    """One offer for each linear, so that the costs' sum is least, or nearly: whole steps down each lower hull.

    Args:
        total: bytes of all.

    Raises:
        ConfigError: even the smallest take more.
    """
    points: list[dict[Point, Offer]] = [
        {(offer.bytes, offer.cost): offer for offer in reversed(of_one)} for of_one in offers
    ]
    hulls = [[of_one[point] for point in lower_hull(list(of_one))] for of_one in points]
    chosen = [0] * len(hulls)
    left = total - sum(hull[0].bytes for hull in hulls)
    if left < 0:
        raise ConfigError(f"the smallest formats take {total - left:,} bytes, and `bits` leaves {total:,}: give more")
    steps = sorted(
        ((b.cost - a.cost) / (b.bytes - a.bytes), i, k + 1)
        for i, hull in enumerate(hulls)
        for k, (a, b) in enumerate(pairwise(hull))
    )
    for _, i, k in steps:  # those first that save most by the byte; one that does not fit ends its linear's way
        more = hulls[i][k].bytes - hulls[i][k - 1].bytes
        if chosen[i] == k - 1 and more <= left:
            chosen[i], left = k, left - more
    return [hull[k] for hull, k in zip(hulls, chosen, strict=True)]


def offered(weight: Weight, method: LinearMethod, settings: CompressionSettings) -> dict[Grid, float]:
    """What each format costs."""
    return dict(zip(FORMATS, costs(weight, method, settings, [partial(budget, one) for one in FORMATS]), strict=True))


def believed(costs: Sequence[float], weights: int, trust: float) -> list[float]:
    """A linear's costs by format, with their level, the geometric mean, brought nearer to that of all others.

    Args:
        weights: of the linear, by which levels compare. trust: 1 leaves costs as they are, at 0 all levels are one.
    """
    if not costs or min(costs) <= 0:
        return list(costs)
    level = math.exp(sum(math.log(cost / weights) for cost in costs) / len(costs))
    return [cost * level ** (trust - 1) for cost in costs]


def in_formats(
    uniform: dict[str, dict[str, list[PartBudget]]],
    widths: dict[str, dict[str, int]],
    bits: float,
    found: Sequence[dict[Grid, float] | None],
    trust: float,
) -> dict[str, dict[str, list[PartBudget]]]:
    """The budgets of all parts, by block and linear; those of a linear are in one format.

    Args:
        uniform: what they would be without a choice. widths: in_features of each linear.
        bits: a weight, in all. found: what each format costs, of each part in order; None where that is not known.
        trust: of what tells linears apart, see `believed`.

    Raises:
        ConfigError: there are not bits enough.
    """
    of_parts = iter(found)
    offers: list[list[Offer]] = []
    names = [(block, name) for block, linears in uniform.items() for name in linears]
    sizes = {
        (block, name): widths[block][name] * sum(part.out_features for part in uniform[block][name])
        for block, name in names
    }
    for block, name in names:
        width, parts = widths[block][name], uniform[block][name]
        known = [next(of_parts) for _ in parts]
        shared = [one for one in FORMATS if all(of_part and one in of_part for of_part in known)]
        costs = [sum(of_part[one] for of_part in known if of_part) for one in shared]
        costs = believed(costs, sizes[block, name], trust)
        offers.append([Offer.of(one, width, parts, cost) for one, cost in zip(shared, costs, strict=True)])
        if not shared:
            offers[-1] = [Offer(None, stored_bytes(width, parts), 0.0)]
    chosen = choose(offers, int(bits * sum(sizes.values()) / 8))
    shared_out: dict[str, dict[str, list[PartBudget]]] = {block: {} for block in uniform}
    for (block, name), offer in zip(names, chosen, strict=True):
        parts = uniform[block][name]
        shared_out[block][name] = in_format(offer.format, widths[block][name], parts) if offer.format else parts
    for one in FORMATS:
        log.info("bits %g: %d of %d linears in %s", bits, sum(o.format == one for o in chosen), len(chosen), one)
    return shared_out
