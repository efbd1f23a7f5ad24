import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oats_vision.core.budget import Allocation, Pattern


@pytest.mark.parametrize(
    ("shape", "rate", "rank_ratio", "rank", "nonzeros_per_row"),
    [
        # r = floor(kappa (1 - rho) m n / (m + n)) and k / m = (1 - kappa)(1 - rho) n, by hand
        ((768, 768), 0.5, 0.2, 38, 307),
        ((3072, 768), 0.5, 0.25, 76, 288),
        ((1536, 384), 0.3, 0.2, 43, 215),
        ((1000, 1000), 0.5, 0.2, 50, 400),  # 0.8 * 0.5 * 1000 rounds to 400.00000000000006 or 399.9...
    ],
)
def test_row_budget_is_the_papers(shape, rate, rank_ratio, rank, nonzeros_per_row):
    budget = Allocation.of(rate, rank_ratio).budget(*shape)
    assert budget.rank == rank
    assert budget.nonzeros == nonzeros_per_row * shape[0]


@given(
    m=st.integers(16, 300),
    n=st.integers(16, 300),
    rate=st.floats(0.05, 0.8),
    rank_ratio=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    pattern=st.sampled_from(["row", "layer"]),
)
def test_kept_parameters_never_exceed_the_rate_and_come_close(m, n, rate, rank_ratio, pattern):
    try:
        budget = Allocation.of(rate, rank_ratio, Pattern.parse(pattern)).budget(m, n)
    except ValueError:
        return  # a small layer with no room for one rank: its own test below
    kept = (1 - rate) * m * n
    assert budget.parameters(m, n) <= kept + 1e-6
    lost_to_rounding = (m + n) + m  # less than one rank and one entry a row
    assert budget.parameters(m, n) > kept - lost_to_rounding


def test_n_m_budget_counts_the_short_last_group():
    budget = Allocation.of(None, 0.2, Pattern.parse("2:4")).budget(20, 18)
    assert budget.nonzeros == 20 * (4 * 2 + 2)


def test_n_m_ties_rate_to_rank_ratio():
    pattern = Pattern.parse("2:4")
    known = Allocation.of(None, 0.2, pattern)
    assert known.rate == pytest.approx(1 - 0.5 / 0.8)
    assert Allocation.of(known.rate, None, pattern).rank_ratio == pytest.approx(known.rank_ratio)
    with pytest.raises(ValueError, match=r"rank_ratio must be 0\.3"):
        Allocation.of(1 - 0.5 / 0.7, 0.1, pattern)
    with pytest.raises(ValueError, match=r"rate must be at most 0\.5"):
        Allocation.of(0.7, None, pattern)


@pytest.mark.parametrize("rate", [0.0, 1.0, 1.5, -0.1, math.nan])
def test_rate_outside_is_an_error(rate):
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\), got"):
        Allocation.of(rate, 0.2).budget(64, 64)


@pytest.mark.parametrize("rank_ratio", [-0.1, 1.1, math.nan])
def test_rank_ratio_outside_is_an_error(rank_ratio):
    with pytest.raises(ValueError, match=r"rank_ratio must be in \[0, 1\], got"):
        Allocation.of(0.5, rank_ratio).budget(64, 64)


def test_rank_ratio_that_leaves_nothing_is_an_error_but_0_and_1_are_not():
    with pytest.raises(ValueError, match="leaves rank 0"):
        Allocation.of(0.5, 0.01).budget(64, 64)
    with pytest.raises(ValueError, match="leaves no non-zeros"):
        Allocation.of(0.5, 0.99).budget(64, 64)
    assert Allocation.of(0.5, 0.0).budget(64, 64).rank == 0
    assert Allocation.of(0.5, 1.0).budget(64, 64).nonzeros == 0


@pytest.mark.parametrize("text", ["", "4:2", "4:4", "0:4", "rows", "2:4:8"])
def test_unknown_pattern_is_an_error(text):
    with pytest.raises(ValueError, match="pattern must be"):
        Pattern.parse(text)
