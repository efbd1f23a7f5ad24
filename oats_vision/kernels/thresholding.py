"""The sparse half of OATS's iterations by a compiled kernel: one pass over the matrices in place of six."""

import torch
from torch import Tensor

from oats_vision.core.budget import Budget
from oats_vision.core.threshold import SparseTerm
from oats_vision.kernels import native


def sparse_term(A: Tensor, budget: Budget) -> SparseTerm:
    """S of each iteration on A (out_features, in_features), compiled where possible, for `oats(sparse_term=)`.

    The kernel takes float32 on the CPU under pattern `row`; the results are those of `SparseTerm`.
    """
    takes = A.device.type == "cpu" and A.dtype == torch.float32 and budget.pattern.kind == "row"
    return CompiledSparseTerm(A, budget) if takes and native.available() else SparseTerm(A, budget)


class CompiledSparseTerm(SparseTerm):
    """S of the iterations, updated in place."""

    def __init__(self, A: Tensor, budget: Budget) -> None:
        super().__init__(A, budget)
        self._thresholds = A.new_zeros(len(A))
        self._keep = budget.nonzeros // max(len(A), 1)  # in each row

    def update(self, L: Tensor, extrapolation: float, target: Tensor) -> float:
        """As in `SparseTerm`."""
        squares = native.sparse_step(
            self.A, L, self.S, target, self._thresholds, keep=self._keep, extrapolation=extrapolation
        )
        return float(squares**0.5)
