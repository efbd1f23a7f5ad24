"""Least-squares correction of a decomposition: what SparseGPT's updates do for pruning, for S + U V.

OATS weighs the error of each column by its own second moment. Inputs are also correlated, so that an error in one
column can be made up for in another. With the support of S and the rank as OATS chose them, this minimises
the layer's output error over the calibration inputs, trace((W - S - U V) H (W - S - U V)^T), H = mean of x x^T.
"""

import torch
from torch import Tensor

from oats_vision.core.oats import Factors, arithmetic, normalised, output_error, relative_error

DEAD = 1e-12  # of the mean second moment: what counts as that of a feature without inputs, to be divided by


def refit(
    weight: Tensor, factors: Factors, gram: Tensor, *, rounds: int = 3, steps: int = 5, damping: float = 0.01
) -> Factors:
    """Fit the values of S, and U and V, to all second moments of the inputs; support and rank stay.

    Alternates the minimisers for U and V, which have a closed form, with conjugate gradients for the values of S.

    Args:
        weight: (out_features, in_features).
        factors: of the weight, by `oats`.
        gram: H, (in_features, in_features).
        rounds: of U, V and S in turn; steps: of conjugate gradients in each.
        damping: added to the diagonal of H, as a share of each entry: of the mean, a few outlier features would set
            it far above all others.

    Raises:
        ValueError: `gram` is not finite.
    """
    if not gram.isfinite().all():
        raise ValueError("the inputs' second moments are not finite")
    W = arithmetic(weight)
    H = normalised(gram).to(W)
    D = H.diagonal().sqrt()
    H.diagonal().mul_(1 + damping).masked_fill_(H.diagonal() <= 0, DEAD)
    S, U, V = factors.S.clone(), factors.U, factors.V
    mask = (S != 0).to(W)
    for _ in range(rounds):
        if U.shape[1]:
            rest = W - S
            VH = V @ H
            U = rest @ VH.T @ torch.linalg.pinv(VH @ V.T, hermitian=True)
            V = torch.linalg.pinv(U.T @ U, hermitian=True) @ (U.T @ rest)
        S = fit_values(W - U @ V, H, S, mask, steps)
    error, of_output = relative_error(W, S, U, V, D), output_error(W, S, U, V, gram)
    return Factors(S, U, V, error, factors.iterations, of_output)


def fit_values(target: Tensor, H: Tensor, S: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Minimise trace((target - S) H (target - S)^T) over the values of S where `mask` is 1.

    Each row is a least-squares problem of its own; all rows take a step of conjugate gradients, scaled by the
    diagonal of H, in one matrix product.

    Args:
        target, S, mask: (out_features, in_features); S is where to start.
        H: (in_features, in_features), symmetric and positive.
    """
    scale = mask / H.diagonal()
    residual = ((target - S) @ H).mul_(mask)
    direction = residual * scale
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ H).mul_(mask)
        # a row that is solved has no direction left
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature, 0.0)
        S = torch.addcmul(S, step, direction)
        residual = torch.addcmul(residual, step, image, value=-1)
        scaled = residual * scale
        previous, energy = energy, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(previous > 0, energy / previous, 0.0) * direction
    return S
