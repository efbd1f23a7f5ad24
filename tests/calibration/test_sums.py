import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oats_vision.calibration.statistics import CrossMoment, Gram, MeanAndVariance, MedianMagnitude, SecondMoment
from oats_vision.calibration.sums import CHUNK, Sum, _added


def _terms(seed: int, count: int, width: int = 64) -> torch.Tensor:
    """float32 of very different sizes, which cancel here and there."""
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(count, width, generator=generator) * 10 ** (
        12 * torch.rand(count, width, generator=generator) - 6
    )
    terms[-1, ::3] = -terms[:-1, ::3].sum(0)
    return terms


def _total(terms: torch.Tensor) -> Sum:
    found = Sum(terms.shape[1])
    for term in terms:
        found.add(term)
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 8))
def test_neither_the_order_nor_who_adds_changes_a_bit(seed, count, ranks):
    terms = _terms(seed, count)
    expected = _total(terms).value()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(_total(terms[order]).value(), expected)
    shares = [_total(terms[order[rank::ranks]]) for rank in range(ranks)]
    together = _added([torch.stack([one.high for one in shares]), torch.stack([one.low for one in shares])])
    assert torch.equal(together, expected)


def test_a_plain_sum_of_the_same_terms_would_change():
    terms = _terms(0, 40)
    assert not torch.equal(terms.double().sum(0), sum(terms.flip(0).double()))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_sum_is_exact_to_40_bits(seed):
    terms = _terms(seed, 30, width=6)
    for value, column in zip(_total(terms).value().tolist(), terms.T.tolist(), strict=True):
        exact = sum(map(Fraction, column))
        assert abs(Fraction(value) - exact) <= abs(exact) * Fraction(1, 2**40)


def test_what_is_not_finite_stays_so():
    total = _total(torch.tensor([[1e300, math.inf, 1.0], [1e300, 1.0, math.nan]], dtype=torch.float64))
    assert total.value()[0].item() == pytest.approx(2e300, rel=1e-11)
    assert total.value()[1].isinf()
    assert total.value()[2].isnan()


def test_sums_larger_than_a_chunk():
    terms = _terms(1, 3, width=2 * CHUNK + 5)
    torch.testing.assert_close(_total(terms).value(), terms.double().sum(0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [SecondMoment, MeanAndVariance, MedianMagnitude, Gram])
def test_statistics_do_not_depend_on_the_order_of_batches(kind):
    batches = _terms(2, 60, width=12).split(7)
    first, second = kind(12), kind(12)
    for batch in batches:
        first.update(batch)
    for batch in reversed(batches):
        second.update(batch)
    assert torch.equal(first.compute(), second.compute())


def test_cross_moments_do_not_depend_on_the_order_of_batches():
    pairs = list(zip(_terms(3, 60, width=5).split(7), _terms(4, 60, width=12).split(7), strict=True))
    first, second = CrossMoment(5, 12), CrossMoment(5, 12)
    for y, x in pairs:
        first.update(y, x)
    for y, x in reversed(pairs):
        second.update(y, x)
    assert torch.equal(first.compute(), second.compute())
