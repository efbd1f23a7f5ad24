"""Least-squares correction of a decomposition: what SparseGPT's updates do for pruning, for S + U V.

OATS weighs the error of each column by its own second moment. Inputs are also correlated, so that an error in one
column can be made up for in another. With the support of S and the rank as OATS chose them, this minimises
the layer's output error over the calibration inputs, trace((W - S - U V) H (W - S - U V)^T), H = mean of x x^T.
"""

import torch
from torch import Tensor

from oats_vision.core.correlations import Blocks, Correlations
from oats_vision.core.oats import Factors, arithmetic, normalised, output_error, relative_error

DEAD = 1e-12  # of the mean second moment: what counts as that of a feature without inputs, to be divided by


def refit(
    weight: Tensor,
    factors: Factors,
    gram: Tensor,
    outputs: Correlations | None = None,
    *,
    rounds: int = 3,
    steps: int = 5,
    damping: float = 0.01,
    judged: bool = True,
) -> Factors:
    """Fit the values of S, and U and V, to all second moments of the inputs; support and rank stay.

    Alternates the minimisers for U and V, which have a closed form, with conjugate gradients for the values of S.

    Args:
        weight: (out_features, in_features).
        factors: of the weight, by `oats`.
        gram: H, (in_features, in_features).
        outputs: of the gradients at the layer's outputs, which weigh errors as in `joint`; None: rows weigh alike.
        rounds: of U, V and S in turn; steps: of conjugate gradients in each.
        damping: added to the diagonal of H, as a share of each entry: of the mean, a few outlier features would set
            it far above all others.
        judged: whether to say the output's error, which takes two more products.

    Raises:
        ValueError: `gram` is not finite.
    """
    W = arithmetic(weight)
    H, D = damped(gram, W, damping)
    M = None if outputs is None else outputs.moments().to(W)
    S, U, V = factors.S.clone(), factors.U, factors.V
    mask = (S != 0).to(W)
    for _ in range(rounds):
        U, V = fit_factors(W - S, U, V, H, M)
        S = fit_values(W - U @ V, H, S, mask, steps, M)
    of_output = output_error(W, S, U, V, gram) if judged else None
    return Factors(S, U, V, relative_error(W, S, U, V, D), factors.iterations, of_output)


def damped(gram: Tensor, W: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """H as shares of the features' mean square, its diagonal grown by a share of each entry; and D, the root of that.

    Args:
        gram: H, (in_features, in_features). W: of the dtype and on the device of the results.

    Raises:
        ValueError: `gram` is not finite.
    """
    if not gram.isfinite().all():
        raise ValueError("the inputs' second moments are not finite")
    H = normalised(gram).to(W)
    D = H.diagonal().sqrt()
    H.diagonal().mul_(1 + damping).masked_fill_(H.diagonal() <= 0, DEAD)
    return H, D


def fit_factors(rest: Tensor, U: Tensor, V: Tensor, H: Tensor, M: Blocks | None = None) -> tuple[Tensor, Tensor]:
    """The U that is best with this V, and the V that is best with that one, for W - S by its outputs.

    Args:
        rest: W - S, (out_features, in_features). U: (out_features, rank). V: (rank, in_features).
        H: (in_features, in_features); M: (out_features, out_features); see `fit_values`.
    """
    if not U.shape[1]:
        return U, V
    VH = V @ H
    U = rest @ VH.T @ _inverse(VH @ V.T)
    UM = U.T if M is None else M.times(U).T
    return U, _inverse(UM @ U) @ (UM @ rest)


def _inverse(K: Tensor) -> Tensor:
    """A generalised inverse of products of columns with each other.

    Their lengths are taken out: beside a direction 1,000 times as long as the others, which an outlier feature makes,
    these would count as rounding errors.
    """
    d = K.diagonal().clamp_min(torch.finfo(K.dtype).tiny).rsqrt()
    inverse: Tensor = torch.linalg.pinv(K * d * d[:, None], hermitian=True)
    return inverse * d * d[:, None]


def fit_values(target: Tensor, H: Tensor, S: Tensor, mask: Tensor, steps: int, M: Blocks | None = None) -> Tensor:
    """Minimise trace(M (target - S) H (target - S)^T) over the values of S where `mask` is 1.

    Without M each row is a least-squares problem of its own; all rows take a step of conjugate gradients, scaled by
    the diagonals, in one matrix product. With it they are one problem.

    Args:
        target, S, mask: (out_features, in_features); S is where to start.
        H: (in_features, in_features); M: (out_features, out_features). Symmetric and positive.
    """

    def image(X: Tensor) -> Tensor:
        return (X @ H if M is None else M.times(X @ H)).mul_(mask)

    def inner(X: Tensor, Y: Tensor) -> Tensor:
        return (X * Y).sum(1, keepdim=True) if M is None else (X * Y).sum()

    scale = mask / H.diagonal()
    if M is not None:
        scale = scale / M.diagonal()[:, None]
    residual = image(target - S)
    direction = residual * scale
    energy = inner(residual, direction)
    for _ in range(steps):
        moved = image(direction)
        # a row that is solved has no direction left
        curvature = inner(direction, moved)
        step = torch.where(curvature > 0, energy / curvature, 0.0)
        S = torch.addcmul(S, step, direction)
        residual = torch.addcmul(residual, step, moved, value=-1)
        scaled = residual * scale
        previous, energy = energy, inner(residual, scaled)
        direction = scaled + torch.where(previous > 0, energy / previous, 0.0) * direction
    return S
