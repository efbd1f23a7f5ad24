"""Products with values of few bits, straight from their packed codes, and these values spread out."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from oats_vision.core.grid import LEVELS
from oats_vision.kernels import native
from oats_vision.kernels.codes import WIDTHS, packed_bytes
from oats_vision.kernels.matrix import Cache, buffer, checked_parts, one_pass
from oats_vision.kernels.native import INT8, TYPES, address
from oats_vision.kernels.packed import PartShape
from oats_vision.kernels.product import ONE_PASS_TOKENS, asks_for_gradients, only_runs

# without wide registers more tokens are faster by a dense product, for which values are spread out once
ONE_PASS_TOKENS_PORTABLE = 2


class FewBitsWeight(NamedTuple):
    """W = S + U V (out_features, in_features) and a bias, where the values of S have few bits; see `core/grid.py`.

    Attributes:
        bits: of a code: 2 to 6, or 8. normal: whether levels are those of `LEVELS` and not equally spaced; 2 to 4 bits.
        group_size: columns that share a scale, a multiple of 16; 0: all of a row.
        code_count: of codes that there are.
        codes: as `pack_codes` makes them, in row order.
        scales: (out_features, groups), int16: the bits of bfloat16.
        zeros: (out_features, groups), uint8; None: 2^(bits - 1).
        bitmask: as of `PackedWeight`; None where all weights are kept.
        U, V, parts: as of `PackedWeight`; U and V in one floating dtype, or int8 with a scale for each of their rows.
        U_scale: (out_features,), int16: the bits of bfloat16. None where U and V are floating.
        V_scale: (sum of the parts' ranks,), likewise.
        bias: (out_features,), any floating dtype; or None.
    """

    bits: int
    normal: bool
    group_size: int
    code_count: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bitmask: Tensor | None
    U: Tensor
    V: Tensor
    U_scale: Tensor | None
    V_scale: Tensor | None
    bias: Tensor | None
    parts: Sequence[PartShape]


def tensors_of(weight: FewBitsWeight) -> tuple[Tensor | None, ...]:
    """Its tensors. (One by one: torch.compile of PyTorch 2.8 takes no slice of a NamedTuple, and no property.)"""
    sparse = weight.codes, weight.scales, weight.zeros, weight.bitmask
    return *sparse, weight.U, weight.V, weight.U_scale, weight.V_scale, weight.bias


class FewBitsMatrix:
    """S x + U (V x) + b for a weight of few bits, and S spread out.

    It holds the memory that it was made of, and what was checked of it. Only its contents may change: the bitmask is
    held against the count of the codes in each product, before it is followed.

    Args:
        weight: on the CPU; what is floating in a dtype of `native.TYPES`.

    Raises:
        ValueError: the bitmask does not fit the codes, or a shape or dtype does not fit the others.
    """

    def __init__(self, weight: FewBitsWeight) -> None:
        bits, normal, group_size, count, codes, scales, zeros, bitmask, U, V, U_scale, V_scale, bias, _ = weight
        if not scales.dim() == U.dim() == V.dim() == 2:
            raise ValueError("scales, U and V must have two dimensions")
        rows, in_features, width, dtype = len(scales), V.shape[1], U.shape[1], U.dtype
        if bits not in WIDTHS:
            raise ValueError(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {bits}")
        levels = normal_levels(bits) if normal else None
        if group_size < 0 or group_size % 16:
            raise ValueError(f"group_size must be 0 or a multiple of 16, got {group_size}")
        if count < 0 or (bitmask is None and count != rows * in_features):
            raise ValueError(f"a matrix of {rows} x {in_features} without a bitmask cannot have {count} values")
        if (U_scale is None) != (V_scale is None):
            raise ValueError("U_scale and V_scale must both be given, or neither")
        types = TYPES if U_scale is None else {torch.int8: INT8}
        if dtype not in types:
            raise ValueError(f"U must have a dtype of {', '.join(map(str, types))}, got {dtype}")
        if bias is not None and bias.dtype not in TYPES:
            raise ValueError(f"bias must have a dtype of {', '.join(map(str, TYPES))}, got {bias.dtype}")
        size = group_size or max(in_features, 1)
        groups = rows, -(-in_features // size)
        parts = checked_parts(weight.parts, rows, width)
        ranks = sum(rank for _, rank in parts)
        self._rows, self._in_features = rows, in_features
        self._matrix = native._native.FewBitsMatrix(
            bits,
            0 if levels is None else levels.data_ptr(),
            size,
            address(codes, "codes", torch.uint8, (packed_bytes(count, bits),)),
            count,
            address(scales, "scales", torch.int16, groups),
            0 if zeros is None else address(zeros, "zeros", torch.uint8, groups),
            0 if bitmask is None else address(bitmask, "bitmask", torch.uint8, (rows, -(-in_features // 8))),
            rows,
            in_features,
            address(U, "U", dtype, (rows, width)),
            address(V, "V", dtype, (ranks, in_features)),
            types[dtype],
            0 if U_scale is None else address(U_scale, "U_scale", torch.int16, (rows,)),
            0 if V_scale is None else address(V_scale, "V_scale", torch.int16, (ranks,)),
            width,
            parts,
            0 if bias is None else address(bias, "bias", bias.dtype, (rows,)),
            0 if bias is None else TYPES[bias.dtype],
            torch.get_num_threads(),
        )
        # others than the caller's tensors, which may come to stand for other memory
        self._held = [tensor.detach() for tensor in (*tensors_of(weight), levels) if tensor is not None]

    def few_tokens(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), dtype of x, in one pass over the codes.

        Raises:
            ValueError: x has another width, dtype or device, or the bitmask does not fit the codes any more.
        """
        return one_pass(self._matrix, x, self._rows, self._in_features)

    def dequantise(self) -> Tensor:
        """S with its zeros, (out_features, in_features), float32.

        Raises:
            ValueError: the bitmask does not fit the codes any more.
        """
        dense = buffer((self._rows, self._in_features), torch.float32)
        self._matrix.dequantise(dense.data_ptr(), torch.get_num_threads())
        return dense


def normal_levels(bits: int) -> Tensor:
    """`LEVELS`, of each code: (16,), int8. Raises ValueError if there are none of so many bits."""
    if bits not in LEVELS:
        raise ValueError(f"normal levels have {', '.join(map(str, LEVELS))} bits, got {bits}")
    return torch.nn.functional.pad(torch.tensor(LEVELS[bits], dtype=torch.int8), (0, 16 - (1 << bits)))


class FewBitsCache(Cache[FewBitsMatrix]):
    """The `FewBitsMatrix` of a layer's tensors."""

    _tensors: tuple[Tensor | None, ...] = ()

    def get(self, weight: FewBitsWeight) -> FewBitsMatrix:
        """The matrix of these tensors. Raises ValueError as `FewBitsMatrix` does."""
        tensors = tensors_of(weight)
        # the matrix holds its memory, so that no other tensor can come to lie at these addresses
        dtypes = weight.U.dtype, None if weight.bias is None else weight.bias.dtype
        key = (*dtypes, *_addresses(tensors))
        made, matrix = self._made
        if matrix is None or key != made:
            matrix = FewBitsMatrix(weight)
            self._made = key, matrix
        self._tensors = tensors
        return matrix

    def known(self, tensors: tuple[Tensor | None, ...], x: Tensor) -> FewBitsMatrix | None:
        """The matrix that `get` gave last, if it was of these very tensors, still in place, and kernels take x.

        What `kernels_take` asks of them is not asked again: for one token that takes as long as the product.

        Args:
            tensors: as of `tensors_of`.
        """
        (made, matrix), own = self._made, self._tensors
        if matrix is None or len(own) != len(tensors) or not all(map(is_, tensors, own)):
            return None
        runs = only_runs((x,)) and not asks_for_gradients((x, *own))
        if not runs or not _fits(x) or made[2:] != _addresses(own):
            return None
        return matrix


def _addresses(tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def kernels_take(weight: FewBitsWeight, x: Tensor | None = None) -> bool:
    """Whether compiled kernels spread this weight out, or with x: multiply it by so few tokens in one pass.

    Else it is for PyTorch's own operators: under compile, export and transforms, for gradients, on other devices.
    """
    tensors = (x, *tensors_of(weight))
    if not only_runs(tensors) or asks_for_gradients(tensors):
        return False
    factors_fit = weight.U.dtype in TYPES if weight.U_scale is None else weight.U.dtype == torch.int8
    bias_fits = weight.bias is None or weight.bias.dtype in TYPES
    if not (factors_fit and bias_fits) or not weight.codes.is_cpu or weight.group_size % 16 or not native.available():
        return False
    return x is None or _fits(x)


def _fits(x: Tensor) -> bool:
    """Whether x is of few tokens, and where kernels can read it."""
    most = ONE_PASS_TOKENS_PORTABLE if native.active() == "portable" else ONE_PASS_TOKENS
    return x.is_cpu and x.dtype in TYPES and x.numel() <= most * x.shape[-1]
