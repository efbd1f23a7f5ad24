"""The choice of the next trial of a search: pure, in whole steps, of which higher ones are smaller models.

A trial at a step has a drop; the search is for the largest step whose drop stays below a limit. The drop grows with
the step, but for noise, and about exponentially: so the curve is interpolated in its logarithm.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LOWEST, HIGHEST = 5, 95  # steps
MOST = 8  # trials
ENOUGH, CLOSE = 6, 2  # after so many trials a bracket that is so wide will do
SLOPE = 0.1  # of the drop's logarithm over a step, before two trials have shown it: what models of all kinds have
LEAST, FARTHEST = 4, 25  # steps to go at once while one end of the bracket is open
TINY = 1e-3  # points: a drop below it says no more than that there is none


class Trial(NamedTuple):
    """A step that was tried, and the drop that is judged there: the upper end of its interval. It may be infinite."""

    step: int
    drop: float


@dataclass(frozen=True)
class Bracket:
    """The largest step that stays below the limit, and the least one above it that does not; ends may be open.

    An open end is a step that is out of range, and has no drop.
    """

    low: int
    high: int
    low_drop: float | None = None
    high_drop: float | None = None

    @classmethod
    def of(cls, trials: Sequence[Trial], limit: float, lowest: int, highest: int) -> "Bracket":
        below = max((one for one in trials if one.drop < limit), default=None)
        low = below.step if below else lowest - 1
        above = min((one for one in trials if one.drop >= limit and one.step > low), default=None)
        high = above.step if above else highest + 1
        return cls(low, high, below and below.drop, above and above.drop)

    @property
    def width(self) -> int:
        return self.high - self.low

    @property
    def closed(self) -> bool:
        return self.low_drop is not None and self.high_drop is not None


def next_step(
    trials: Sequence[Trial], limit: float, *, first: int = 50, lowest: int = LOWEST, highest: int = HIGHEST
) -> int | None:
    """The step to try next; None if the search is at its end.

    It ends where the bracket is a step wide, or two after some trials, and after `MOST` of them in any case. So what is
    found, `Bracket.of(...).low`, was tried itself and stayed below the limit, whatever the curve looks like.

    Args:
        trials: in the order in which they were made.
        limit: that the drop is to stay below, above 0.
        first: step to begin with. lowest, highest: that are possible.

    >>> next_step([], 0.5), next_step([Trial(50, 0.1)], 0.5), next_step([Trial(50, 0.1), Trial(68, 0.9)], 0.5)
    (50, 68, 63)
    """
    now = Bracket.of(trials, limit, lowest, highest)
    width = CLOSE if len(trials) >= ENOUGH and now.closed else 1
    if now.width <= width or len(trials) >= MOST:
        return None
    if not trials:
        return min(max(first, lowest), highest)
    if not now.closed:
        return _outwards(now, limit, len(trials) + 1 >= MOST // 2)
    before = [Bracket.of(trials[:count], limit, lowest, highest).width for count in (-1, -2)[: len(trials) - 1]]
    if len(before) == 2 and 2 * now.width > before[1]:  # interpolation has not halved it in two trials
        return now.low + now.width // 2
    return _inwards(now, limit)


def _outwards(now: Bracket, limit: float, at_the_end: bool) -> int:
    """A step beyond where the limit is expected, so that the bracket closes; at last the end of the range itself."""
    known = now.low if now.low_drop is not None else now.high
    drop = now.low_drop if now.low_drop is not None else now.high_drop
    upwards = known == now.low
    if at_the_end:
        return now.high - 1 if upwards else now.low + 1
    distance = abs(_log(limit) - _log(drop)) / SLOPE + 2
    steps = round(min(max(distance, LEAST), FARTHEST))
    return min(known + steps, now.high - 1) if upwards else max(known - steps, now.low + 1)


def _inwards(now: Bracket, limit: float) -> int:
    """The step on the side of the crossing where the bracket is wider, so that both ends come close to it."""
    low, high = _log(now.low_drop), _log(now.high_drop)
    share = (_log(limit) - low) / (high - low) if low < high < math.inf else 0.5
    crossing = now.low + share * now.width
    below = math.floor(crossing)
    step = below if crossing - now.low > now.high - crossing else below + 1
    return min(max(step, now.low + 1), now.high - 1)


def _log(drop: float | None) -> float:
    return math.log(max(drop or 0.0, TINY))
