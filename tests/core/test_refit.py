import numpy as np
import pytest
import torch

from oats_vision.compression.methods.sparsegpt import sparsegpt
from oats_vision.core.budget import Allocation, Budget, Pattern
from oats_vision.core.correlations import Correlations
from oats_vision.core.joint import joint
from oats_vision.core.oats import Factors, column_scale, oats
from oats_vision.core.refit import fit_values, refit

M, N = 24, 40


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moments of correlated inputs."""
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((N, N)) * np.exp(generator.standard_normal(N))
    inputs = generator.standard_normal((500, N)) @ mixing
    return torch.from_numpy(generator.standard_normal((M, N))), torch.from_numpy(inputs.T @ inputs / 500)


def test_values_are_the_least_squares_solution_of_each_row(problem):
    W, H = problem
    mask = torch.rand(M, N, generator=torch.Generator().manual_seed(0)) < 0.4
    ours = fit_values(W, H, W * mask, mask.to(W), steps=400)
    root = np.linalg.cholesky(H.numpy()).T  # |(w - s) root^T| is the output error of a row
    for w, s, kept in zip(W.numpy(), ours.numpy(), mask.numpy(), strict=True):
        solution, *_ = np.linalg.lstsq(root[:, kept], root @ w, rcond=None)
        np.testing.assert_allclose(s[kept], solution, rtol=1e-5, atol=1e-8)
        assert not s[~kept].any()


@pytest.mark.parametrize("pattern", ["row", "layer", "2:4"])
@pytest.mark.parametrize("rank_ratio", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_error_falls_and_positions_and_rank_stay(problem, pattern, rank_ratio, dtype):
    W, H = problem
    rate = None if pattern == "2:4" else 0.6
    budget = Allocation.of(rate, rank_ratio, Pattern.parse(pattern)).budget(M, N)
    before = oats(W.to(dtype), column_scale(H.diagonal()), budget)
    after = refit(W.to(dtype), before, H)

    def output_error(dense: torch.Tensor) -> float:
        E = W - dense.double()
        return float(torch.trace(E @ H @ E.T))

    relative = (output_error(after.dense()) / float(torch.trace(W @ H @ W.T))) ** 0.5
    assert after.output_error == pytest.approx(relative, rel=1e-3)
    assert output_error(after.dense()) < 0.7 * output_error(before.dense())
    assert not after.S[before.S == 0].any()
    assert after.U.shape == before.U.shape
    assert after.V.shape == before.V.shape


def test_a_full_budget_is_left_alone_and_dead_inputs_do_no_harm(problem):
    W, H = problem
    H[3], H[:, 3] = 0.0, 0.0
    full = oats(W, column_scale(H.diagonal()), Allocation.of(1e-6, 0.0, Pattern("layer")).budget(M, N))
    torch.testing.assert_close(refit(W, full, H).dense(), full.dense())
    half = refit(W, oats(W, column_scale(H.diagonal()), Allocation.of(0.5, 0.2).budget(M, N)), H)
    assert half.dense().isfinite().all()
    H[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        refit(W, full, H)


def _outliers(dead: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs (tokens, N) of which three features are 1000 times the others, and some may be zero."""
    generator = np.random.default_rng(1)
    inputs = generator.standard_normal((500, N)) @ (np.eye(N) + generator.standard_normal((N, N)) / N**0.5)
    inputs[:, [3, 17, 30]] *= 1000
    inputs[:, [5, 6]] *= not dead
    return torch.from_numpy(generator.standard_normal((M, N))), torch.from_numpy(inputs)


@pytest.mark.parametrize("dead", [False, True])
def test_features_beside_outliers_are_fitted_as_well_as_least_squares_can(dead):
    W, X = _outliers(dead)
    mask = torch.rand(M, N, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, [3, 17, 30]] = True  # what is lost is then lost on the ordinary features
    before = Factors((W * mask).float(), torch.zeros(M, 0), torch.zeros(0, N), 0.0, 1)
    after = refit(W.float(), before, X.T @ X / len(X), rounds=1, steps=30)

    def error(S: torch.Tensor) -> float:
        return float((X @ (W - S.double()).T).norm() / (X @ W.T).norm())

    reference = torch.zeros_like(W)
    for row in range(M):
        kept = mask[row]
        solution, *_ = np.linalg.lstsq(X[:, kept].numpy(), (X @ W[row]).numpy(), rcond=None)
        reference[row, kept] = torch.from_numpy(solution)
    assert error(reference) < 0.8 * error(before.S)
    assert error(after.S) < 1.01 * error(reference)
    assert after.S.isfinite().all()


@pytest.mark.parametrize("largest", [0, 60, 20])
@pytest.mark.parametrize("start", ["oats", "joint"])
def test_a_large_rank_beside_outliers_never_raises_the_objective(start, largest):
    """In 32 bits: the products of U's and of V's columns must not be lost beside those of an outlier's direction."""
    torch.manual_seed(0)
    m, n = 60, 40
    X = torch.randn(500, n) @ torch.randn(n, n) / n**0.5
    X[:, 1] *= 1000
    W, G, g = torch.randn(m, n), (X.T @ X / 500).double(), torch.randn(300, m).double()
    outputs = Correlations.of(g.T @ g / 300, torch.float32, 0.1, largest) if largest else None
    F = torch.eye(m).double() if outputs is None else outputs.moments().times(torch.eye(m)).double()

    def objective(factors):
        E = (W - factors.dense()).double()
        return float(torch.trace(F @ E @ G @ E.T))

    budget = Allocation(0.3, 0.6, Pattern.parse("row")).budget(m, n)
    before = oats(W, column_scale(G.diagonal()), budget)
    if start == "joint":
        before = joint(W, before, budget, Correlations.of(G, torch.float32), outputs)
    assert objective(refit(W, before, G, outputs, rounds=1)) < objective(before)


def test_a_change_of_the_features_units_changes_nothing():
    """W x is (W / c) (c x): what is kept, and what it becomes, must not depend on the units of the inputs."""
    W, X = _outliers(dead=False)
    H, c = X.T @ X / len(X), torch.logspace(-3, 3, N, dtype=W.dtype)
    factors = oats(W, column_scale(H.diagonal()), Allocation.of(0.5, 0.2).budget(M, N), iterations=10)
    scaled = Factors(factors.S / c, factors.U, factors.V / c, 0.0, 1)
    plain, other = refit(W, factors, H), refit(W / c, scaled, H * c * c[:, None])
    np.testing.assert_allclose(other.dense() * c, plain.dense(), rtol=1e-4, atol=1e-6)
    assert other.output_error == pytest.approx(plain.output_error, rel=1e-4)
    budget = Budget(0, M * N // 2, Pattern("layer"))
    pruned, other = sparsegpt(W, H, budget), sparsegpt(W / c, H * c * c[:, None], budget)
    np.testing.assert_allclose(other.S * c, pruned.S, rtol=1e-4, atol=1e-6)


def test_second_moments_beyond_float32_are_fitted():
    W, X = _outliers(dead=False)
    H = X.T @ X / len(X)
    factors = oats(W.float(), column_scale(H.diagonal()), Allocation.of(0.5, 0.2).budget(M, N), iterations=5)
    expected, huge = refit(W.float(), factors, H), refit(W.float(), factors, H * 1e40)
    assert huge.output_error == pytest.approx(expected.output_error, rel=1e-3)


@pytest.mark.parametrize("pattern", ["row", "layer"])
def test_a_weight_that_is_stored_by_columns_is_decomposed_as_any(pattern):
    W, X = _outliers(dead=True)
    H = X.T @ X / len(X)
    budget = Allocation.of(0.5, 0.2, Pattern(pattern)).budget(M, N)
    results = [
        refit(weight, oats(weight, column_scale(H.diagonal()), budget, iterations=5), H).dense()
        for weight in (W.float(), W.float().T.contiguous().T)
    ]
    torch.testing.assert_close(*results)
