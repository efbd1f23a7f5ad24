"""The compiled kernels: tensors checked, and passed on as addresses. `available()` says whether they are there.

OATS_VISION_INSTRUCTION_SET=avx2 (one of `instruction_sets()`) in the environment makes them do as on a CPU that has no
better one, and believe no more of its 16-bit arithmetic.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from oats_vision.errors import ConfigError

try:
    from oats_vision.kernels import _native
except ImportError:  # installed without a compiler
    _native = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORCED = "OATS_VISION_INSTRUCTION_SET"


@cache
def available() -> bool:
    """Whether the compiled kernels are there; says so once if they are not.

    Raises:
        ConfigError: the environment asks for an instruction set that is not there.
    """
    if _native is None:
        log.warning(
            "the compiled kernels are missing, so that compressed layers are not faster than dense ones: "
            "install a C++ compiler, then reinstall oats_vision"
        )
        return False
    forced = os.environ.get(FORCED)
    if forced:
        if forced not in instruction_sets():
            raise ConfigError(f"{FORCED} must be one of {', '.join(instruction_sets())} on this CPU, got {forced!r}")
        _native.use(forced)
    return True


def instruction_sets() -> list[str]:
    """Those that the compiled kernels can use on this CPU, best first; none without the kernels."""
    return _native.instruction_sets() if _native is not None else []


def active() -> str:
    """The one in use, of `instruction_sets()`."""
    return _native.instruction_set()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Use one of `instruction_sets()` inside the block, for all threads.

    Raises:
        ValueError: this CPU or this installation does not have it.
    """
    if name not in instruction_sets():
        raise ValueError(f"instruction set must be one of {instruction_sets()}, got {name!r}")
    available()  # what the environment forces comes first
    before = _native.instruction_set()
    _native.use(name)
    try:
        yield
    finally:
        _native.use(before)


def multiplies_bfloat16() -> bool:
    """Whether the instruction set in use has matrix units for bfloat16."""
    return _native is not None and _native.multiplies_bfloat16()


def multiplies_16_bits_faster(dtype: torch.dtype) -> bool:
    """Whether PyTorch's dense products of this 16-bit dtype are faster on this CPU than those of float32.

    Under an instruction set older than AVX-512 that is not this CPU's best, the answer is that of a CPU without units.
    """
    name = _native.instruction_set()
    if name != instruction_sets()[0] and name in ("avx2", "portable"):
        return False
    return _has_units(dtype)


@cache
def _has_units(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


_CPU = torch.device("cpu")


def address(tensor: Tensor, name: str, dtype: torch.dtype, shape: tuple[int, ...], *, rows_apart: bool = False) -> int:
    """Where a tensor's numbers lie, for native code, which trusts what is checked here and nowhere else.

    Args:
        name: what the error calls it.
        dtype, shape: that the tensor must have.
        rows_apart: rows of a matrix may have a distance of their own; else the memory has no gaps.

    Raises:
        ValueError: the tensor is not of that dtype and shape, not in the CPU's memory, or not laid out so.
    """
    if tensor.dtype is not dtype or tensor.shape != shape:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_neg():
        raise ValueError(f"{name} must be a dense tensor on the CPU, got {tensor.layout} on {tensor.device}")
    if not tensor.is_contiguous() and not (rows_apart and tensor.stride(1) == 1):
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    reach = tensor.numel() and 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if (tensor.storage_offset() + reach) * tensor.itemsize > tensor.untyped_storage().nbytes() and reach:
        raise ValueError(f"{name} has no memory: its storage was freed or made smaller")
    return tensor.data_ptr()


def _buffer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """For a kernel to write to: its address needs no check, whatever the default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device=_CPU)


class Matrix:
    """A packed sparse matrix with its low-rank term and bias, as the kernels see it: S x + U (V x) + b.

    It holds the memory that it was made of, and what was checked of it. Only its contents may change: the bitmask is
    held against the values in each product, before it is followed.

    Args:
        values, bitmask: of S (out_features, in_features), as in `oats_vision.nn.sparse_low_rank.PackedSparse`.
        U, V, bias: as in `oats_vision.nn.sparse_low_rank.SparseLowRankLinear`, in the dtype of the values.
        parts: rows of U and of V that belong together: (out_features, rank) of each part.

    Raises:
        ValueError: the bitmask does not fit the values, or a shape or dtype does not fit the others.
    """

    def __init__(
        self,
        values: Tensor,
        bitmask: Tensor,
        U: Tensor,
        V: Tensor,
        bias: Tensor | None,
        parts: Sequence[tuple[int, int]],
    ) -> None:
        if not values.dim() == 1 or not bitmask.dim() == U.dim() == V.dim() == 2:
            raise ValueError("values must have one dimension, bitmask, U and V two")
        rows, in_features, width = len(bitmask), V.shape[1], U.shape[1]
        heights, ranks = sum(height for height, _ in parts), sum(rank for _, rank in parts)
        if heights != rows or any(height < 0 or not 0 <= rank <= width for height, rank in parts):
            raise ValueError(f"parts must make up {rows} rows, each with a rank in [0, {width}], got {list(parts)}")
        dtype = values.dtype
        if dtype not in TYPES:
            raise ValueError(f"values must have a dtype of {', '.join(map(str, TYPES))}, got {dtype}")
        self._rows, self._in_features, self._dtype = rows, in_features, dtype
        U_address = address(U, "U", dtype, (rows, width))
        bias_address = 0 if bias is None else address(bias, "bias", dtype, (rows,))
        self._matrix = _native.Matrix(
            address(values, "values", dtype, (len(values),)),
            TYPES[dtype],
            len(values),
            address(bitmask, "bitmask", torch.uint8, (rows, -(-in_features // 8))),
            rows,
            in_features,
            U_address,
            address(V, "V", dtype, (ranks, in_features)),
            width,
            list(parts),
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
        *batch, in_features = x.shape
        if in_features != self._in_features or x.dtype not in TYPES:
            raise ValueError(f"the input must have {self._in_features} features, got {x.dtype} {list(x.shape)}")
        x = x.contiguous()
        y = _buffer((*batch, self._rows), x.dtype)
        self._matrix.few_tokens(
            address(x, "the input", x.dtype, (*batch, in_features)),
            TYPES[x.dtype],
            x.numel() // max(in_features, 1),
            in_features,
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def many_tokens(self, x: Tensor) -> Tensor:
        """The same for many tokens in float32, whatever dtype the weights have.

        Raises:
            ValueError: as in `few_tokens`.
        """
        y, x, single = _buffer((*x.shape[:-1], self._rows), torch.float32), _matrix(x), torch.float32
        tokens = len(x)
        features = address(x, "the input", single, (tokens, self._in_features), rows_apart=True)
        U, V, bias = self._U, self._V, self._bias
        U_address, bias_address = self._addresses
        if self._dtype != single:  # copies, for the time of the product
            U, V, bias = U.to(single), V.to(single), None if bias is None else bias.to(single)
            U_address, bias_address = U.data_ptr(), 0 if bias is None else bias.data_ptr()
        projected = _buffer((len(V), tokens), single)
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
        y, x = _buffer((*x.shape[:-1], self._rows), torch.bfloat16), _matrix(x)
        features = address(x, "the input", torch.bfloat16, (len(x), self._in_features), rows_apart=True)
        self._matrix.many_bfloat16(features, len(x), x.stride(0), y.data_ptr(), torch.get_num_threads())
        return y

    def expand(self) -> Tensor:
        """S with its zeros, (out_features, in_features), dtype of the values."""
        dense = _buffer((self._rows, self._in_features), self._dtype)
        self._matrix.expand(dense.data_ptr(), torch.get_num_threads())
        return dense


def _matrix(x: Tensor) -> Tensor:
    """(..., features) as (tokens, features), rows without gaps; between rows there may be some."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


class MatrixCache:
    """The `Matrix` of a layer's tensors, made again when these are in other memory; copies start empty."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._matrix: Matrix | None = None

    def get(
        self,
        values: Tensor,
        bitmask: Tensor,
        U: Tensor,
        V: Tensor,
        bias: Tensor | None,
        out_features: Sequence[int],
        ranks: Sequence[int],
    ) -> Matrix:
        """The matrix of these tensors. Raises ValueError as `Matrix` does."""
        # the matrix holds its memory, so that no other tensor can come to lie at these addresses
        key = (
            values.data_ptr(),
            bitmask.data_ptr(),
            U.data_ptr(),
            V.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            values.dtype,
        )
        matrix = self._matrix
        if matrix is None or key != self._key:
            matrix = Matrix(values, bitmask, U, V, bias, list(zip(out_features, ranks, strict=True)))
            self._matrix, self._key = matrix, key
        return matrix

    def __deepcopy__(self, memo: object) -> "MatrixCache":
        return MatrixCache()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return MatrixCache, ()


def expand(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    """The matrix with its zeros, (out_features, in_features), dtype of the values.

    Raises:
        ValueError: the bitmask does not fit the values.
    """
    rows = len(bitmask)
    U, V = values.new_empty(rows, 0), values.new_empty(0, in_features)
    return Matrix(values.contiguous(), bitmask.contiguous(), U, V, None, [(rows, 0)]).expand()


def sparse_step(
    A: Tensor, L: Tensor, S: Tensor, next: Tensor, threshold: Tensor, *, keep: int, extrapolation: float
) -> float:
    """The sparse half of a round: keep the largest magnitudes of A - L, and extrapolate.

    With R = A - L and S' the `keep` largest magnitudes of each row of R: S becomes S', `next` becomes
    A - (S' + extrapolation (S' - S)).

    Args:
        A, L, S, next: (rows, columns), float32, contiguous, on the CPU; `next` may be L.
        threshold: (rows,), float32: each row's smallest magnitude kept in the last round, or 0; updated.

    Returns:
        |R - S'|^2.

    Raises:
        ValueError: a tensor is of another shape, dtype, layout or device.
    """
    if A.dim() != 2:
        raise ValueError(f"A must have two dimensions, got {list(A.shape)}")
    rows, columns = A.shape
    matrices = {"A": A, "L": L, "S": S, "next": next}
    a, low_rank, sparse, following = (
        address(tensor, name, torch.float32, (rows, columns)) for name, tensor in matrices.items()
    )
    boundary = address(threshold, "threshold", torch.float32, (rows,))
    threads = torch.get_num_threads()
    return _native.sparse_step(rows, columns, keep, extrapolation, a, low_rank, sparse, following, boundary, threads)
