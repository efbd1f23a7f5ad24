"""The best rank-r approximation of a matrix: exact, or warm-started for a sequence of like matrices."""

import torch
from torch import Tensor


def exact_low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD: factors U (out, rank) and V (rank, in) of the best rank-`rank` approximation of `x`."""
    U, s, Vh = torch.linalg.svd(x, full_matrices=False)
    return U[:, :rank], s[:rank, None] * Vh[:rank]


class WarmLowRank:
    """Block power iteration that starts from the row space it found in the last call.

    For a sequence of slowly moving matrices one step a call follows the exact truncated SVD closely.
    """

    def __init__(self, first_steps: int = 4, seed: int = 0) -> None:
        self.first_steps = first_steps
        self.seed = seed
        self._V: Tensor | None = None

    def __call__(self, x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Factors U (out, rank) with orthonormal columns and V (rank, in) of about the best approximation of `x`."""
        steps = 1
        if self._V is None:
            generator = torch.Generator(device=x.device).manual_seed(self.seed)
            self._V = torch.randn(rank, x.shape[1], dtype=x.dtype, device=x.device, generator=generator)
            steps = self.first_steps
        for _ in range(steps):
            U = orthonormal(x @ self._V.T)  # (out, rank)
            self._V = U.T @ x  # (rank, in)
        return U, self._V


def orthonormal(Y: Tensor) -> Tensor:
    """Orthonormal basis (m, r) of the columns of `Y`: Cholesky QR, done twice; Householder QR where that fails.

    Cholesky QR is all matrix products, and squares the condition number; the second pass restores
    orthogonality to rounding (Yamamoto et al., 2015) unless `Y` is close to rank-deficient, which is seen
    as a failed factorisation or as a basis that is not orthonormal.
    """
    Q = Y
    eye = torch.eye(Y.shape[1], dtype=Y.dtype, device=Y.device)
    for _ in range(2):
        R, failed = torch.linalg.cholesky_ex(Q.T @ Q, upper=True)
        if failed:
            return _householder(Y)
        Q = Q @ torch.linalg.solve_triangular(R, eye, upper=True)
    deviation = (Q.T @ Q).sub_(eye).abs_().amax() if Y.shape[1] else torch.zeros(())
    return Q if deviation < 1e-4 else _householder(Y)


def _householder(Y: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(Y).Q
    return Q
