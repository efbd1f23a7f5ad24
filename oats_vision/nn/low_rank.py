"""The low-rank term of a compressed layer: U and V in a floating dtype, or in 8 bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oats_vision.core.grid import Quantised
from oats_vision.nn.scale_bits import from_bits, to_bits


class LowRank(nn.Module):
    """U (out_features, largest rank of a part) and V (sum of the parts' ranks, in_features), in one floating dtype.

    The rows of U that belong to a part multiply that part's rows of V.
    """

    def __init__(self, U: Tensor, V: Tensor) -> None:
        super().__init__()
        self.U = nn.Parameter(U, requires_grad=False)
        self.V = nn.Parameter(V, requires_grad=False)

    @classmethod
    def pack(cls, parts: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> "LowRank":
        """Of each part's U and V, rounded to `dtype`."""
        return cls(*(X.to(dtype) for X in stacked(parts)))

    def floating(self) -> tuple[Tensor, Tensor]:
        """U and V."""
        return self.U, self.V

    def clear(self) -> None:
        """Make U 0, in place."""
        self.U.data.zero_()


class QuantisedLowRank(nn.Module):
    """The same in 8 bits, with a scale for each row.

    Args:
        U, V: int8, of the shapes of `LowRank`.
        U_scale: (out_features,), V_scale: (sum of the parts' ranks,), int16: the bits of bfloat16.
    """

    U: Tensor
    V: Tensor
    U_scale: Tensor
    V_scale: Tensor

    def __init__(self, U: Tensor, V: Tensor, U_scale: Tensor, V_scale: Tensor) -> None:
        super().__init__()
        for name, tensor in (("U", U), ("V", V), ("U_scale", U_scale), ("V_scale", V_scale)):
            self.register_buffer(name, tensor)

    @classmethod
    def pack(cls, parts: list[tuple[Quantised, Quantised]]) -> "QuantisedLowRank":
        """Of each part's U and V."""
        codes = stacked([(_signed(U.codes), _signed(V.codes)) for U, V in parts])
        scales = [torch.cat([X.scales.scale[:, 0] for X in of_all]) for of_all in zip(*parts, strict=True)]
        return cls(*codes, *map(to_bits, scales))

    def floating(self) -> tuple[Tensor, Tensor]:
        """U and V in float32."""
        pairs = (self.U, self.U_scale), (self.V, self.V_scale)
        U, V = (codes.float() * from_bits(scale).float()[:, None] for codes, scale in pairs)
        return U, V

    def clear(self) -> None:
        """Make U 0, in place."""
        self.U.zero_()


def _signed(codes: Tensor) -> Tensor:
    return (codes.short() - 128).to(torch.int8)


def stacked(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """U and V of all parts, one below the other; those U with fewer columns end in zeros."""
    rank = max(U.shape[1] for U, _ in parts)
    return torch.cat([F.pad(U, (0, rank - U.shape[1])) for U, _ in parts]), torch.cat([V for _, V in parts])
