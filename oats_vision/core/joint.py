"""Sparse plus low-rank with the positions chosen by all second moments of the inputs.

OATS weighs an error in each column of W by that input's size alone. Here the whole second moments G = E[x x^T] weigh
it: in coordinates scaled by d = sqrt(diag G), with A = W d and C = G / d / d^T,

    min  trace((A - S - L) C (A - S - L)^T),    S sparse, L of rank r.

The rounds are ADMM (alternating direction method of multipliers): Z is S without the constraint, D is S with it, Y
pulls the two together, ever more strongly as rho grows. ALPS (Meng et al., 2024) prunes so, and 3BASiL (2025) finds S
plus low-rank so. C has a unit diagonal: an outlier feature decides neither the damping nor rho.
"""

import torch
from torch import Tensor

from oats_vision.core.budget import Budget
from oats_vision.core.lowrank import orthonormal
from oats_vision.core.oats import Factors, arithmetic, column_scale, relative_error
from oats_vision.core.threshold import keep_largest


class Correlations:
    """Second moments of the inputs scaled to a unit diagonal, and inverses that the rounds need.

    d: (in_features,). C: (in_features, in_features), in the dtype of the arithmetic, damped.
    """

    def __init__(self, gram: Tensor, dtype: torch.dtype, damping: float = 0.01) -> None:
        if not gram.isfinite().all():
            raise ValueError("the inputs' second moments are not finite")
        d = column_scale(gram.diagonal())
        self.d, self.C = d.to(dtype), (gram / d / d[:, None]).to(dtype)
        self.C.diagonal().add_(damping)
        self._inverses: dict[float, Tensor] = {}

    def inverse(self, rho: float) -> Tensor:
        """(C + rho I)^-1."""
        if rho not in self._inverses:
            shifted = self.C.clone()
            shifted.diagonal().add_(rho)
            self._inverses[rho] = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        return self._inverses[rho]


def joint(
    weight: Tensor,
    factors: Factors,
    correlations: Correlations,
    budget: Budget,
    *,
    rounds: int = 24,
    rho: tuple[float, float] = (0.1, 1.0),
    refresh: int = 4,
    relaxation: float = 1.6,
    tolerance: float = 0.01,
) -> Factors:
    """Move the support of S, and L with it, to what the inputs' correlations ask for; values are fitted by `refit`.

    Args:
        weight: (out_features, in_features).
        factors: of the weight, by `oats`: where to start.
        correlations: of the layer's inputs.
        budget: of the factors.
        rounds: at most. rho: first and last. refresh: rounds between two values of rho.
        relaxation: of Z, in [1, 2): above 1 a longer step, which saves rounds (Boyd et al., 2011, section 3.4.3).
        tolerance: stops when Z and D differ by less than this share of D.
    """
    W, d, C = arithmetic(weight), correlations.d, correlations.C
    A = W.to(C) * d
    D, U = factors.S.to(C) * d, factors.U.to(C)
    L = U @ (factors.V.to(C) * d)
    Y = torch.zeros_like(A)
    done = 0
    for done in range(1, rounds + 1):
        r = rho[0] * (rho[1] / rho[0]) ** ((done - 1) // refresh / max((rounds - 1) // refresh, 1))
        rest = A - L
        Z = rest + (r * (D - rest) - Y) @ correlations.inverse(r)
        Z = torch.lerp(D, Z, relaxation)
        D = keep_largest(Z + Y / r, budget)
        Y = Y.add_(Z - D, alpha=r)
        if budget.rank:  # a power step to the best approximation of what D leaves, in the norm of C
            R = A - D
            U = orthonormal((R @ C) @ (R.T @ U))
            L = U @ (U.T @ R)
        if torch.linalg.vector_norm(Z - D) <= tolerance * torch.linalg.vector_norm(D):
            break
    V = U.T @ (A - D) if budget.rank else factors.V.to(C)
    S, U, V = ((D / d).to(W), U.to(W), (V / d).to(W))
    error = relative_error(W, S, U, V, d.to(W))
    return Factors(S, U, V, error, factors.iterations + done)
