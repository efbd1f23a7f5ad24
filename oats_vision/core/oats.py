"""OATS: a weight as a sparse plus a low-rank matrix (Zhang & Papyan, ICLR 2025).

W ~ S + U V,   minimising |(W - S - U V) D|,   D = sqrt(second moment of the inputs)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from oats_vision.core.budget import Budget
from oats_vision.core.grid import Quantised
from oats_vision.core.lowrank import WarmLowRank, exact_low_rank
from oats_vision.core.threshold import SparseTerm, keep_largest

Solver = Literal["fast", "exact"]


@dataclass(frozen=True)
class Factors:
    """A decomposed weight `S + U V`.

    S: (out_features, in_features), dense tensor with `budget.nonzeros` non-zeros at most.
    U: (out_features, rank); V: (rank, in_features).
    error: relative error |(W - S - U V) D| / |W D|, Frobenius norms.
    iterations: of alternating thresholding, that were run.
    output_error: relative error of the layer's output, |(W - S - U V) X| / |W X|, if the method knows the inputs'
        full second moments.
    quantised: what S is made of, if its values have few bits. low_rank: what U and V are made of, if they have 8 bits.
    """

    S: Tensor
    U: Tensor
    V: Tensor
    error: float
    iterations: int
    output_error: float | None = None
    quantised: Quantised | None = None
    low_rank: tuple[Quantised, Quantised] | None = None

    @classmethod
    def sparse(cls, W: Tensor, S: Tensor, D: Tensor) -> "Factors":
        """Of a method that keeps a sparse matrix S of the weight W alone; D weighs the error's columns."""
        U, V = W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1])
        return cls(S, U, V, relative_error(W, S, U, V, D), iterations=1)

    def dense(self) -> Tensor:
        """S + U V, (out_features, in_features)."""
        return torch.addmm(self.S, self.U, self.V)


def oats(
    weight: Tensor,
    scale: Tensor,
    budget: Budget,
    *,
    iterations: int = 80,
    solver: Solver = "fast",
    extrapolation: float = 0.95,
    tolerance: float = 0.0,
    sparse_term: Callable[[Tensor, Budget], SparseTerm] = SparseTerm,
) -> Factors:
    """Decompose a weight into sparse plus low-rank (OATS, Algorithm 2).

    Args:
        weight: (out_features, in_features), any floating dtype.
        scale: D, (in_features,), finite and positive: see `column_scale`.
        budget: rank of the low-rank term and non-zeros of the sparse term.
        iterations: of alternating thresholding, at most.
        solver: `exact` is the paper's (a full SVD in each iteration), `fast` a warm-started block power iteration.
        extrapolation: of the sparse term between iterations, for `fast` only.
        tolerance: `fast` stops when ten iterations lowered the error by less than this share of it; 0: never.
        sparse_term: makes S of the `fast` iterations; `kernels.thresholding.sparse_term` is compiled.

    Returns:
        Factors in the dtype of the arithmetic: float64 for float64 weights, else float32.
    """
    W = arithmetic(weight)
    D = scale.to(W)
    A = W * D
    if solver == "exact":
        S, U, V, done = alternating_thresholding(A, budget, iterations)
    else:
        S, U, V, done = extrapolated_thresholding(
            sparse_term(A, budget), budget.rank, iterations, extrapolation, tolerance
        )
    S, V = S.div_(D), V / D
    return Factors(S, U, V, relative_error(W, S, U, V, D), done)


def arithmetic(weight: Tensor) -> Tensor:
    """The weight, row by row, in the dtype that it is decomposed in: float64 stays, all else is float32."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).contiguous()


def relative_error(W: Tensor, S: Tensor, U: Tensor, V: Tensor, D: Tensor) -> float:
    """|(W - S - U V) D| / |W D|, Frobenius norms; 0 for a zero weight."""
    norm = torch.linalg.matrix_norm(W * D)
    return float(torch.linalg.matrix_norm(torch.addmm(W - S, U, V, alpha=-1).mul_(D)) / norm) if norm > 0 else 0.0


def output_error(W: Tensor, S: Tensor, U: Tensor, V: Tensor, H: Tensor) -> float:
    """|(W - S - U V) X| / |W X| from H, the mean of x x^T over the inputs; 0 for a zero output."""
    E, H = torch.addmm(W - S, U, V, alpha=-1), normalised(H).to(W)
    lost, whole = (float(((M @ H) * M).sum().clamp_min(0)) for M in (E, W))
    return (lost / whole) ** 0.5 if whole > 0 else 0.0


def normalised(H: Tensor) -> Tensor:
    """Second moments as shares of the features' mean square: what is too large for float32 fits into it then."""
    return H / H.diagonal().mean().clamp_min(torch.finfo(H.dtype).tiny)


def alternating_thresholding(A: Tensor, budget: Budget, iterations: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The paper's iterations: S, U, V with A ~ S + U V, by exact truncated SVD (OATS, Algorithm 1)."""
    S = torch.zeros_like(A)
    for _ in range(iterations):
        U, V = exact_low_rank(A - S, budget.rank)
        S = keep_largest(A - U @ V, budget)
    return S, U, V, iterations


def extrapolated_thresholding(
    sparse: SparseTerm, rank: int, iterations: int, extrapolation: float, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same iterations with the sparse term extrapolated: L ~ A - (S + beta (S - S_previous)).

    Both terms creep towards their fixed point in steps of nearly the same direction, so that a longer
    step gets there in fewer iterations, and past the plain iteration's result. An iteration whose error rises
    restarts the extrapolation.
    """
    low_rank, A = WarmLowRank(), sparse.A
    errors: list[float] = []
    target = A.clone()  # what the low-rank term approximates
    for _ in range(iterations):
        U, V = low_rank(target, rank)
        L = torch.mm(U, V, out=target)
        errors.append(sparse.update(L, extrapolation, target))
        if len(errors) > 1 and errors[-1] > errors[-2]:
            torch.sub(A, sparse.S, out=target)
        if tolerance and len(errors) > 10 and errors[-1] > (1 - tolerance) * errors[-11]:
            break
    return sparse.S, U, V, len(errors)


def column_scale(moment: Tensor) -> Tensor:
    """D from a second moment (in_features,), made finite and positive so that it can be divided by.

    An input feature that was never active gets a scale so small (1e-4 of the root mean square of D)
    that it takes no budget from the others, and its weights stay finite. An overflow counts as the
    largest finite moment, NaN as the mean. With nothing finite and positive at all, D is one.
    """
    moment = moment.double()
    usable = moment[moment.isfinite() & (moment > 0)]
    if not len(usable):
        return torch.ones_like(moment)
    moment = moment.nan_to_num(nan=float(usable.mean()), posinf=float(usable.max())).clamp_min(0)
    return moment.sqrt().clamp_min(1e-4 * float(moment.mean().sqrt()))
