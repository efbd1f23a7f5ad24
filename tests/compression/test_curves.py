"""What a decomposition costs the model's output, by some of a weight's rows."""

from types import SimpleNamespace

import pytest
import torch

from oats_vision.compression.curves import ROWS, Weight, costs
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
    ((_, shape, cost),) = costs(Weight(W, s, None, G), method, resolve(rate=0.5), budgets)
    assert seen == [min(rows, ROWS)]
    assert shape == (min(rows, ROWS), 16)
    expected = (s * ((0.3 * W.double() @ G) * (0.3 * W.double())).sum(1)).sum()
    assert cost == pytest.approx(float(expected), rel=1e-3)


def test_a_weight_that_does_not_matter_costs_nothing():
    W = torch.randn(4 * ROWS, 16)
    method = SimpleNamespace(decompose_roughly=lambda weight, *given: SimpleNamespace(dense=lambda: 0.7 * weight))
    budgets = [Allocation.of(0.5, 0.2).budget]
    nothing = Weight(W, torch.zeros(4 * ROWS).double(), None, torch.eye(16).double())
    ((_, _, cost),) = costs(nothing, method, resolve(rate=0.5), budgets)
    assert cost == 0
