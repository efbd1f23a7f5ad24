"""The choice of the next rate: on any curve it ends, with a rate that was tried; on a smooth one it finds the limit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oats_vision.runs.bracket import HIGHEST, LOWEST, MOST, Bracket, Trial, next_step

LIMIT = 0.5


def searched(drop, **options) -> list[Trial]:
    """All trials of a search on a curve."""
    trials: list[Trial] = []
    while (step := next_step(trials, LIMIT, **options)) is not None:
        assert LOWEST <= step <= HIGHEST
        assert step not in [one.step for one in trials]
        trials.append(Trial(step, drop(step)))
    return trials


def found(trials) -> Bracket:
    return Bracket.of(trials, LIMIT, LOWEST, HIGHEST)


@given(slope=st.floats(0.02, 0.4), crossing=st.integers(LOWEST, HIGHEST), share=st.floats(0.01, 0.99))
def test_on_a_smooth_curve_the_limit_is_found_to_a_step_or_two(slope, crossing, share):
    trials = searched(lambda step: LIMIT * math.exp(slope * (step - crossing - share)))
    bracket = found(trials)
    assert bracket.low <= crossing < bracket.high
    assert bracket.width == 1 or (bracket.width == 2 and len(trials) >= 6)


def test_a_smooth_curve_takes_five_trials_on_average():
    counts = [
        len(searched(lambda step, slope=slope, crossing=crossing: LIMIT * math.exp(slope * (step - crossing - 0.5))))
        for slope in (0.05, 0.08, 0.12, 0.16)
        for crossing in range(LOWEST, HIGHEST)
    ]
    assert sum(counts) / len(counts) < 5


@given(st.lists(st.floats(-1, 20), min_size=HIGHEST + 1, max_size=HIGHEST + 1), st.integers(1, 99))
def test_on_any_curve_it_ends_with_the_highest_rate_that_was_tried_and_stays_below(curve, first):
    trials = searched(curve.__getitem__, first=first)
    assert 1 <= len(trials) <= MOST
    below = [one.step for one in trials if one.drop < LIMIT]
    assert found(trials).low == max(below, default=LOWEST - 1)


@given(
    crossing=st.integers(LOWEST, HIGHEST),
    noise=st.lists(st.floats(0.8, 1.25), min_size=HIGHEST + 1, max_size=HIGHEST + 1),
)
def test_noise_moves_what_is_found_no_farther_than_it_moves_the_curve(crossing, noise):
    bracket = found(searched(lambda step: LIMIT * math.exp(0.1 * (step - crossing)) * noise[step]))
    # a quarter up or down is 2.3 steps of this slope
    if bracket.closed:
        assert bracket.low < crossing + 3
        assert bracket.high > crossing - 3
        assert bracket.width <= 7


@given(st.integers(LOWEST, HIGHEST), st.integers(0, 40))
def test_a_limit_beyond_the_range_is_looked_for_at_its_end(lowest, more):
    highest = min(lowest + more, HIGHEST)
    low = searched(lambda step: 9.0, lowest=lowest, highest=highest)
    assert low[-1].step == lowest
    high = searched(lambda step: 0.0, lowest=lowest, highest=highest)
    assert high[-1].step == highest
    assert max(len(low), len(high)) <= MOST


@pytest.mark.parametrize("done", range(1, 6))
def test_a_search_goes_on_as_it_would_have(done):
    whole = searched(lambda step: 0.01 * math.exp(0.09 * step))
    assert next_step(whole[:done], LIMIT) == (whole[done].step if done < len(whole) else None)
