import copy
import math

import pytest
import torch
from torch import nn

import oats_vision as ov
from oats_vision.compression.settings import resolve
from oats_vision.compression.sharing import fitted
from oats_vision.core.budget import Allocation, Pattern
from oats_vision.errors import ConfigError

QUICK = {"rate": 0.5, "iterations": 3, "quality": "fast"}
SHAPES = [(48, 48), (192, 48), (48, 192), (30, 7)]


def rates(report):
    """Of each part of each layer."""
    return [
        1 - (part.nonzeros + part.rank * (part.out_features + width)) / (part.out_features * width)
        for layer in report.layers
        for width in [layer.spec.in_features]
        for part in layer.spec.parts
    ]


@pytest.mark.parametrize("budget", ["measured", "owl", "alphapruning"])
@pytest.mark.parametrize(
    "options",
    [{"method": "wanda"}, {"method": "magnitude"}, {"method": "dsnot"}, {"method": "svd"}, {"method": "oats"} | QUICK],
    ids=lambda options: options["method"],
)
def test_linears_differ_and_as_much_is_kept_as_by_uniform_budgets(tiny_vit, pictures, options, budget):
    uniform = ov.compress(copy.deepcopy(tiny_vit), pictures, **options).report
    report = ov.compress(tiny_vit, pictures, budget=budget, **options).report
    step = max(part.out_features + layer.spec.in_features for layer in report.layers for part in layer.spec.parts)
    assert uniform.parameters - step < report.parameters <= uniform.parameters
    assert max(rates(report)) - min(rates(report)) > 0.1 > max(rates(uniform)) - min(rates(uniform))
    assert "budgets" in report.seconds
    assert tiny_vit(pictures[0]).isfinite().all()


@pytest.mark.parametrize("pattern", ["row", "layer"])
@pytest.mark.parametrize("ratio", [0.0, 0.2, 1.0])
def test_whole_ranks_and_non_zeros_come_to_the_total_but_for_one_step(pattern, ratio):
    generator = torch.Generator().manual_seed(0)
    allocation, shapes = Allocation(0.5, ratio, Pattern(pattern)), SHAPES[:3] if ratio == 0.2 else SHAPES
    for _ in range(20):
        shares = (0.3 + 0.5 * torch.rand(len(shapes), generator=generator)).tolist()
        wanted = [share * m * n for share, (m, n) in zip(shares, shapes, strict=True)]
        total = math.floor(sum(wanted))
        budgets = fitted(shapes, [1] * len(shapes), wanted, allocation, total)
        kept = sum(budget.parameters(m, n) for budget, (m, n) in zip(budgets, shapes, strict=True))
        step = max(m + n if ratio == 1 else m if pattern == "row" else 1 for m, n in shapes)
        assert total - step < kept <= total
        assert all(budget.nonzeros % m == 0 for budget, (m, _) in zip(budgets, shapes, strict=True) if pattern == "row")
        for budget, (m, n), want in zip(budgets, shapes, wanted, strict=True):
            assert abs(budget.parameters(m, n) - want) < 2 * (m + n)


def test_a_part_keeps_a_rank_and_some_non_zeros_whatever_it_is_given():
    wanted = [0.0, 5000.0, 5000.0]
    for allocation in (Allocation(0.5, 0.2), Allocation(0.5, 0.0, Pattern("layer")), Allocation(0.5, 1.0)):
        budgets = fitted(SHAPES[:3], [1, 1, 1], wanted, allocation, 10000)
        assert all(bool(budget.rank) == (allocation.rank_ratio > 0) for budget in budgets)
        assert all(bool(budget.nonzeros) == (allocation.rank_ratio < 1) for budget in budgets)
        assert sum(budget.parameters(m, n) for budget, (m, n) in zip(budgets, SHAPES, strict=False)) <= 10000


def test_the_parts_of_one_linear_get_one_rank():
    shapes, wanted = [(48, 48)] * 3, [600.0, 1200.0, 1800.0]
    budgets = fitted(shapes, [3], wanted, Allocation(0.5, 0.3), 3600)
    kept = [budget.parameters(48, 48) for budget in budgets]
    assert len({budget.rank for budget in budgets}) == 1
    assert all(abs(one - other) <= 3 * 48 for one, other in zip(kept, wanted, strict=True))
    assert 3600 - 48 < sum(kept) <= 3600


def test_a_linear_that_does_little_for_the_output_loses_more(tiny_vit, pictures):
    """Its errors are multiplied by almost nothing, as LayerScale may do."""
    nn.init.normal_(tiny_vit.blocks[1].mlp.fc2.weight, std=1e-4)
    with torch.no_grad():
        tiny_vit.blocks[0].attn.proj.weight *= 20
    report = ov.compress(tiny_vit, pictures, budget="measured", **QUICK).report
    by_name = {layer.name: 1 - layer.spec.parameters / layer.spec.dense_parameters for layer in report.layers}
    assert by_name["blocks.0.attn.proj"] < 0.5 < 0.6 < by_name["blocks.1.mlp.fc2"]


def test_the_same_run_gives_the_same_budgets(tiny_vit, pictures):
    reports = [
        ov.compress(copy.deepcopy(tiny_vit), pictures, budget="measured", **QUICK).report.layers for _ in range(2)
    ]
    assert [layer.spec for layer in reports[0]] == [layer.spec for layer in reports[1]]


def test_progress_says_that_the_budget_is_shared_out(tiny_vit, pictures):
    steps = []
    ov.compress(tiny_vit, pictures, budget="measured", progress=steps.append, **QUICK)
    shared = [step for step in steps if step.activity == "sharing out the budget"]
    assert shared[-1].detail == "100%"
    assert all(step.done == 0 for step in shared)
    assert [step.done for step in steps] == sorted(step.done for step in steps)


@pytest.mark.parametrize("budget", ["measured", "owl"])
def test_linears_may_share_their_inputs_in_some_batches_only(tiny_vit, pictures, budget):
    """Statistics are then gathered in two rounds; the second block reads what the second round gave."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2, self.first = nn.Linear(48, 48), nn.Linear(48, 48), None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen = float(x.detach().sum())
            self.first = self.first or seen
            return self.fc1(x) + self.fc2(x if seen == self.first else 2 * x)

    assert len(pictures) > 1
    tiny_vit.blocks[0].mlp = Sometimes()
    report = ov.compress(tiny_vit, pictures, budget=budget, **QUICK).report
    assert max(rates(report)) - min(rates(report)) > 0.01


def test_a_checkpoint_keeps_the_budgets(tiny_vit, pictures, tmp_path):
    fresh = copy.deepcopy(tiny_vit)
    report = ov.compress(tiny_vit, pictures, budget="measured", **QUICK).report
    assert "measured budgets" in report.settings.summary
    ov.save(tiny_vit, tmp_path / "out")
    loaded = ov.load(tmp_path / "out", model=fresh)
    assert torch.equal(loaded(pictures[0]), tiny_vit(pictures[0]))
    assert loaded.oats_vision.report.settings.budget == "measured"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "measure"}, "budget must be uniform, measured, owl or alphapruning, got 'measure'"),
        ({"budget": "owl", "pattern": "2:4"}, "budget must be uniform with pattern 2:4, which fixes every layer"),
        ({"budget": "measured", "method": "slicegpt"}, "budget must be uniform with method slicegpt"),
        ({"budget": "measured", "rank_ratio": "auto"}, "budget must be uniform with rank_ratio auto"),
    ],
)
def test_budgets_that_cannot_be_are_one_clear_line(options, message):
    with pytest.raises(ConfigError, match=message):
        resolve(**options)
