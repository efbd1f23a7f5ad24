import pytest
import torch

from oats_vision.core.lowrank import WarmLowRank, exact_low_rank, orthonormal


def _decaying(m: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator)).Q
    return U * 0.8 ** torch.arange(min(m, n)) @ V.T


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32), (1, 8), (8, 1)])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_exact_is_the_truncated_svd(shape, rank):
    x = torch.randn(shape, dtype=torch.float64)
    U, V = exact_low_rank(x, rank)
    s = torch.linalg.svdvals(x)
    # Eckart-Young: the error is the tail of the spectrum
    torch.testing.assert_close(torch.linalg.matrix_norm(x - U @ V), torch.linalg.vector_norm(s[rank:]))


@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
def test_warm_started_calls_converge_to_the_truncated_svd(shape):
    x, low_rank = _decaying(*shape), WarmLowRank()
    for _ in range(10):
        U, V = low_rank(x, 6)
    best = torch.linalg.vector_norm(torch.linalg.svdvals(x)[6:])
    assert torch.linalg.matrix_norm(x - U @ V) <= 1.0001 * best
    torch.testing.assert_close(U.T @ U, torch.eye(6), atol=1e-5, rtol=0)


def test_warm_takes_matrices_of_lower_rank_and_zero():
    low_rank = WarmLowRank()
    x = torch.outer(torch.arange(1.0, 21), torch.ones(10))
    for _ in range(3):
        U, V = low_rank(x, 4)
        torch.testing.assert_close(U @ V, x, atol=1e-3, rtol=0)
    U, V = WarmLowRank()(torch.zeros(8, 5), 2)
    assert torch.equal(U @ V, torch.zeros(8, 5))


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e12])
def test_orthonormal_spans_the_columns_however_badly_conditioned(condition):
    Y = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    Y = Y * torch.logspace(0, -torch.tensor(condition).log10(), 8)
    Q = orthonormal(Y)
    torch.testing.assert_close(Q.T @ Q, torch.eye(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(Q @ (Q.T @ Y), Y, atol=1e-4, rtol=0)
