import numpy as np
import pytest
import torch

from oats_vision.core.budget import Pattern, layer_budget
from oats_vision.core.oats import column_scale, oats
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
    budget = layer_budget(M, N, rate, rank_ratio, Pattern.parse(pattern))
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
    full = oats(W, column_scale(H.diagonal()), layer_budget(M, N, 1e-6, 0.0, Pattern("layer")))
    torch.testing.assert_close(refit(W, full, H).dense(), full.dense())
    half = refit(W, oats(W, column_scale(H.diagonal()), layer_budget(M, N, 0.5, 0.2)), H)
    assert half.dense().isfinite().all()
    H[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        refit(W, full, H)
