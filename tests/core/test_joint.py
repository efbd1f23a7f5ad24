import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oats_vision.core.budget import Allocation, Budget, Pattern
from oats_vision.core.correlations import Correlations
from oats_vision.core.joint import joint
from oats_vision.core.oats import Factors, column_scale, oats
from oats_vision.core.refit import refit

M, N = 24, 40


def moments(seed: int = 0, outlier: float = 1.0, tokens: int = 500) -> torch.Tensor:
    """Second moments of correlated inputs, the third of which is so many times the others."""
    generator = np.random.default_rng(seed)
    inputs = generator.standard_normal((tokens, N)) @ generator.standard_normal((N, N))
    inputs[:, 3] *= outlier
    return torch.from_numpy(inputs.T @ inputs / tokens)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal((M, N)))


def output_error(W: torch.Tensor, factors: Factors, G: torch.Tensor) -> float:
    E = W.double() - factors.dense().double()
    return float(((E @ G) * E).sum() / ((W.double() @ G) * W.double()).sum()) ** 0.5


def solve(W: torch.Tensor, G: torch.Tensor, budget: Budget, dtype: torch.dtype, **options) -> tuple[Factors, Factors]:
    """By OATS and refit alone, and with the joint rounds between them."""
    start = oats(W, column_scale(G.diagonal()), budget)
    return refit(W, start, G), refit(W, joint(W, start, budget, Correlations.of(G, dtype), **options), G)


def in_blocks(C: np.ndarray, size: int) -> np.ndarray:
    """Zero between two features that are not in one block, of those that go together with as many others."""
    block = np.argsort(np.argsort(-np.square(C).sum(0), kind="stable")) // size
    return C * (block[:, None] == block)


@pytest.mark.parametrize("largest", [0, M, M // 2])
@pytest.mark.parametrize("pattern", ["row", "2:4"])
@pytest.mark.parametrize("widest", [N, N // 4])
def test_two_rounds_are_those_of_the_formulas(weight, largest, pattern, widest):
    """Outputs weigh errors not at all, all together, or in two halves; inputs all together or in quarters."""
    G, rate = moments(), None if pattern == "2:4" else 0.5
    budget = Allocation.of(rate, 0.3, Pattern.parse(pattern)).budget(M, N)
    start = oats(weight, column_scale(G.diagonal()), budget)
    inputs, outputs = Correlations.of(G, torch.float64, largest=widest), None
    F, e = np.eye(M), np.ones(M)
    if largest:
        gradients = np.random.default_rng(2).standard_normal((100, M)) @ np.random.default_rng(3).standard_normal(
            (M, M)
        )
        raw = gradients.T @ gradients / 100
        e = np.sqrt(np.diag(raw))
        F = in_blocks(raw / np.outer(e, e) + 0.1 * np.eye(M), largest)
        outputs = Correlations.of(torch.from_numpy(raw), torch.float64, 0.1, largest)
    ours = joint(weight, start, budget, inputs, outputs, rounds=2, relaxation=1.0)

    d = np.sqrt(np.diag(G.numpy()))
    both = np.outer(e, d)
    A, C = weight.numpy() * both, in_blocks(G.numpy() / np.outer(d, d) + 0.01 * np.eye(N), widest)
    D, U, L = start.S.numpy() * both, start.U.numpy() * e[:, None], (start.U @ start.V).numpy() * both
    Y = np.zeros_like(A)
    for rho in (0.1, 0.4):
        # Z minimises tr(F (A - L - Z) C (A - L - Z)^T) / 2 + <Y, Z - D> + rho |Z - D|^2 / 2: the gradient is zero
        right = F @ (A - L) @ C - Y + rho * D
        Z = np.linalg.solve(np.kron(F, C) + rho * np.eye(M * N), right.ravel()).reshape(M, N)
        scores = Z + Y / rho
        among = scores if pattern == "row" else scores.reshape(-1, 4)
        kept = np.argsort(-np.abs(among), axis=1)[:, : budget.nonzeros // len(among)]
        D = np.zeros_like(among)
        np.put_along_axis(D, kept, np.take_along_axis(among, kept, axis=1), axis=1)
        D = D.reshape(M, N)
        Y = Y + rho * (Z - D)
        R = A - D
        U = R @ C @ R.T @ F @ U
        L = U @ np.linalg.solve(U.T @ F @ U, U.T @ F @ R)
    np.testing.assert_allclose(ours.S, D / both, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose((ours.U @ ours.V), L / both, rtol=1e-5, atol=1e-8)
    assert ours.iterations == start.iterations + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
@pytest.mark.parametrize("rank_ratio", [0.0, 0.2])
def test_positions_chosen_by_correlations_lower_the_output_error(weight, pattern, rank_ratio, dtype):
    budget = Allocation.of(None if pattern == "2:4" else 0.6, rank_ratio, Pattern.parse(pattern)).budget(M, N)
    G, W = moments(), weight.to(dtype)
    before, after = solve(W, G, budget, torch.float32)
    # 2:4 leaves little to choose
    assert output_error(W, after, G) < (0.97 if pattern == "2:4" else 0.9) * output_error(W, before, G)
    assert after.S.dtype == dtype
    assert int(torch.count_nonzero(after.S)) == budget.nonzeros
    assert after.U.shape == (M, budget.rank)
    if pattern == "row":
        assert (torch.count_nonzero(after.S, dim=1) == budget.nonzeros // M).all()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    outlier=st.sampled_from([1.0, 100.0, 1000.0]),
    tokens=st.sampled_from([8, 500]),  # eight: singular
    rate=st.sampled_from([0.3, 0.5, 0.6]),
)
def test_outliers_and_singular_moments_are_borne(seed, outlier, tokens, rate):
    W = torch.randn(M, N, generator=torch.Generator().manual_seed(seed))
    G, budget = moments(seed, outlier, tokens), Allocation(rate, 0.2).budget(M, N)
    before, after = solve(W, G, budget, torch.float32)
    assert all(factor.isfinite().all() for factor in (after.S, after.U, after.V))
    assert output_error(W, after, G) <= 1.02 * output_error(W, before, G) + 1e-4


def test_a_factor_of_the_inputs_changes_nothing(weight):
    G, budget = moments(), Allocation(0.5, 0.2).budget(M, N)
    (_, one), (_, other) = (solve(weight.float(), G * factor, budget, torch.float32) for factor in (1.0, 1e6))
    torch.testing.assert_close(one.dense(), other.dense(), rtol=1e-3, atol=1e-4)


def test_inputs_that_are_always_zero_take_no_budget(weight):
    G = moments()
    G[5], G[:, 5] = 0.0, 0.0
    _, after = solve(weight, G, Allocation(0.5, 0.2).budget(M, N), torch.float32)
    assert after.dense().isfinite().all()
    assert not after.S[:, 5].any()


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="second moments are not finite"):
        Correlations.of(torch.full((2, 2), torch.nan, dtype=torch.float64), torch.float32)


def test_outputs_are_cut_into_equal_blocks_unless_only_small_ones_divide_them():
    eyes = [torch.eye(count).double() for count in (8, 16, 48, 37)]
    sizes = {len(eye): Correlations.of(eye, torch.float32, 0.1, 16).C.blocks.shape for eye in eyes}
    assert sizes == {8: (1, 8, 8), 16: (1, 16, 16), 48: (3, 16, 16), 37: (1, 37, 37)}
