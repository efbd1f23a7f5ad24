"""A packed weight as the compiled kernels hold it: checked once, then only its addresses are passed on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from oats_vision.kernels import native
from oats_vision.kernels.native import TYPES, address
from oats_vision.kernels.packed import PackedWeight, PartShape

if TYPE_CHECKING:
    from oats_vision.kernels import _native

M = TypeVar("M")
_CPU = torch.device("cpu")


class Matrix:
    """S x + U (V x) + b for a packed weight, by each kernel.

    It holds the memory that it was made of, and what was checked of it. Only its contents may change: the bitmask is
    held against the values in each product, before it is followed.

    Args:
        weight: on the CPU; values, U, V and bias in one dtype of `native.TYPES`.

    Raises:
        ValueError: the bitmask does not fit the values, or a shape or dtype does not fit the others.
    """

    def __init__(self, weight: PackedWeight) -> None:
        values, bitmask, U, V, bias, _, _ = weight
        if not values.dim() == 1 or not bitmask.dim() == U.dim() == V.dim() == 2:
            raise ValueError("values must have one dimension, bitmask, U and V two")
        rows, in_features, width = len(bitmask), V.shape[1], U.shape[1]
        parts = checked_parts(weight.parts, rows, width)
        dtype = values.dtype
        if dtype not in TYPES:
            raise ValueError(f"values must have a dtype of {', '.join(map(str, TYPES))}, got {dtype}")
        self._rows, self._in_features, self._dtype = rows, in_features, dtype
        U_address = address(U, "U", dtype, (rows, width))
        bias_address = 0 if bias is None else address(bias, "bias", dtype, (rows,))
        self._matrix = native._native.Matrix(
            address(values, "values", dtype, (len(values),)),
            TYPES[dtype],
            len(values),
            address(bitmask, "bitmask", torch.uint8, (rows, -(-in_features // 8))),
            rows,
            in_features,
            U_address,
            address(V, "V", dtype, (sum(weight.ranks()), in_features)),
            width,
            parts,
            bias_address,
            torch.get_num_threads(),
        )
        # others than the caller's tensors, which may come to stand for other memory
        self._sparse = values.detach(), bitmask.detach()
        self._U, self._V, self._bias = U.detach(), V.detach(), None if bias is None else bias.detach()
        self._addresses = U_address, bias_address

    def few_tokens(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), dtype of x, in one pass over the weights.

        Raises:
            ValueError: x has another width, dtype or device, or the bitmask does not fit the values any more.
        """
        return one_pass(self._matrix, x, self._rows, self._in_features)

    def many_tokens(self, x: Tensor) -> Tensor:
        """The same for many tokens in float32, whatever dtype the weights have.

        Raises:
            ValueError: as in `few_tokens`.
        """
        y, x, single = buffer((*x.shape[:-1], self._rows), torch.float32), _matrix(x), torch.float32
        tokens = len(x)
        features = address(x, "the input", single, (tokens, self._in_features), rows_apart=True)
        U, V, bias = self._U, self._V, self._bias
        U_address, bias_address = self._addresses
        if self._dtype != single:  # copies, for the time of the product
            U, V, bias = U.to(single), V.to(single), None if bias is None else bias.to(single)
            U_address, bias_address = U.data_ptr(), 0 if bias is None else bias.data_ptr()
        projected = buffer((len(V), tokens), single)
        torch.mm(V, x.T, out=projected)  # into a buffer, which autocast lets be
        self._matrix.many_tokens(
            U_address,
            bias_address,
            projected.data_ptr(),
            features,
            tokens,
            x.stride(0),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def many_bfloat16(self, x: Tensor) -> Tensor:
        """The same for many tokens in bfloat16 on the CPU's matrix units, weights likewise.

        Raises:
            ValueError: there are no such units, or as in `few_tokens`.
        """
        if self._dtype != torch.bfloat16:
            raise ValueError(f"weights must be bfloat16, got {self._dtype}")
        y, x = buffer((*x.shape[:-1], self._rows), torch.bfloat16), _matrix(x)
        features = address(x, "the input", torch.bfloat16, (len(x), self._in_features), rows_apart=True)
        self._matrix.many_bfloat16(features, len(x), x.stride(0), y.data_ptr(), torch.get_num_threads())
        return y

    def expand(self) -> Tensor:
        """S with its zeros, (out_features, in_features), dtype of the values."""
        dense = buffer((self._rows, self._in_features), self._dtype)
        self._matrix.expand(dense.data_ptr(), torch.get_num_threads())
        return dense


def checked_parts(parts: Sequence[PartShape], rows: int, width: int) -> list[tuple[int, int]]:
    """Rows and rank of each part, for U (rows, width).

    Raises:
        ValueError: they do not fit U.
    """
    shapes = [(part.out_features, part.rank) for part in parts]
    if sum(height for height, _ in shapes) != rows or any(
        height < 0 or not 0 <= rank <= width for height, rank in shapes
    ):
        raise ValueError(f"parts must make up {rows} rows, each with a rank in [0, {width}], got {shapes}")
    return shapes


def one_pass(matrix: _native.Matrix | _native.FewBitsMatrix, x: Tensor, rows: int, in_features: int) -> Tensor:
    """(..., in_features) -> (..., rows), dtype of x, by `matrix.few_tokens`.

    Raises:
        ValueError: x has another width, dtype or device, or a bitmask does not fit the values any more.
    """
    *batch, width = x.shape
    if width != in_features or x.dtype not in TYPES:
        raise ValueError(f"the input must have {in_features} features, got {x.dtype} {list(x.shape)}")
    x = x.contiguous()
    y = buffer((*batch, rows), x.dtype)
    matrix.few_tokens(
        address(x, "the input", x.dtype, (*batch, width)),
        TYPES[x.dtype],
        math.prod(batch),
        width,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def _matrix(x: Tensor) -> Tensor:
    """(..., features) as (tokens, features), rows without gaps; between rows there may be some."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def buffer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """For a kernel to write to: its address needs no check, whatever the default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device=_CPU)


class Cache(Generic[M]):
    """What was made of a layer's tensors, to be made again when these are in other memory; copies start empty."""

    def __init__(self) -> None:
        self._made: tuple[tuple[object, ...], M | None] = (), None  # in one, for threads that read it meanwhile

    def __deepcopy__(self, memo: object) -> Cache[M]:
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class MatrixCache(Cache[Matrix]):
    """The `Matrix` of a layer's tensors."""

    def get(self, weight: PackedWeight) -> Matrix:
        """The matrix of these tensors. Raises ValueError as `Matrix` does."""
        values, bitmask, U, V, bias, _, _ = weight
        # the matrix holds its memory, so that no other tensor can come to lie at these addresses
        key = (
            values.data_ptr(),
            bitmask.data_ptr(),
            U.data_ptr(),
            V.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            values.dtype,
        )
        made, matrix = self._made
        if matrix is None or key != made:
            matrix = Matrix(weight)
            self._made = key, matrix
        return matrix
