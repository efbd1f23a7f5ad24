"""What a decomposition costs the model's output, by some of a weight's rows."""

from types import SimpleNamespace

import pytest
import torch

from oats_vision.compression.curves import ROWS, Weight, costs, error_curve
from oats_vision.compression.settings import resolve
from oats_vision.core.budget import Allocation


@pytest.mark.parametrize("rows", [ROWS // 2, 4 * ROWS])
def test_rows_that_are_left_out_count_by_what_they_would_cost(rows):
    """Where each row loses the same share, some rows tell the cost of all, however unevenly these matter."""
    torch.manual_seed(0)
    W = torch.randn(rows, 16) * torch.logspace(-2, 2, rows)[:, None]
    G, s = torch.rand(16).double().diag(), torch.rand(rows).double().pow(-3)
    seen = []

    def decompose_roughly(weight, own, budget, settings):
        seen.append(len(weight))
        return SimpleNamespace(dense=lambda: 0.7 * weight)

    method = SimpleNamespace(decompose_roughly=decompose_roughly)
    budgets = [Allocation.of(0.5, 0.2).budget]
    (cost,) = costs(Weight(W, s, None, G), method, resolve(rate=0.5), budgets)
    assert seen == [min(rows, ROWS)]
    expected = (s * ((0.3 * W.double() @ G) * (0.3 * W.double())).sum(1)).sum()
    assert cost == pytest.approx(float(expected), rel=1e-3)


def test_a_weight_that_does_not_matter_costs_nothing():
    W = torch.randn(4 * ROWS, 16)
    method = SimpleNamespace(decompose_roughly=lambda weight, *given: SimpleNamespace(dense=lambda: 0.7 * weight))
    budgets = [Allocation.of(0.5, 0.2).budget]
    nothing = Weight(W, torch.zeros(4 * ROWS).double(), None, torch.eye(16).double())
    (cost,) = costs(nothing, method, resolve(rate=0.5), budgets)
    assert cost == 0


@pytest.mark.parametrize("pattern", ["row", "layer"])
@pytest.mark.parametrize(("rate", "rank_ratio"), [(0.5, 0.0125), (0.93, 0.1), (0.5, 0.2), (0.5, 1.0), (0.5, 0.0)])
def test_a_curve_has_what_the_whole_weight_keeps_at_the_global_rate(rate, rank_ratio, pattern):
    """However small the rank of the rows that are looked at is: the whole weight has one."""
    torch.manual_seed(0)
    W, settings = torch.randn(4 * ROWS, 192), resolve(rate=rate, rank_ratio=rank_ratio, pattern=pattern)
    ranks = []

    def decompose_roughly(weight, own, budget, settings):
        ranks.append(budget.rank)
        assert 0 < budget.parameters(*weight.shape) <= (1 - rate) * 1.5 * weight.numel() + sum(weight.shape)
        return SimpleNamespace(dense=lambda: 0.7 * weight)

    method = SimpleNamespace(decompose_roughly=decompose_roughly)
    curve = error_curve(Weight(W, torch.ones(len(W)).double(), None, torch.eye(192).double()), method, settings)
    assert settings.allocation.budget(*W.shape).parameters(*W.shape) in [kept for kept, _ in curve]
    assert all((rank > 0) == (rank_ratio > 0) for rank in ranks)
