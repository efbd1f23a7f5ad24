"""Sparse plus low-rank with the positions chosen by what an error does: by all second moments, not by sizes alone.

OATS weighs an error in each column of W by that input's size. Here the inputs' second moments G = E[x x^T] weigh it
whole, and so do those of the gradients at the layer's outputs, M = E[g g^T]: to first order an error E of the weight
moves the model's output by tr(M E G E^T). In coordinates scaled by d = sqrt(diag G) and e = sqrt(diag M), with
A = e W d, C = G / d / d^T and F = M / e / e^T, both with a unit diagonal so that no outlier decides the damping:

    min  tr(F (A - S - L) C (A - S - L)^T),    S sparse, L of rank r.

The rounds are ADMM (alternating direction method of multipliers): Z is S without the constraint, D is S with it, Y
pulls the two together, ever more strongly as rho grows. ALPS (Meng et al., 2024) prunes so, and 3BASiL (2025) finds
sparse plus low-rank so, by G alone; F is the other half of K-FAC's curvature (Martens & Grosse, 2015).
"""

import torch
from torch import Tensor

from oats_vision.core.budget import Budget
from oats_vision.core.correlations import Correlations
from oats_vision.core.lowrank import orthonormal
from oats_vision.core.oats import Factors, arithmetic, relative_error
from oats_vision.core.threshold import keep_largest

NEARLY_ALL = 0.9  # of the weights: where S keeps so many, there is little to make up for


def joint(
    weight: Tensor,
    factors: Factors,
    budget: Budget,
    inputs: Correlations,
    outputs: Correlations | None = None,
    *,
    rounds: int = 16,
    rho: tuple[float, float] = (0.1, 0.4),
    relaxation: float = 1.6,
    tolerance: float = 0.01,
) -> Factors:
    """Move the support of S, and L with it, to what correlations ask for; `refit` fits the values.

    Args:
        weight: W, (out_features, in_features).
        factors: of the weight, by `oats`: where to start.
        budget: of the factors.
        inputs: C and d, of the layer's inputs. outputs: F and e, of the gradients at its outputs; None:
            rows weigh alike.
        rounds: at most. rho: first and last, of a geometric sequence.
        relaxation: of Z, in [1, 2): above 1 a longer step, which saves rounds (Boyd et al., 2011, section 3.4.3).
        tolerance: stops when Z and D differ by less than this share of D.
    """
    W, d = arithmetic(weight), inputs.d
    e = torch.ones_like(d[:1]) if outputs is None else outputs.d[:, None]
    across, Q = inputs.C.eigen
    down, P = (torch.ones_like(d[:1]), None) if outputs is None else outputs.C.eigen
    curvature = down[:, None] * across  # in the eigenvectors' coordinates the objective is a weighted square

    def rotated(X: Tensor) -> Tensor:
        return Q.columns(X if P is None else P.rows(X))

    def back(X: Tensor) -> Tensor:
        return Q.columns_back(X if P is None else P.rows_back(X))

    A = rotated(e * W.to(d) * d)
    S = factors.S.to(d) * e * d
    U, V = factors.U.to(d) * e, Q.columns(factors.V.to(d) * d)
    U = U if P is None else P.rows(U)
    D, L = rotated(S), U @ V
    Y, root = torch.zeros_like(A), curvature.sqrt()
    # an orthonormal basis of L's columns, where they weigh as errors do
    B = orthonormal(down.sqrt()[:, None] * U) if budget.rank else None
    done = 0
    for done in range(1, rounds + 1):
        r = rho[0] * (rho[1] / rho[0]) ** ((done - 1) / max(rounds - 1, 1))
        rest = A - L
        Z = rest + (r * (D - rest) - Y) / (curvature + r)
        Z = torch.lerp(D, Z, relaxation)
        S = keep_largest(back(Z + Y / r), budget)
        D = rotated(S)
        Y.add_(Z - D, alpha=r)
        if B is not None:  # a power step to the best approximation of what D leaves
            R = root * (A - D)
            B = orthonormal(R @ (R.T @ B))
            L = (B @ (B.T @ R)) / root
        if torch.linalg.vector_norm(Z - D) <= tolerance * torch.linalg.vector_norm(D):
            break
    if budget.nonzeros > NEARLY_ALL * W.numel():
        kept = (S != 0) * back(A - L)
        if _curved(A - L - rotated(kept), curvature) < _curved(A - L - D, curvature):
            S = kept  # what L leaves, with nothing to make up for
    U, V = factors.U, factors.V
    if B is not None:
        left, right = B / down.sqrt()[:, None], (B.T @ (root * (A - D))) / across.sqrt()
        U, V = balanced((left if P is None else P.rows_back(left)) / e, Q.columns_back(right) / d)
    S, U, V = (S / e / d).to(W), U.to(W), V.to(W)
    return Factors(S, U, V, relative_error(W, S, U, V, d.to(W)), factors.iterations + done)


def _curved(X: Tensor, curvature: Tensor) -> Tensor:
    """The objective of an error, in the eigenvectors' coordinates."""
    return (curvature * X * X).sum()


def balanced(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, each column of U as long as its row of V: so that both can be stored in 16 bits."""
    tiny = torch.finfo(U.dtype).tiny
    share = (torch.linalg.vector_norm(V, dim=1) / torch.linalg.vector_norm(U, dim=0).clamp_min(tiny)).sqrt()
    share = torch.where((share > 0) & share.isfinite(), share, 1.0)
    return U * share, V / share[:, None]
