import numpy as np
import pytest
import torch

from oats_vision.core.budget import Allocation, Budget, Pattern
from oats_vision.core.oats import column_scale, oats


def _weight(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Like a trained layer: a decaying spectrum, heavy tails, and inputs with outlier features."""
    generator = np.random.default_rng(seed)
    low_rank = generator.standard_normal((m, 8)) @ generator.standard_normal((8, n)) * 0.3
    W = low_rank + generator.standard_t(3, (m, n))
    D = np.exp(generator.standard_normal(n))
    D[:3] *= 20
    return torch.from_numpy(W), torch.from_numpy(D)


def _paper(W: np.ndarray, D: np.ndarray, rank: int, keep: int, pattern: str, rounds: int):
    """The paper's steps in float64 and numpy, thresholds by a full sort."""
    A = W * D
    S = np.zeros_like(A)
    for _ in range(rounds):
        U, s, Vh = np.linalg.svd(A - S, full_matrices=False)
        L = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        R = A - L
        flat = {"row": R, "layer": R.reshape(1, -1), "2:4": R.reshape(-1, 4)}[pattern]
        order = np.argsort(-np.abs(flat), axis=1)[:, :keep]
        kept = np.zeros_like(flat)
        np.put_along_axis(kept, order, np.take_along_axis(flat, order, 1), 1)
        S = kept.reshape(A.shape)
    return S / D, L / D


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_agrees_with_the_papers_steps_in_float64(pattern, dtype):
    W, D = _weight(48, 64)
    parsed = Pattern.parse(pattern)
    budget = Allocation.of(None, 0.2, parsed).budget(48, 64)
    keep = {"row": budget.nonzeros // 48, "layer": budget.nonzeros, "2:4": 2}[pattern]
    S, L = _paper(W.numpy(), D.numpy(), budget.rank, keep, pattern, rounds=20)

    factors = oats(W.to(dtype), D, budget, iterations=20, solver="exact")
    ours = factors.dense().double().numpy()
    assert np.linalg.norm(ours - (S + L)) / np.linalg.norm(S + L) < 1e-5
    assert factors.S.count_nonzero() == budget.nonzeros
    A = (W * D).numpy()
    assert factors.error == pytest.approx(np.linalg.norm(A - (S + L) * D.numpy()) / np.linalg.norm(A), rel=1e-5)


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 65)])
def test_fast_is_at_least_as_close_as_exact(pattern, shape):
    W, D = _weight(*shape)
    parsed = Pattern.parse(pattern)
    budget = Allocation.of(None, 0.2, parsed).budget(*shape)
    exact = oats(W, D, budget, iterations=80, solver="exact")
    fast = oats(W.float(), D, budget, iterations=80)
    # margin: both are local optima of a non-convex problem on a small matrix
    assert fast.error <= 1.005 * exact.error
    assert fast.S.count_nonzero() == budget.nonzeros


@pytest.mark.parametrize("solver", ["fast", "exact"])
@pytest.mark.parametrize("budget", [Budget(0, 32), Budget(3, 0), Budget(0, 0), Budget(2, 16, Pattern("layer"))])
@pytest.mark.parametrize("shape", [(16, 8), (16, 9), (16, 24)])
def test_rank_0_and_density_0(solver, budget, shape):
    W, D = _weight(*shape)
    factors = oats(W, D, budget, iterations=30, solver=solver)
    assert factors.U.shape == (shape[0], budget.rank)
    assert factors.V.shape == (budget.rank, shape[1])
    assert factors.S.count_nonzero() == budget.nonzeros
    if budget.nonzeros == 0:  # then the best low-rank approximation is the answer
        s = torch.linalg.svdvals(W * D)
        assert factors.error == pytest.approx(float(s[budget.rank :].norm() / s.norm()), rel=1e-3)
    if budget.rank == 0 and budget.nonzeros:
        kept = (W * D).abs().topk(2, dim=1).values
        expected = 1 - kept.square().sum() / (W * D).square().sum()
        assert factors.error**2 == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_decomposed_in_float32(dtype):
    W, D = _weight(32, 48)
    W = W.to(dtype)
    half = oats(W, D, Budget(4, 32 * 12))
    single = oats(W.float(), D, Budget(4, 32 * 12))
    assert half.S.dtype == torch.float32
    assert torch.equal(half.S, single.S)


def test_never_active_and_overflowing_features_give_finite_weights_and_no_loss_elsewhere():
    W, D = _weight(64, 64)
    moment = D.square()
    budget = Allocation.of(0.5, 0.2).budget(64, 64)
    moment[7] = 0
    factors = oats(W, column_scale(moment), budget)
    dense = factors.dense()
    assert dense.isfinite().all()
    alive = moment > 0
    A = (W * moment.sqrt())[:, alive]
    loss = torch.linalg.norm(A - dense.double()[:, alive] * moment.sqrt()[alive]) / torch.linalg.norm(A)
    without = oats(W[:, alive], moment[alive].sqrt(), Allocation.of(0.5, 0.2).budget(64, 63))
    assert loss <= 1.01 * without.error  # the dead feature took no budget from the others

    moment[3], moment[4] = torch.inf, torch.nan
    assert oats(W, column_scale(moment), budget).dense().isfinite().all()
    assert torch.equal(column_scale(torch.zeros(5)), torch.ones(5).double())
    assert torch.equal(column_scale(torch.full((5,), torch.nan)), torch.ones(5).double())


def test_a_common_factor_of_the_scale_changes_nothing():
    W, D = _weight(32, 32)
    a = oats(W, D, Budget(3, 32 * 10), iterations=20)
    b = oats(W, 1024 * D, Budget(3, 32 * 10), iterations=20)
    torch.testing.assert_close(a.dense(), b.dense())


def test_tolerance_stops_early_at_about_the_same_error():
    W, D = _weight(96, 64)
    budget = Allocation.of(0.5, 0.2).budget(96, 64)
    full = oats(W, D, budget, iterations=200)
    early = oats(W, D, budget, iterations=200, tolerance=1e-3)
    assert early.iterations < full.iterations
    assert early.error <= 1.01 * full.error


def test_zero_weight():
    factors = oats(torch.zeros(8, 8), torch.ones(8), Budget(1, 16))
    assert factors.error == 0
    assert torch.equal(factors.dense(), torch.zeros(8, 8))
