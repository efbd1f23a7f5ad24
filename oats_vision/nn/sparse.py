"""The sparse term of a compressed layer, packed: with floating values, or with values of few bits."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oats_vision.core.grid import Grid, Quantised, Scales
from oats_vision.kernels.codes import pack_codes, unpack_codes
from oats_vision.kernels.few_bits import FewBitsMatrix, FewBitsWeight, kernels_take
from oats_vision.kernels.packed import Part, PartShape, unpack
from oats_vision.kernels.product import check_ones, expand, only_runs
from oats_vision.nn.scale_bits import from_bits, to_bits


class PackedSparse(nn.Module):
    """A sparse matrix S (out_features, in_features).

    Args:
        values: (nonzeros,), any floating dtype: its non-zeros in row order.
        bitmask: (out_features, ceil(in_features / 8)), uint8: where they are, as in `PackedWeight`.
        in_features: the columns of S.
    """

    bitmask: Tensor

    def __init__(self, values: Tensor, bitmask: Tensor, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("bitmask", bitmask)

    @classmethod
    def pack(cls, S: Tensor, dtype: torch.dtype) -> "PackedSparse":
        """Pack a dense S (out_features, in_features); values are rounded to `dtype`."""
        mask = S != 0
        return cls(S[mask].to(dtype), pack_mask(mask), S.shape[1])

    def mask(self) -> Tensor:
        """Where the non-zeros are: bool (out_features, in_features)."""
        return unpack(self.bitmask, self.in_features)

    def dense(self) -> Tensor:
        """S with its zeros, (out_features, in_features), dtype of the values.

        Raises:
            ValueError: the bitmask does not fit the values.
        """
        return expand(self.values, self.bitmask, self.in_features)

    def clear(self) -> None:
        """Make all values 0, in place."""
        self.values.data.zero_()


class QuantisedSparse(nn.Module):
    """A matrix S (out_features, in_features) whose values have few bits; see `core/grid.py`.

    Args:
        codes: as `pack_codes` makes them of the values' codes, in row order.
        scales: (out_features, groups), int16: the bits of bfloat16.
        zeros: (out_features, groups), uint8; None where levels are symmetric.
        bitmask: as of `PackedSparse`; None where all weights are kept.
        count: of codes.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bitmask: Tensor | None

    def __init__(
        self,
        grid: Grid,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bitmask: Tensor | None,
        count: int,
        in_features: int,
    ) -> None:
        super().__init__()
        self.grid, self.count, self.in_features = grid, count, in_features
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("bitmask", bitmask)

    @classmethod
    def pack(cls, parts: Sequence[Quantised]) -> "QuantisedSparse":
        """Pack matrices of one grid, one below the other."""
        grid, in_features = parts[0].scales.grid, parts[0].codes.shape[1]
        codes = torch.cat([part.codes for part in parts])
        scales = to_bits(torch.cat([part.scales.scale for part in parts]))
        zeros = None if grid.symmetric else torch.cat([_known(part.scales.zero) for part in parts])
        if all(part.count == part.codes.numel() for part in parts):
            return cls(grid, pack_codes(codes.flatten(), grid.bits), scales, zeros, None, codes.numel(), in_features)
        kept = torch.cat([torch.ones_like(p.codes, dtype=torch.bool) if p.kept is None else p.kept for p in parts])
        chosen = codes[kept]
        return cls(grid, pack_codes(chosen, grid.bits), scales, zeros, pack_mask(kept), len(chosen), in_features)

    def mask(self) -> Tensor:
        """Where a value is kept: bool (out_features, in_features)."""
        if self.bitmask is None:
            return torch.ones(len(self.scales), self.in_features, dtype=torch.bool, device=self.codes.device)
        return unpack(self.bitmask, self.in_features)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """S with its zeros, (out_features, in_features).

        Raises:
            ValueError: the bitmask does not fit the codes.
        """
        rows = self.scales.shape[0]
        U, V = self.scales.new_empty(rows, 0).float(), self.scales.new_empty(0, self.in_features).float()
        weight = self.with_factors(U, V, None, [Part(rows, 0)])
        if kernels_take(weight):
            return FewBitsMatrix(weight).dequantise().to(dtype)
        codes = unpack_codes(self.codes, self.grid.bits, self.count)
        scales = Scales(self.grid, from_bits(self.scales), self.zeros)
        if self.bitmask is None:
            return scales.values(codes.view(len(self.scales), self.in_features), dtype)
        mask = self.mask()
        if only_runs((self.bitmask,)):
            check_ones(mask, self.count)
        whole = torch.zeros(mask.shape, dtype=torch.uint8, device=mask.device).masked_scatter(mask, codes)
        return scales.values(whole, dtype) * mask

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes, scales, zeros and bitmask."""
        own: dict[str, Any] = self._buffers  # faster than attributes of an nn.Module
        return own["codes"], own["scales"], own["zeros"], own["bitmask"]

    def with_factors(
        self,
        U: Tensor,
        V: Tensor,
        bias: Tensor | None,
        parts: Sequence[PartShape],
        scales: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> FewBitsWeight:
        """S + U V as the kernels take it: these very tensors, no copies.

        Args:
            scales: of U and of V, if they have 8 bits.
        """
        grid = self.grid
        return FewBitsWeight(
            grid.bits, grid.normal, grid.group_size, self.count, *self.tensors(), U, V, *scales, bias, parts
        )

    def clear(self) -> None:
        """Make all values 0, in place."""
        self.scales.zero_()


def pack_mask(mask: Tensor) -> Tensor:
    """The bitmask of a bool (out_features, in_features), as in `PackedWeight`."""
    bits = F.pad(mask, (0, -mask.shape[1] % 8)).view(len(mask), -1, 8).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def _known(zero: Tensor | None) -> Tensor:
    assert zero is not None
    return zero
