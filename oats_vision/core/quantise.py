"""Rounding a weight to few bits: RTN, GPTQ, and GPTQ on the support of S.

GPTQ (Frantar et al., ICLR 2023, Algorithm 1) rounds column by column and lets the columns to the right make up for each
loss, by the upper Cholesky factor C of the inverse of H = E[x x^T]: with the error e = (w_j - q_j) / C_jj of column j,
the rest of the row moves by -e times row j of C. Outside of the support of S, q_j is 0, as in SparseGPT.
"""

from dataclasses import replace

import torch
from torch import Tensor

from oats_vision.core.grid import LEVELS, Grid, Quantised, Scales
from oats_vision.core.oats import Factors, arithmetic, output_error, relative_error
from oats_vision.core.refit import damped, fit_factors, fit_values

SHRUNK = torch.linspace(1.1, 0.4, 29).tolist()  # ranges that are tried, as shares of the one that holds all values
FACTORS = Grid(8, group_size=0)  # of U and V: a scale for each row
FITTED = 5  # steps of conjugate gradients, before values are rounded
AT_ONCE = {False: 1 << 17, True: 1 << 24}  # values that are rounded at once to find ranges: of a cache, or of a GPU
BLOCK = 128  # columns whose losses move those to the right at once


def rounded(weight: Tensor, found: Quantised, gram: Tensor | None, D: Tensor) -> Factors:
    """Of a weight that is rounded as a whole.

    Args:
        gram: mean of x x^T over the inputs, if it is known. D: weighs the error's columns, (in_features,).
    """
    W = arithmetic(weight)
    of_W = Factors.sparse(W, found.dense().to(W), D.to(W))
    lost = None if gram is None else output_error(W, of_W.S, of_W.U, of_W.V, gram)
    return replace(of_W, output_error=lost, quantised=found)


def find_scales(W: Tensor, grid: Grid, weights: Tensor | None = None, kept: Tensor | None = None) -> Scales:
    """For each group the range whose rounding errors are least.

    Args:
        W: (rows, in_features), float32 or better.
        weights: (in_features,), of each column's squared error; None: the range that holds all values.
        kept: bool, (rows, in_features): which values count.
    """
    counted = W if kept is None else W * kept
    groups = grid.by_group(counted)
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    if weights is None:
        return _scales(grid, low, high)
    cost = weights.to(W).expand_as(W) if kept is None else weights.to(W) * kept
    at_once = max(AT_ONCE[W.is_cuda] // max(W.numel(), 1), 1)
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for shares in torch.tensor(SHRUNK).to(W).split(at_once):
        many = counted.repeat(len(shares), 1)  # the ranges' matrices, one below the other
        scales = _scales(grid, *((shares[:, None, None] * end).flatten(0, 1) for end in (low, high)))
        lost = (scales.rounded(many) - many).square_().view(-1, *W.shape).mul_(cost).flatten(0, 1)
        least_here, which = grid.by_group(lost).sum(2).view(-1, *low.shape).min(0)
        better = least_here < least
        best, least = torch.where(better, shares[which], best), torch.where(better, least_here, least)
    return _scales(grid, low * best, high * best)


def _scales(grid: Grid, low: Tensor, high: Tensor) -> Scales:
    """Of levels that reach from `low`, at most 0, to `high`, at least 0."""
    tiny = torch.finfo(torch.bfloat16).tiny
    if grid.symmetric:
        # the largest value is to be the largest level
        largest = LEVELS[grid.bits][-1] if grid.normal else -grid.levels // 2
        scale = torch.where(high > -low, high, low) / largest
        return Scales(grid, torch.where(scale.abs() < tiny, tiny, scale).bfloat16(), None)
    scale = ((high - low) / (grid.levels - 1)).clamp_min(tiny).bfloat16()
    return Scales(grid, scale, (-low / scale.to(low)).round_().clamp_(0, grid.levels - 1).to(torch.uint8))


def nearest(weight: Tensor, grid: Grid) -> Quantised:
    """Round each value to the nearest level of a range that holds all of its group (RTN)."""
    W = arithmetic(weight)
    scales = find_scales(W, grid)
    return Quantised(scales.codes(W), None, scales)


def gptq(
    weight: Tensor,
    gram: Tensor,
    grid: Grid,
    kept: Tensor | None = None,
    *,
    act_order: bool = False,
    factor: Tensor | None = None,
    damping: float = 0.01,
) -> Quantised:
    """Round column by column; the columns to the right make up for each loss.

    Args:
        weight: (out_features, in_features).
        gram: H, mean of x x^T over the inputs, (in_features, in_features).
        kept: bool, (out_features, in_features): the others are rounded to 0; None: all are kept.
        act_order: columns of the largest inputs first, with scales that are found before; else from left to right, each
            group's scales found when its turn comes.
        factor: C, by `inverse_factor`, where it is known and columns go from left to right. damping: of it, if not.

    Raises:
        ValueError: `gram` is not finite.
    """
    if not gram.isfinite().all():
        raise ValueError("the inputs' second moments are not finite")
    W, squares, columns = arithmetic(weight).clone(), gram.diagonal().double().clamp_min(0), len(gram)
    order = squares.argsort(descending=True, stable=True) if act_order else torch.arange(columns, device=W.device)
    if factor is None or act_order:
        factor = inverse_factor(gram[order][:, order], damping)
    C = factor.to(W)
    cost = C.diagonal()[order.argsort()].square().reciprocal()
    rounding = Rounding(grid, W, cost, squares > 0)
    if act_order:
        rounding.scales = find_scales(W, grid, rounding.cost, rounding.counted(kept))
    W, support = W[:, order], None if kept is None else kept[:, order]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty_like(W[:, start:end])
        for i, j in enumerate(order[start:end].tolist(), start):
            if not act_order and j % rounding.size == 0:
                last = min(j + rounding.size, columns)
                if last > end:  # what comes after this block is not moved by it yet
                    moved = W.clone()
                    moved[:, end:last] -= errors[:, : i - start] @ C[start:i, end:last]
                rounding.find(j, moved if last > end else W, kept)
            w = W[:, i]
            whole = rounding.round(j, w)
            if support is not None:
                whole = whole * support[:, i]
            errors[:, i - start] = error = (w - whole) / C[i, i]
            W[:, i + 1 : end].addr_(error, C[i, i + 1 : end], alpha=-1)
        W[:, end:].addmm_(errors, C[start:end, end:], alpha=-1)
    return rounding.found(W if not act_order else W[:, order.argsort()], kept)


class Rounding:
    """Columns of a matrix rounded one after another.

    Args:
        grid: that they are rounded to.
        W: (rows, in_features), whose shape and dtype it is.
        cost: (in_features,), of a column's squared error: 1 / C_jj^2, which is what is left of it once the columns to
            the right have made up for it. The inputs' mean squares tell less: ranges are 4% worse by them at 3 bits.
        seen: bool, (in_features,), of columns with inputs: others decide no range, but for groups of such alone.
    """

    def __init__(self, grid: Grid, W: Tensor, cost: Tensor, seen: Tensor) -> None:
        self.size = grid.group_size or W.shape[1]
        none = grid.by_column(grid.by_group(seen.float()[None]).amax(2) == 0, W.shape[1])[0]
        self.counts = seen | none
        cost = torch.where(none, 1.0, cost * seen)
        self.cost = cost / cost.mean().clamp_min(torch.finfo(cost.dtype).tiny)
        self.scales, self._shape = Scales.empty(grid, W), W.shape

    def find(self, column: int, W: Tensor, kept: Tensor | None) -> None:
        """Find the scales of the group that begins with a column, for what its columns have become by now."""
        group = slice(column, column + self.size)
        grid = replace(self.scales.grid, group_size=0)
        found = find_scales(W[:, group], grid, self.cost[group], self.counted(kept)[:, group])
        self.scales.set_group(column // self.size, found)

    def counted(self, kept: Tensor | None) -> Tensor:
        """Which values decide a range: bool, (rows, in_features)."""
        return self.counts.expand(self._shape) if kept is None else kept & self.counts

    def round(self, column: int, w: Tensor) -> Tensor:
        """A column (rows,), rounded."""
        return self.scales.of_group(column // self.size).rounded(w[:, None])[:, 0]

    def found(self, W: Tensor, kept: Tensor | None) -> Quantised:
        """All columns in codes; of those that are not kept the code counts for nothing.

        Args:
            W: each column as it was when its turn came, or as it was rounded.
        """
        return Quantised(self.scales.codes(W), kept, self.scales)


def quantised(
    weight: Tensor,
    factors: Factors,
    gram: Tensor,
    grid: Grid,
    kept: Tensor | None,
    *,
    rounds: int = 2,
    factor: Tensor | None = None,
    int8_factors: bool = False,
) -> Factors:
    """Round the values of S, fit U and V to what rounding leaves, and round them if they are to have 8 bits.

    Args:
        weight: W, (out_features, in_features).
        factors: of the weight.
        gram: H, mean of x x^T over the inputs, (in_features, in_features).
        kept, factor: where S has values, and C, as in `gptq`.
        rounds: of S, and of U and V after it; without these one is enough.

    Raises:
        ValueError: `gram` is not finite.
    """
    W, S, U, V = arithmetic(weight), factors.S, factors.U, factors.V
    H, D = damped(gram, W)
    for _ in range(rounds if U.shape[1] else 1):
        rest = W - U @ V
        S = rest if kept is None else fit_values(rest, H, S * kept, kept.to(W), FITTED)
        found = gptq(S, gram, grid, kept, factor=factor)
        S = found.dense().to(W)
        U, V = fit_factors(W - S, U, V, H)
    low_rank = round_factors(W - S, U, V, gram, factor) if int8_factors else None
    if low_rank:
        U, V = (one.dense().to(W) for one in low_rank)
    error, of_output = relative_error(W, S, U, V, D), output_error(W, S, U, V, gram)
    return Factors(S, U, V, error, factors.iterations, of_output, found, low_rank)


def round_factors(
    rest: Tensor, U: Tensor, V: Tensor, gram: Tensor, factor: Tensor | None = None
) -> tuple[Quantised, Quantised]:
    """U and V in 8 bits: V as GPTQ does it, then U to the nearest level, once it is fitted to that V.

    Args:
        rest: W - S, (out_features, in_features). U: (out_features, rank). V: (rank, in_features).
        gram, factor: as in `gptq`.
    """
    H, _ = damped(gram, V)
    size = ((V @ H) * V).sum(1, keepdim=True).clamp_min(torch.finfo(V.dtype).tiny).sqrt()
    rounded_V = gptq(V / size, gram, FACTORS, factor=factor)  # with rows of one size, entries of U's rows count alike
    U, _ = fit_factors(rest, U, rounded_V.dense().to(V), H)
    return nearest(U, FACTORS), rounded_V


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """C, of a mean of x x^T (in_features, in_features); features without inputs count as 1.

    Args:
        damping: share by which each entry of the diagonal grows; by more if need be.

    Raises:
        ValueError: the moments are far from positive definite.
    """
    H = gram.double().clone()
    H.diagonal()[H.diagonal() <= 0] = 1.0
    for attempt in range(8):
        damped = H.clone()
        damped.diagonal().mul_(1 + damping * 10**attempt)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                return upper
    raise ValueError("the inputs' second moments are not a positive definite matrix")
