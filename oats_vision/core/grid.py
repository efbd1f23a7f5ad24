"""Values of few bits: the grid that they lie on, for each group of a row's columns.

A group is `group_size` neighbouring columns of a row. Its values lie on 2^b levels, equally spaced,

    value = (code - zero) * scale,    code in 0 .. 2^b - 1,

with zero = 2^(b-1) where the levels are symmetric about 0, but for one more on the side of the largest value (the
scale's sign tells which), else a code of the group's own; or `normal`, as dense as the values of a normal distribution,

    value = LEVELS[b][code] * scale,

which weights are nearer to: at 4 bits the error is 0.9 times as large. Scales are bfloat16, whose range no weight
leaves, and are rounded before values are rounded to them, so that nothing is lost by that.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

# in 127ths of the largest: least mean squared error for groups of 64 normal values with a searched range
# (eval/studies/normal_levels.py)
LEVELS = {
    2: (-100, -24, 42, 127),
    3: (-101, -62, -32, -7, 18, 45, 77, 127),
    4: (-110, -87, -68, -53, -40, -28, -16, -4, 7, 19, 31, 44, 59, 76, 97, 127),
}
HALVES = 2 * 127  # of the levels' unit, on either side of 0: every level, and every middle between two, is a whole one


@cache
def nearest_levels(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each place from -HALVES to HALVES, the nearest of `LEVELS`: its code, uint8, and the level, float32.

    Looking a place up is many times faster than searching it among the levels.
    """
    with torch.inference_mode(False):
        levels = torch.tensor(LEVELS[bits], dtype=torch.float32)
        places = torch.arange(-HALVES, HALVES + 1) / 2
        codes = torch.bucketize(places, (levels[1:] + levels[:-1]) / 2)
        return codes.to(device, torch.uint8), levels[codes].to(device)


def _places(x: Tensor) -> Tensor:
    """Of values in the levels' unit, for `nearest_levels`, all in one row: where between two halves, the upper one."""
    halves = x.mul_(2).ceil_().clamp_(-HALVES, HALVES).nan_to_num_(0)
    return halves.add_(HALVES).to(torch.int32).flatten()


@dataclass(frozen=True)
class Grid:
    """How values are rounded.

    bits: of a code, 2 to 8. group_size: columns that share a scale; 0: all of a row. symmetric: whether the levels are,
    about 0. normal: whether they are as dense as a normal distribution's values, at 2 to 4 bits.
    """

    bits: int
    group_size: int = 64
    symmetric: bool = True
    normal: bool = False

    @classmethod
    def parse(cls, values: str, group_size: int = 64, symmetric: bool = True) -> "Grid":
        """Read `int4` or `nf4`."""
        return cls(int(values[-1]), group_size, symmetric, values.startswith("nf"))

    def __str__(self) -> str:
        size = f"groups of {self.group_size}" if self.group_size else "whole rows"
        return f"{self.values} in {size}{'' if self.symmetric else ', own zeros'}"

    @property
    def values(self) -> str:
        """The format of a value."""
        return f"{'nf' if self.normal else 'int'}{self.bits}"

    @property
    def short(self) -> str:
        """For tables: format, and columns of a group."""
        return f"{self.values}/{self.group_size or 'row'}"

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def groups(self, in_features: int) -> int:
        """Scales of a row."""
        return -(-in_features // (self.group_size or in_features)) if in_features else 0

    def by_group(self, W: Tensor) -> Tensor:
        """Columns in their groups, (rows, groups, size): zeros where the last group is shorter."""
        groups = self.groups(W.shape[1])
        size = self.group_size or W.shape[1]
        return torch.nn.functional.pad(W, (0, groups * size - W.shape[1])).view(len(W), groups, size)

    def by_column(self, X: Tensor, in_features: int) -> Tensor:
        """What is known of each group, (rows, groups), for each column: (rows, in_features)."""
        if X.shape[1] == 1:
            return X  # of all columns
        return X.repeat_interleave(self.group_size, dim=1)[:, :in_features]


@dataclass(frozen=True)
class Scales:
    """Of a matrix: scale (rows, groups), bfloat16, not 0; zero (rows, groups), uint8, None where symmetric."""

    grid: Grid
    scale: Tensor
    zero: Tensor | None

    @classmethod
    def empty(cls, grid: Grid, W: Tensor) -> "Scales":
        """Of a matrix (rows, in_features), to be filled."""
        shape = len(W), grid.groups(W.shape[1])
        zero = None if grid.symmetric else W.new_empty(shape, dtype=torch.uint8)
        return cls(grid, W.new_empty(shape, dtype=torch.bfloat16), zero)

    def codes(self, W: Tensor) -> Tensor:
        """The nearest levels of a matrix (rows, in_features), uint8."""
        scale, zero = self._by_column(W.shape[1], W.dtype)
        if self.grid.normal:
            codes, _ = nearest_levels(self.grid.bits, W.device)
            return codes.index_select(0, _places(W / scale)).view(W.shape)
        return (W / scale + zero).round_().clamp_(0, self.grid.levels - 1).to(torch.uint8)

    def rounded(self, W: Tensor) -> Tensor:
        """A matrix (rows, in_features) with each value at its nearest level: what its codes stand for."""
        scale, zero = self._by_column(W.shape[1], W.dtype)
        if self.grid.normal:
            _, levels = nearest_levels(self.grid.bits, W.device)
            return levels.index_select(0, _places(W / scale)).view(W.shape).to(W.dtype).mul_(scale)
        return (W / scale + zero).round_().clamp_(0, self.grid.levels - 1).sub_(zero).mul_(scale)

    def values(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What codes (rows, in_features) stand for."""
        if self.grid.normal:
            levels = torch.tensor(LEVELS[self.grid.bits], dtype=dtype, device=codes.device)
            scale, _ = self._by_column(codes.shape[1], dtype)
            return levels.index_select(0, codes.int().reshape(-1)).view(codes.shape).mul_(scale)
        scale, zero = self._by_column(codes.shape[1], dtype)
        return (codes.to(dtype) - zero).mul_(scale)

    def of_group(self, group: int) -> "Scales":
        """Of the columns of one group."""
        here = slice(group, group + 1)
        zero = None if self.zero is None else self.zero[:, here]
        return Scales(replace(self.grid, group_size=0), self.scale[:, here], zero)

    def set_group(self, group: int, found: "Scales") -> None:
        """Take over those of one group."""
        self.scale[:, group] = found.scale[:, 0]
        if self.zero is not None and found.zero is not None:
            self.zero[:, group] = found.zero[:, 0]

    def _by_column(self, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | int]:
        scale = self.grid.by_column(self.scale.to(dtype), in_features)
        if self.zero is None:
            return scale, self.grid.levels // 2
        return scale, self.grid.by_column(self.zero.to(dtype), in_features)


@dataclass(frozen=True)
class Quantised:
    """A sparse or dense matrix of few bits.

    codes: (rows, in_features), uint8. kept: bool of that shape, where it has a value; None: everywhere.
    """

    codes: Tensor
    kept: Tensor | None
    scales: Scales

    @property
    def count(self) -> int:
        """Values that are kept."""
        return self.codes.numel() if self.kept is None else int(self.kept.sum())

    def dense(self) -> Tensor:
        """(rows, in_features), float32, with its zeros."""
        values = self.scales.values(self.codes)
        return values if self.kept is None else values * self.kept
