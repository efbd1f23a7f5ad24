"""The compiled kernels: tensors checked, and passed on as addresses. `available()` says whether they are there."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

try:
    from oats_vision.kernels import _native
except ImportError:  # installed without a compiler
    _native = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@cache
def available() -> bool:
    """Whether the compiled kernels are there; says so once if they are not."""
    if _native is None:
        log.warning(
            "the compiled kernels are missing, so that compressed layers are not faster than dense ones: "
            "install a C++ compiler, then reinstall oats_vision"
        )
    return _native is not None


def instruction_sets() -> list[str]:
    """Those that the compiled kernels can use on this CPU, best first; none without the kernels."""
    return _native.instruction_sets() if _native is not None else []


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Use one of `instruction_sets()` inside the block, for all threads.

    Raises:
        ValueError: this CPU or this installation does not have it.
    """
    if name not in instruction_sets():
        raise ValueError(f"instruction set must be one of {instruction_sets()}, got {name!r}")
    before = _native.instruction_set()
    _native.use(name)
    try:
        yield
    finally:
        _native.use(before)


def multiplies_bfloat16() -> bool:
    """Whether the instruction set in use has matrix units for bfloat16."""
    return _native is not None and _native.multiplies_bfloat16()


class Matrix:
    """A packed sparse matrix with its low-rank term and bias, as the kernels see it: S x + U (V x) + b.

    It refers to the tensors' memory and does not keep them: use it while they are there.

    Args:
        values, bitmask: of S (out_features, in_features), as in `oats_vision.layers.PackedSparse`.
        U, V, bias: as in `oats_vision.layers.SparseLowRankLinear`, in the dtype of the values.
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
        rows, in_features = len(bitmask), V.shape[1]
        heights, ranks = sum(height for height, _ in parts), sum(rank for _, rank in parts)
        if bitmask.dtype != torch.uint8 or bitmask.shape != (rows, -(-in_features // 8)):
            raise ValueError(f"bitmask must be uint8 ({rows}, {-(-in_features // 8)}), got {list(bitmask.shape)}")
        if heights != rows or U.dim() != 2 or len(U) != rows or len(V) != ranks or values.dim() != 1:
            raise ValueError(f"U {list(U.shape)} and V {list(V.shape)} do not fit {rows} x {in_features}")
        if any(height < 0 or not 0 <= rank <= U.shape[1] for height, rank in parts):
            raise ValueError(f"a part's rank must be in [0, {U.shape[1]}], got {list(parts)}")
        if bias is not None and bias.shape != (rows,):
            raise ValueError(f"bias must have {rows} entries, got {list(bias.shape)}")
        tensors = [values, U, V] + ([] if bias is None else [bias])
        if any(t.dtype != values.dtype for t in tensors) or values.dtype not in TYPES:
            raise ValueError(f"values, U, V and bias must have one dtype of {list(TYPES)}")
        if not all(t.is_contiguous() and t.device.type == "cpu" for t in (bitmask, *tensors)):
            raise ValueError("values, bitmask, U, V and bias must be contiguous and on the CPU")
        self._rows = rows
        self._dtype = values.dtype
        self._in_features = in_features
        self._matrix = _native.Matrix(
            values.data_ptr(),
            TYPES[values.dtype],
            len(values),
            bitmask.data_ptr(),
            rows,
            in_features,
            U.data_ptr(),
            V.data_ptr(),
            U.shape[1],
            list(parts),
            0 if bias is None else bias.data_ptr(),
            torch.get_num_threads(),
        )

    def _check_features(self, x: Tensor) -> None:
        if x.shape[-1] != self._in_features:
            raise ValueError(f"the input must have {self._in_features} features, got {x.shape[-1]}")

    def few_tokens(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), dtype of x, in one pass over the weights."""
        self._check_features(x)
        *batch, in_features = x.shape
        x = x.contiguous()
        y = torch.empty((*batch, self._rows), dtype=x.dtype)
        tokens, threads = x.numel() // in_features, torch.get_num_threads()
        self._matrix.few_tokens(x.data_ptr(), TYPES[x.dtype], tokens, in_features, y.data_ptr(), threads)
        return y

    def many_tokens(self, x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
        """The same for many tokens, all but the sparse values in float32: U, V and bias as given to the matrix."""
        self._check_features(x)
        x = x if x.stride(1) == 1 else x.contiguous()
        U, V, bias = U.float(), V.float(), None if bias is None else bias.float()
        if x.dtype != torch.float32 or not U.is_contiguous():
            raise ValueError(f"x must be float32 and U contiguous, got {x.dtype}")
        y, projected = torch.empty(len(x), self._rows), V @ x.T
        self._matrix.many_tokens(
            U.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            projected.data_ptr(),
            x.data_ptr(),
            len(x),
            x.stride(0),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def many_bfloat16(self, x: Tensor) -> Tensor:
        """The same for many tokens in bfloat16 (tokens, in_features) on the CPU's matrix units, weights likewise.

        Raises:
            ValueError: there are no such units, or a dtype is another.
        """
        if x.dtype != torch.bfloat16 or self._dtype != torch.bfloat16:
            raise ValueError(f"weights and inputs must be bfloat16, got {self._dtype} and {x.dtype}")
        self._check_features(x)
        x = x if x.stride(1) == 1 else x.contiguous()
        y = torch.empty(len(x), self._rows, dtype=torch.bfloat16)
        self._matrix.many_bfloat16(x.data_ptr(), len(x), x.stride(0), y.data_ptr(), torch.get_num_threads())
        return y


class MatrixCache:
    """The `Matrix` of a layer's tensors, made again when they have changed; copies start empty."""

    def __init__(self) -> None:
        self._key: tuple[int, ...] = ()
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
        key = (
            values.data_ptr(),
            values.numel(),
            bitmask.data_ptr(),
            U.data_ptr(),
            V.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            -1 if bitmask.is_inference() else bitmask._version,  # the bitmask alone says what may be read
        )
        if self._matrix is None or key != self._key or key[-1] < 0:
            self._matrix = Matrix(values, bitmask, U, V, bias, list(zip(out_features, ranks, strict=True)))
            self._key = key
        return self._matrix

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
    matrix = Matrix(values.contiguous(), bitmask.contiguous(), U, V, None, [(rows, 0)])
    dense = torch.empty(rows, in_features, dtype=values.dtype)
    matrix._matrix.expand(dense.data_ptr(), torch.get_num_threads())
    return dense


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
    """
    rows, columns = A.shape
    tensors = (A, L, S, next)
    if any(t.shape != A.shape or not t.is_contiguous() for t in tensors) or threshold.shape != (rows,):
        raise ValueError("A, L, S and next must have one shape, and threshold an entry for each row")
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (*tensors, threshold)):
        raise ValueError("the step is for float32 on the CPU")
    a, low_rank, sparse, following, boundary = (t.data_ptr() for t in (*tensors, threshold))
    threads = torch.get_num_threads()
    return _native.sparse_step(rows, columns, keep, extrapolation, a, low_rank, sparse, following, boundary, threads)
