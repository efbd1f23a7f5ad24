"""Each baseline against an independent restatement of its paper, in float64 and one weight at a time."""

import numpy as np
import pytest
import torch

from oats_vision.compression.methods.dsnot import dsnot
from oats_vision.compression.methods.magnitude import magnitude
from oats_vision.compression.methods.sparsegpt import sparsegpt
from oats_vision.compression.methods.svd import svd
from oats_vision.compression.methods.wanda import wanda
from oats_vision.core.budget import Budget, Pattern

OUT, IN = 12, 32
TWO_OF_FOUR = Budget(0, OUT * IN // 2, Pattern.parse("2:4"))


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray]:
    """A weight, and correlated inputs (tokens, IN) with outlier features and a mean."""
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((IN, IN)) * np.exp(generator.standard_normal(IN))
    inputs = generator.standard_normal((400, IN)) @ mixing + generator.standard_normal(IN)
    return generator.standard_normal((OUT, IN)), inputs


def _keep(scores: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest of each row, by a full sort."""
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(-scores, axis=1)[:, :count], True, axis=1)
    return mask


def _masks(scores: np.ndarray) -> dict[Budget, np.ndarray]:
    """What each pattern keeps of a matrix of scores."""
    return {
        Budget(0, OUT * 10): _keep(scores, 10),
        Budget(0, 100, Pattern("layer")): _keep(scores.reshape(1, -1), 100).reshape(scores.shape),
        TWO_OF_FOUR: _keep(scores.reshape(-1, 4), 2).reshape(scores.shape),
    }


def test_magnitude_keeps_the_largest_weights(problem):
    W, _ = problem
    for budget, mask in _masks(np.abs(W)).items():
        factors = magnitude(torch.from_numpy(W), torch.ones(IN), budget)
        np.testing.assert_array_equal(factors.dense(), W * mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wanda_keeps_the_largest_weight_times_input_norm(problem, dtype):
    W, X = problem
    norms = np.linalg.norm(X, axis=0)
    for budget, mask in _masks(np.abs(W) * norms).items():
        factors = wanda(torch.from_numpy(W).to(dtype), torch.from_numpy(norms), budget)
        np.testing.assert_allclose(factors.dense(), W * mask, atol=1e-6)
        error = np.linalg.norm(W * ~mask * norms) / np.linalg.norm(W * norms)
        assert factors.error == pytest.approx(error, rel=1e-5)


def _sparsegpt(W: np.ndarray, H: np.ndarray, budget: Budget, block: int) -> np.ndarray:
    """Optimal brain surgeon, left to right: the inverse of what is left of H is formed anew for each column."""
    W, rows, columns = W.copy(), *W.shape
    H = H + 0.01 * np.diag(np.diag(H))
    inverses = [np.linalg.inv(H[j:, j:]) for j in range(columns)]
    saliency = np.array([inverse[0, 0] for inverse in inverses])
    mask = np.zeros(W.shape, dtype=bool)
    for j in range(columns):
        if budget.pattern.kind == "n:m":
            if j % budget.pattern.m == 0:
                group = slice(j, j + budget.pattern.m)
                mask[:, group] = _keep(W[:, group] ** 2 / saliency[group], budget.pattern.n)
        elif j % block == 0:
            group = slice(j, min(j + block, columns))
            scores = W[:, group] ** 2 / saliency[group]
            share = budget.nonzeros * scores.shape[1] // columns
            if budget.pattern.kind == "row":
                mask[:, group] = _keep(scores, share // rows)
            else:
                mask[:, group] = _keep(scores.reshape(1, -1), share).reshape(scores.shape)
        for i in range(rows):
            if not mask[i, j]:
                W[i, j:] -= W[i, j] / saliency[j] * inverses[j][0]
                W[i, j] = 0.0
    return W


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [Budget(0, OUT * 16), Budget(0, 192, Pattern("layer")), TWO_OF_FOUR], ids=str)
def test_sparsegpt_is_its_papers_update(problem, budget, dtype):
    W, X = problem
    H = X.T @ X / len(X)
    expected = _sparsegpt(W, H, budget, block=16)
    factors = sparsegpt(torch.from_numpy(W).to(dtype), torch.from_numpy(H), budget, block_size=16)
    np.testing.assert_allclose(factors.dense(), expected, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 1e-9)
    assert factors.S.count_nonzero() == budget.nonzeros

    def loss(S: np.ndarray) -> float:
        return float(np.linalg.norm(X @ (W - S).T))

    plain = magnitude(torch.from_numpy(W), torch.ones(IN), budget)
    assert loss(factors.dense().double().numpy()) < 0.7 * loss(plain.dense().numpy())


def test_sparsegpt_with_dead_and_equal_inputs_and_with_infinite_ones(problem):
    W, X = problem
    X[:, 3], X[:, 5] = 0.0, X[:, 4]
    H = torch.from_numpy(X.T @ X)
    factors = sparsegpt(torch.from_numpy(W).float(), H, Budget(0, OUT * 16))
    assert factors.dense().isfinite().all()
    assert not factors.S[:, 3].any()
    H[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        sparsegpt(torch.from_numpy(W), H, Budget(0, OUT * 16))


def _dsnot_row(w: np.ndarray, kept: np.ndarray, norm: np.ndarray, mean: np.ndarray, var: np.ndarray, group: np.ndarray):
    """One row of Dynamic Sparse no Training, swap by swap."""
    kept = kept.copy()
    for _ in range(50):
        error = sum(w[j] * mean[j] for j in range(IN) if not kept[j])
        if abs(error) <= 0.1:
            break
        grow = max((j for j in range(IN) if not kept[j]), key=lambda j: np.sign(error) * w[j] * mean[j] / var[j])
        losable = [j for j in range(IN) if kept[j] and np.sign(error) * w[j] * mean[j] < 0 and group[j] == group[grow]]
        if not losable:
            break
        prune = min(losable, key=lambda j: abs(w[j]) * norm[j])
        if abs(error - w[grow] * mean[grow] + w[prune] * mean[prune]) >= abs(error):
            break
        kept[grow], kept[prune] = True, False
    return w * kept


@pytest.mark.parametrize("budget", [Budget(0, OUT * 10), TWO_OF_FOUR], ids=str)
def test_dsnot_is_its_papers_swaps_and_lowers_the_expected_error(problem, budget):
    W, X = problem
    norm, mean, var = np.sqrt((X**2).mean(0)), X.mean(0), X.var(0)
    mask = _masks(np.abs(W) * norm)[budget]
    group = np.arange(IN) // (budget.pattern.m or IN)
    expected = np.stack([_dsnot_row(w, kept, norm, mean, var, group) for w, kept in zip(W, mask, strict=True)])
    statistics = [torch.from_numpy(x) for x in (norm, mean, var)]
    factors = dsnot(torch.from_numpy(W), *statistics, budget)
    np.testing.assert_allclose(factors.dense(), expected)
    assert factors.S.count_nonzero() == budget.nonzeros
    before, after = (np.abs((W - S) @ mean) for S in (W * mask, expected))
    assert (after <= before + 1e-12).all()
    assert after.mean() < 0.85 * before.mean()  # little room within groups of four


def test_svd_is_the_best_low_rank_approximation_of_the_scaled_weight(problem):
    W, X = problem
    norm = np.linalg.norm(X, axis=0)
    factors = svd(torch.from_numpy(W), torch.from_numpy(norm), Budget(5, 0))
    s = np.linalg.svd(W * norm, compute_uv=False)
    assert factors.error == pytest.approx(np.linalg.norm(s[5:]) / np.linalg.norm(s))
    assert factors.U.shape == (OUT, 5)
    assert not factors.S.any()
