import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, chi2

from oats_vision.evaluation.paired import paired_difference


def _pair(n: int, lost: int, won: int) -> tuple[torch.Tensor, torch.Tensor]:
    dense, ours = torch.ones(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    ours[:lost] = False
    dense[lost : lost + won] = False
    return dense, ours


@pytest.mark.parametrize(("n", "lost", "won"), [(1000, 40, 25), (300, 3, 30), (50_000, 900, 700)])
@pytest.mark.slow
def test_interval_is_scipys_paired_bootstrap(n, lost, won):
    dense, ours = _pair(n, lost, won)
    difference = paired_difference(dense, ours)
    values = (ours.numpy().astype(float), dense.numpy().astype(float))
    reference = bootstrap(
        values,
        lambda a, b, axis: 100 * (a.mean(axis) - b.mean(axis)),
        paired=True,
        method="percentile",
        n_resamples=4000,
        batch=100,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = reference.high - reference.low
    assert difference.points == pytest.approx(100 * (won - lost) / n)
    assert difference.low == pytest.approx(reference.low, abs=0.1 * width)  # two random draws of resamples
    assert difference.high == pytest.approx(reference.high, abs=0.1 * width)


def test_p_value_is_mcnemars():
    difference = paired_difference(*_pair(50_000, 900, 700))
    statistic = (abs(900 - 700) - 1) ** 2 / (900 + 700)  # chi-square form, with continuity correction
    assert difference.p_value == pytest.approx(chi2.sf(statistic, 1), rel=0.05)
    assert paired_difference(*_pair(100, 0, 0)).p_value == 1.0


def test_equal_predictions_have_no_difference_and_others_are_refused():
    difference = paired_difference(*_pair(100, 0, 0))
    assert str(difference) == "+0.00 points [+0.00, +0.00]"
    with pytest.raises(ValueError, match="the same pictures"):
        paired_difference(torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool))
