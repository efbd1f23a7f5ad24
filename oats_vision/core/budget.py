"""How many parameters the sparse and the low-rank term of a layer may keep."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from oats_vision.core.grid import Grid


@dataclass(frozen=True)
class Pattern:
    """Where the sparse term may keep its non-zeros.

    `row`: the same number in every row; `layer`: anywhere in the layer; `n:m`: `n` in each group of
    `m` neighbours of a row (the last group of a row may be shorter).
    """

    kind: Literal["row", "layer", "n:m"] = "row"
    n: int = 0
    m: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `row`, `layer` or N:M such as `2:4`.

        Raises:
            ValueError: neither of them, or not 0 < N < M.

        >>> Pattern.parse("2:8")
        Pattern(kind='n:m', n=2, m=8)
        """
        if text in ("row", "layer"):
            return cls(text)  # type: ignore[arg-type]  # narrowed by the line above
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if not match or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(f"pattern must be 'row', 'layer' or N:M with 0 < N < M such as '2:4', got {text!r}")
        return cls("n:m", int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.kind == "n:m" else self.kind


@dataclass(frozen=True)
class Budget:
    """The size of one decomposition: rank of L, and non-zeros of S in the whole matrix.

    grid: that the values of S are rounded to, if they have few bits. int8_factors: whether U and V have 8 bits then.
    """

    rank: int
    nonzeros: int
    pattern: Pattern = Pattern()
    grid: Grid | None = None
    int8_factors: bool = False

    def parameters(self, out_features: int, in_features: int) -> int:
        """Parameters kept: non-zeros of S and entries of U and V (the bitmask of S not counted)."""
        return self.nonzeros + self.rank * (out_features + in_features)


@dataclass(frozen=True)
class Allocation:
    """How the parameters of each layer are shared out.

    rate: share removed, below 1. rank_ratio: share of those kept that goes to the low-rank term, in [0, 1].
    pattern: where S may keep its non-zeros. grid, int8_factors: as of `Budget`. `of` makes one from what a user gives;
    its values are trusted.
    """

    rate: float
    rank_ratio: float
    pattern: Pattern = Pattern()
    grid: Grid | None = None
    int8_factors: bool = False

    @classmethod
    def of(
        cls,
        rate: float | None = None,
        rank_ratio: float | None = None,
        pattern: Pattern = Pattern(),
        density: float | None = None,
    ) -> Allocation:
        """Complete and check what is given: N:M fixes the density of S, so that rate and rank ratio give each other.

        Defaults are rate 0.5 and rank_ratio 0.2. For N:M, `1 - rate = (N/M) / (1 - rank_ratio)`, and so for a density
        that is given; the rate is below 0 where U and V come on top of all weights. At density 1 the default of
        rank_ratio is 0.

        Raises:
            ValueError: out of range, or a rate and a rank ratio that N:M cannot both meet.

        >>> Allocation.of(rank_ratio=0.2, pattern=Pattern.parse("2:4")).rate
        0.375
        """
        if rate is not None and not 0 < rate < 1:
            raise ValueError(f"rate must be in (0, 1), got {rate:g}")
        if rank_ratio is not None and not 0 <= rank_ratio <= 1:
            raise ValueError(f"rank_ratio must be in [0, 1], got {rank_ratio:g}")
        if density is not None:
            return cls._of_density(density, rate, rank_ratio, pattern)
        if pattern.kind != "n:m":
            return cls(0.5 if rate is None else rate, 0.2 if rank_ratio is None else rank_ratio, pattern)

        density = pattern.n / pattern.m
        if rate is None:
            rank_ratio = 0.2 if rank_ratio is None else rank_ratio
            if rank_ratio >= 1 - density:
                raise ValueError(f"rank_ratio must be below {1 - density:g} with pattern {pattern}, got {rank_ratio:g}")
            return cls(1 - density / (1 - rank_ratio), rank_ratio, pattern)
        if density > 1 - rate + 1e-9:
            raise ValueError(f"rate must be at most {1 - density:g} with pattern {pattern}, got {rate:g}")
        implied = max(0.0, round(1 - density / (1 - rate), 12))
        if rank_ratio is not None and abs(rank_ratio - implied) > 1e-3:
            raise ValueError(
                f"rank_ratio must be {implied:.4g} with pattern {pattern} and rate {rate:g} (or leave one out), "
                f"got {rank_ratio:g}"
            )
        return cls(rate, implied, pattern)

    @classmethod
    def _of_density(cls, density: float, rate: float | None, rank_ratio: float | None, pattern: Pattern) -> Allocation:
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density:g}")
        if rate is not None:
            raise ValueError(f"density {density:g} and rate {rate:g} say the same thing: leave one of them out")
        if pattern.kind == "n:m":
            raise ValueError(f"density must be left out with pattern {pattern}, which fixes it")
        rank_ratio = (0.0 if density == 1 else 0.2) if rank_ratio is None else rank_ratio
        if rank_ratio >= 1:
            raise ValueError("rank_ratio must be below 1 with a density")
        return cls(1 - density / (1 - rank_ratio), rank_ratio, pattern)

    def budget(self, out_features: int, in_features: int) -> Budget:
        """Rank and non-zeros of one layer (OATS, section 3.1); row-wise budgets are rounded down to whole rows.

        Args:
            out_features, in_features: shape of the weight, `m` and `n` in the paper.

        Raises:
            ValueError: a rank ratio above 0 (below 1) leaves rank 0 (no non-zeros).

        >>> Allocation(rate=0.5, rank_ratio=0.25).budget(1024, 1024)
        Budget(rank=64, nonzeros=393216, pattern=Pattern(kind='row', n=0, m=0), grid=None, int8_factors=False)
        """
        m, n, rank_ratio, pattern = out_features, in_features, self.rank_ratio, self.pattern
        kept = (1 - self.rate) * m * n
        rank = _floor(rank_ratio * kept / (m + n))
        if pattern.kind == "row":
            nonzeros = m * _floor((1 - rank_ratio) * kept / m)
        elif pattern.kind == "layer":
            nonzeros = _floor((1 - rank_ratio) * kept)
        else:
            groups, rest = divmod(n, pattern.m)
            nonzeros = m * (groups * pattern.n + min(rest, pattern.n))
        if rank == 0 and rank_ratio > 0:
            raise ValueError(
                f"rank_ratio {rank_ratio:g} at rate {self.rate:g} leaves rank 0 for a {m} x {n} weight: "
                f"use rank_ratio 0 (no low-rank term) or at least {(m + n) / kept:.3g}"
            )
        if nonzeros == 0 and rank_ratio < 1:
            raise ValueError(
                f"rank_ratio {rank_ratio:g} at rate {self.rate:g} leaves no non-zeros for a {m} x {n} weight: "
                "use rank_ratio 1 (no sparse term) or a smaller one"
            )
        return Budget(rank, nonzeros, pattern, self.grid, self.int8_factors and rank > 0)


def _floor(x: float) -> int:
    """Floor that forgives the last bits: 0.8 * 0.5 * 1000 is 400, however it was rounded."""
    return math.floor(x * (1 + 1e-12) + 1e-9)
