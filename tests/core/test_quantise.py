"""Rounding against float64 restatements, one weight at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oats_vision.compression.methods.sparsegpt import sparsegpt
from oats_vision.core.budget import Budget
from oats_vision.core.grid import LEVELS, Grid
from oats_vision.core.oats import column_scale, oats
from oats_vision.core.quantise import find_scales, gptq, nearest, quantised
from oats_vision.core.refit import refit

OUT, IN = 6, 48


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the second moments of correlated inputs."""
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((IN, IN)) * np.exp(0.5 * generator.standard_normal(IN))
    inputs = generator.standard_normal((500, IN)) @ mixing
    return generator.standard_normal((OUT, IN)), inputs.T @ inputs / 500


def _levels(scale: float, zero: int, grid: Grid) -> np.ndarray:
    return scale * (np.array(LEVELS[grid.bits]) if grid.normal else np.arange(2**grid.bits) - zero)


def _round(w: float, levels: np.ndarray) -> float:
    return float(levels[np.abs(levels - w).argmin()])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    values=st.sampled_from([*(f"int{bits}" for bits in (2, 3, 4, 5, 6, 8)), "nf2", "nf3", "nf4"]),
    group=st.sampled_from([0, 16, 32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_value_goes_to_the_nearest_level_of_its_group(rows, columns, values, group, symmetric, seed):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grid = Grid.parse(values, group, symmetric or values.startswith("nf"))
    found = nearest(W, grid)
    scale, zero = found.scales.scale.double(), found.scales.zero
    assert torch.equal(found.scales.rounded(W), found.scales.values(found.codes, W.dtype))
    assert scale.shape == (rows, grid.groups(columns))
    for i in range(rows):
        for j in range(columns):
            g = j // (group or columns)
            levels = _levels(float(scale[i, g]), grid.levels // 2 if zero is None else int(zero[i, g]), grid)
            assert float(found.dense()[i, j]) == pytest.approx(_round(float(W[i, j]), levels), abs=1e-6)
            # the range holds all values, but for what the short end, the scale and the zero lose by being rounded
            assert abs(float(found.dense()[i, j]) - float(W[i, j])) <= 1.6 * np.abs(np.diff(levels)).max() + 1e-9


def test_the_largest_value_is_a_level_and_zeros_stay_zero():
    W = torch.tensor([[4.0, -1.0, 0.0, 0.5], [-4.0, 1.0, 0.0, -0.5], [0.0, 0.0, 0.0, 0.0]])
    dense = nearest(W, Grid(3, 0)).dense()
    torch.testing.assert_close(dense, torch.tensor([[4.0, -1, 0, 0], [-4, 1, 0, 0], [0, 0, 0, 0]]))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e17])
def test_weights_of_any_size_are_rounded_alike(size):
    W = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for grid in (Grid(4, 16), Grid(4, 16, symmetric=False), Grid(4, 16, normal=True)):
        error = (nearest(W * size, grid).dense() / size - W).norm() / W.norm()
        assert float(error) < 0.12


@pytest.mark.parametrize("grid", [Grid(4, 0), Grid(4, 0, symmetric=False), *(Grid(b, 0, normal=True) for b in LEVELS)])
def test_values_beyond_all_levels_go_to_the_last_and_halves_to_the_nearer(grid):
    unit = nearest(torch.tensor([[-1.0, 1.0]]), grid).scales
    levels = unit.values(torch.arange(grid.levels, dtype=torch.uint8)[None])[0].sort().values
    far = torch.tensor([[-torch.inf, -1e30, 1e30, torch.inf]])
    assert unit.rounded(far)[0].tolist() == [float(levels[0])] * 2 + [float(levels[-1])] * 2
    assert unit.rounded(torch.tensor([[torch.nan]])).shape == (1, 1)  # whatever it is, nothing breaks
    middles, step = (levels[1:] + levels[:-1]) / 2, 1e-4 * (levels[-1] - levels[0])
    torch.testing.assert_close(unit.rounded((middles - step)[None])[0], levels[:-1])
    torch.testing.assert_close(unit.rounded((middles + step)[None])[0], levels[1:])


@pytest.mark.parametrize("grid", [Grid(3, 16), Grid(3, 16, symmetric=False), Grid(3, 16, normal=True)], ids=str)
def test_ranges_are_the_same_however_many_are_tried_at_once(problem, grid, monkeypatch):
    W, H = torch.from_numpy(problem[0]), torch.from_numpy(problem[1]).diagonal()
    found = []
    for values in (1, 5 * W.numel(), 1 << 20):
        monkeypatch.setattr("oats_vision.core.quantise.AT_ONCE", {False: values})
        found.append(find_scales(W, grid, H))
    for other in found[1:]:
        assert torch.equal(other.scale, found[0].scale)
        assert other.zero is None or torch.equal(other.zero, found[0].zero)


def test_the_range_that_is_found_is_the_best_of_those_tried(problem):
    W, H = torch.from_numpy(problem[0]), torch.from_numpy(problem[1]).diagonal()
    for grid in (Grid(3, 16), Grid(2, 0), Grid(3, 16, symmetric=False), Grid(3, 16, normal=True)):

        def lost(scales, grid=grid):
            return grid.by_group((scales.values(scales.codes(W), W.dtype) - W).square() * H).sum(2)

        best, widest = lost(find_scales(W, grid, H)), lost(find_scales(W, grid))
        assert (best <= widest).all()
        assert best.sum() < 0.9 * widest.sum()


@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "grid", [Grid(4, 16), Grid(3, 0), Grid(3, 32, symmetric=False), Grid(3, 16, normal=True)], ids=str
)
def test_gptq_is_the_papers_algorithm(problem, grid, act_order, support):
    W, H = problem
    kept = np.random.default_rng(1).random(W.shape) < 0.6 if support else np.ones(W.shape, dtype=bool)
    mask = torch.from_numpy(kept) if support else None
    found = gptq(torch.from_numpy(W), torch.from_numpy(H), grid, mask, act_order=act_order)
    order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(IN)
    damped = H + 0.01 * np.diag(np.diag(H))
    expected = np.zeros_like(W)
    for i in range(OUT):
        w = W[i].copy()
        inverse = np.linalg.inv(damped[np.ix_(order, order)])  # of the columns that are left
        for step, j in enumerate(order):
            group = j // (grid.group_size or IN)
            zero = 2 ** (grid.bits - 1) if found.scales.zero is None else int(found.scales.zero[i, group])
            levels = _levels(float(found.scales.scale[i, group]), zero, grid)
            expected[i, j] = _round(w[j], levels) if kept[i, j] else 0.0
            rest = order[step:]
            w[rest] -= (w[j] - expected[i, j]) / inverse[0, 0] * inverse[0]
            inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    np.testing.assert_allclose(found.dense(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", LEVELS)
def test_normal_levels_lose_least_of_normal_values(bits):
    W = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))

    def lost(grid):
        scales = find_scales(W, grid, torch.ones(64))
        return float((scales.values(scales.codes(W)) - W).square().mean().sqrt())

    assert lost(Grid(bits, 64, normal=True)) < 0.95 * lost(Grid(bits, 64))
    levels = LEVELS[bits]
    assert max(map(abs, levels)) == levels[-1] == 127
    assert list(levels) == sorted(levels)


def test_gptq_loses_less_at_the_outputs_than_rounding_to_nearest(problem):
    W, H = map(torch.from_numpy, problem)
    for grid in (Grid(4, 16), Grid(3, 16), Grid(2, 16)):
        lost = [
            (E := found.dense().double() - W, torch.trace(E @ H @ E.T))[1]
            for found in (nearest(W, grid), gptq(W, H, grid), gptq(W, H, grid, act_order=True))
        ]
        assert max(lost[1:]) < 0.7 * lost[0]


def test_features_without_inputs_or_with_enormous_ones_do_no_harm(problem):
    W, H = map(torch.from_numpy, problem)
    scale = torch.ones(IN, dtype=H.dtype)
    scale[3], scale[7], scale[11] = 0.0, 1000.0, 100.0
    H = H * scale * scale[:, None]
    found = gptq(W, H, Grid(4, 16))
    E = found.dense().double() - W
    nearly = nearest(W, Grid(4, 16)).dense().double() - W
    assert found.dense().isfinite().all()
    W[:, 3] = 100.0  # what no input looks at decides no range
    again = gptq(W, H * 1e-12, Grid(4, 16)).dense().double() - W
    assert torch.trace(again @ H @ again.T) < 1.5 * torch.trace(E @ H @ E.T)
    assert torch.trace(E @ H @ E.T) < torch.trace(nearly @ H @ nearly.T)
    with pytest.raises(ValueError, match="not finite"):
        gptq(W, H * torch.inf, Grid(4, 16))


@pytest.mark.parametrize("act_order", [False, True])
def test_weights_that_no_input_looks_at_are_rounded_too(problem, act_order):
    W, H = map(torch.from_numpy, problem)
    nothing = gptq(W, H * 0, Grid(4, 16), act_order=act_order).dense().double()
    assert (nothing - W).norm() < 0.12 * W.norm()
    H[3], H[:, 3] = 0.0, 0.0
    one = gptq(W, H, Grid(4, 16), act_order=act_order).dense().double()
    assert (one[:, 3] - W[:, 3]).norm() < 0.5 * W[:, 3].norm()


def test_sparse_gpt_rounds_in_the_same_pass(problem):
    W, H = map(torch.from_numpy, problem)
    budget, grid = Budget(0, OUT * IN // 2), Grid(4, 16)
    joint = sparsegpt(W, H, replace(budget, grid=grid))
    assert joint.quantised is not None
    torch.testing.assert_close(joint.quantised.dense(), joint.S.float())
    assert int(joint.quantised.kept.sum()) == budget.nonzeros
    apart = sparsegpt(W, H, budget)
    after = nearest(apart.S, grid).dense() * (apart.S != 0)
    E = W - after.double()
    assert joint.output_error < float((torch.trace(E @ H @ E.T) / torch.trace(W @ H @ W.T)).sqrt())


def test_u_and_v_in_8_bits_are_nearest_levels_and_cost_next_to_nothing(problem):
    W, H = map(torch.from_numpy, problem)
    budget = Budget(3, OUT * IN // 2)
    factors = refit(W, oats(W, column_scale(H.diagonal()), budget), H)
    kept = factors.S != 0
    floating = quantised(W, factors, H, Grid(4, 16), kept)
    found = quantised(W, factors, H, Grid(4, 16), kept, int8_factors=True)
    assert floating.low_rank is None
    torch.testing.assert_close(found.S, floating.S)
    for factor, rounded in zip((found.U, found.V), found.low_rank, strict=True):
        assert rounded.scales.grid == Grid(8, 0)
        torch.testing.assert_close(factor, rounded.dense().to(factor))
    assert found.output_error < 1.1 * floating.output_error
    # the U that is best for this V is within a rounding of the U that was found
    R, V = W - found.S.double(), found.V.double()
    best = torch.linalg.solve(V @ H @ V.T, V @ H @ R.T).T
    assert (found.U.double() - best).abs().max() < 0.02 * best.abs().max()


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_the_low_rank_term_makes_up_for_rounding(problem, rank, density):
    W, H = map(torch.from_numpy, problem)
    budget = Budget(rank, OUT * int(density * IN))
    factors = refit(W, oats(W, column_scale(H.diagonal()), budget), H)
    kept = None if density == 1 else factors.S != 0
    found = quantised(W, factors, H, Grid(3, 16), kept)
    assert found.quantised is not None
    torch.testing.assert_close(found.S, found.quantised.dense().to(found.S))
    assert kept is None or not found.S[~kept].any()
    E = W - found.dense().double()
    assert found.output_error == pytest.approx(
        float((torch.trace(E @ H @ E.T) / torch.trace(W @ H @ W.T)) ** 0.5), rel=1e-3
    )
    S = nearest(factors.S, Grid(3, 16)).dense().double()
    rounded = W - (S if kept is None else S * kept) - factors.U.double() @ factors.V.double()
    share = 0.5 if rank else 0.9
    assert torch.trace(E @ H @ E.T) < share * torch.trace(rounded @ H @ rounded.T)


@pytest.mark.parametrize("normal", [False, True])
def test_sparsegpt_that_keeps_all_is_gptq_and_needs_no_positions(normal):
    generator, grid = torch.Generator().manual_seed(0), Grid(4, 16, normal=normal)
    W, X = torch.randn(24, 48, generator=generator), torch.randn(200, 48, generator=generator)
    W[3, 5] = W[7, 20] = 0.0
    X[:, 9] = 0.0  # an input that is never there
    H = X.T @ X / len(X)
    found = sparsegpt(W, H, Budget(0, W.numel(), grid=grid)).quantised
    expected = gptq(W, H, grid)
    assert found.count == W.numel()
    live = torch.arange(48) != 9
    torch.testing.assert_close(found.dense()[:, live], expected.dense()[:, live])
