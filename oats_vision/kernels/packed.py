"""One value for the weights of a compressed layer, which every product takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from oats_vision.kernels.matrix import MatrixCache


class PartShape(Protocol):
    """Rows of U and of V that belong together: those of one matrix of a fused weight."""

    @property
    def out_features(self) -> int: ...
    @property
    def rank(self) -> int: ...


class Part(NamedTuple):
    """A `PartShape` and no more."""

    out_features: int
    rank: int


class PackedWeight(NamedTuple):
    """W = S + U V (out_features, in_features) and a bias, with S packed.

    S is packed as in the `sparse-bitmask` format of compressed-tensors. Bit `j % 8` (least significant first) of byte
    `j // 8` of a row says whether column `j` holds a value; rows are padded to a byte, with zeros.

    Attributes:
        values: (nonzeros,), the non-zeros of S in row order.
        bitmask: (out_features, ceil(in_features / 8)), uint8: where they are.
        U: (out_features, largest rank of a part), in the dtype of the values, as V and the bias.
        V: (sum of the parts' ranks, in_features).
        bias: (out_features,), or None.
        parts: from top to bottom; the rows of U that belong to a part multiply that part's rows of V.
        cache: kept beside these tensors, so that they are checked once and not in each product.
    """

    values: Tensor
    bitmask: Tensor
    U: Tensor
    V: Tensor
    bias: Tensor | None
    parts: Sequence[PartShape]
    cache: MatrixCache | None = None

    @classmethod
    def of_sparse(cls, values: Tensor, bitmask: Tensor, in_features: int) -> PackedWeight:
        """W = S."""
        rows = len(bitmask)
        U, V = values.new_empty(rows, 0), values.new_empty(0, in_features)
        return cls(values.contiguous(), bitmask.contiguous(), U, V, None, [Part(rows, 0)])

    @property
    def in_features(self) -> int:
        return self.V.shape[1]

    def heights(self) -> list[int]:
        """Rows of each part."""
        return [part.out_features for part in self.parts]

    def ranks(self) -> list[int]:
        """Rank of each part."""
        return [part.rank for part in self.parts]

    def U_parts(self) -> list[Tensor]:
        """U of each part, (out_features, rank) without the columns that only others have."""
        return [u[:, : part.rank] for u, part in zip(self.U.split(self.heights()), self.parts, strict=True)]

    def U_blocks(self) -> Tensor:
        """One U for all rows of V, with zeros between the parts: (out_features, sum of the parts' ranks)."""
        blocks: Tensor = torch.block_diag(*self.U_parts())
        return blocks


def unpack(bitmask: Tensor, in_features: int) -> Tensor:
    """Where the non-zeros are: bool (out_features, in_features)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    # by its name, since `>>` has no equal in ONNX, nor has `& 1`
    bits = torch.bitwise_right_shift(bitmask.unsqueeze(-1), shifts) % 2
    return bits.bool().flatten(1)[:, :in_features]
