"""SparseGPT: pruning column by column, with each loss made up for by the columns still to come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oats_vision.compression.methods import LinearMethod, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from oats_vision.calibration.statistics import Statistic
    from oats_vision.compression.settings import CompressionSettings
    from oats_vision.core.budget import Budget
    from oats_vision.core.oats import Factors

DAMPING = 0.01  # share of each entry of the moments' diagonal


@register
class SparseGPT(LinearMethod):
    """Pruning with the inputs' full second moments."""

    name = "sparsegpt"
    citation = "Frantar & Alistarh, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, ICML 2023"
    pattern = "layer"
    takes_values = True

    def statistic(self, settings: CompressionSettings, in_features: int, device: torch.device) -> Statistic:
        from oats_vision.calibration.statistics import Gram

        return Gram(in_features, device)

    def decompose(self, weight: Tensor, statistic: Statistic, budget: Budget, settings: CompressionSettings) -> Factors:
        from oats_vision.calibration.statistics import Gram

        assert isinstance(statistic, Gram)
        damping = statistic.damping if budget.grid else DAMPING  # what it rounds is damped as GPTQ's
        return sparsegpt(weight, statistic.compute(), budget, damping=damping)

    def working_set(self, settings: CompressionSettings) -> tuple[int, int]:
        return 6, 5 * 8 + 4  # H, with damping, its factors and its inverse in float64; the last factor in float32


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    budget: Budget,
    *,
    block_size: int = 128,
    damping: float = DAMPING,
) -> Factors:
    """Prune column by column, and let the columns to the right make up for each loss.

    Frantar & Alistarh, "SparseGPT" (ICML 2023), Algorithm 1: with H the damped second moments of the inputs
    and C the upper Cholesky factor of its inverse, the mask of a block of columns keeps the largest
    W_ij^2 / C_jj^2, and a pruned w_j moves the rest of its row by -w_j / C_jj times row j of C. With a grid a kept
    w_j is rounded in the same pass (section 3.5), and what it loses moves the rest in the same way.

    Args:
        weight: (out_features, in_features).
        gram: mean of x x^T over the inputs, (in_features, in_features).
        budget: with pattern `layer` the mask is chosen over all rows of a block of columns, as in the paper.
        damping: added to the diagonal of H, as a share of each entry (of its mean in the paper, which a few outlier
            features set far above all others).

    Raises:
        ValueError: `gram` is not finite.
    """
    from dataclasses import replace

    import torch

    from oats_vision.core.budget import Budget
    from oats_vision.core.oats import Factors, arithmetic, output_error
    from oats_vision.core.quantise import Rounding, inverse_factor
    from oats_vision.core.threshold import keep_largest

    W = arithmetic(weight).clone()
    original, columns, pattern = W.clone(), W.shape[1], budget.pattern
    if not gram.isfinite().all():
        raise ValueError("the inputs' second moments are not finite")
    squares = gram.diagonal().double()
    dead, D = squares <= 0, squares.clamp_min(0).sqrt().to(W)
    W[:, dead] = 0.0
    C = inverse_factor(gram, damping).to(W)  # (in, in), upper
    rounding = Rounding(budget.grid, W, C.diagonal().square().reciprocal(), ~dead) if budget.grid else None
    known = torch.ones_like(W, dtype=torch.bool)  # which weights are kept, as far as that is known
    if pattern.kind == "n:m":
        block_size = max(pattern.m, block_size - block_size % pattern.m)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        block, C_block = W[:, start:end], C[start:end, start:end]
        diagonal = C_block.diagonal()
        errors = torch.empty_like(block)
        if budget.nonzeros == W.numel():  # zeros too, which would take positions otherwise
            mask = torch.ones_like(block, dtype=torch.bool)
        elif pattern.kind != "n:m":
            scores = block / diagonal
            mask = keep_largest(scores, _share(budget, len(W), columns, start, end)) != 0
        else:
            mask = torch.zeros_like(block, dtype=torch.bool)
        known[:, start:end] = mask if pattern.kind != "n:m" else True
        for j, column in enumerate(range(start, end)):
            if pattern.kind == "n:m" and j % pattern.m == 0:  # with the weights as updated so far
                group = slice(j, j + pattern.m)
                mask[:, group] = keep_largest(block[:, group] / diagonal[group], Budget(0, 0, pattern)) != 0
                known[:, start:end][:, group] = mask[:, group]
            kept = block[:, j].masked_fill(~mask[:, j], 0.0)
            if rounding:
                if column % rounding.size == 0:
                    rounding.find(column, W, known)
                kept = rounding.round(column, kept) * mask[:, j]
            errors[:, j] = (block[:, j] - kept) / diagonal[j]
            block[:, j:] -= errors[:, j, None] * C_block[j, j:]
            block[:, j] = kept
        W[:, end:] -= errors @ C[start:end, end:]
    factors = Factors.sparse(original, W, D)
    found = rounding.found(W, known) if rounding else None
    return replace(factors, output_error=output_error(original, W, factors.U, factors.V, gram), quantised=found)


def _share(budget: Budget, rows: int, columns: int, start: int, end: int) -> Budget:
    """The budget of a block of columns; the blocks' budgets add up to the whole."""
    from oats_vision.core.budget import Budget

    unit = rows if budget.pattern.kind == "row" else 1
    kept = budget.nonzeros // unit
    return Budget(0, unit * (kept * end // columns - kept * start // columns), budget.pattern)
