"""The compiled module: whether it is there, its instruction sets, and tensors passed to it as addresses, checked.

OATS_VISION_INSTRUCTION_SET=avx2 (one of `instruction_sets()`) in the environment makes them do as on a CPU that has no
better one, and believe no more of its 16-bit arithmetic.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from oats_vision.errors import ConfigError

try:
    from oats_vision.kernels import _native as _native  # also for the rest of this package
except ImportError:  # installed without a compiler
    _native = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8 = 3  # for U and V of a `FewBitsWeight` alone
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
    reach = tensor.numel()  # from the first number to behind the last
    if not tensor.is_contiguous():
        if not (rows_apart and tensor.stride(1) == 1):
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        reach = tensor.stride(0) * (len(tensor) - 1) + tensor.shape[1]
    if (tensor.storage_offset() + reach) * tensor.itemsize > tensor.untyped_storage().nbytes() and reach:
        raise ValueError(f"{name} has no memory: its storage was freed or made smaller")
    return tensor.data_ptr()


def sparse_step(
    A: Tensor, L: Tensor, S: Tensor, next: Tensor, threshold: Tensor, *, keep: int, extrapolation: float
) -> float:
    """The sparse half of an iteration: keep the largest magnitudes of A - L, and extrapolate.

    With R = A - L and S' the `keep` largest magnitudes of each row of R: S becomes S', `next` becomes
    A - (S' + extrapolation (S' - S)).

    Args:
        A, L, S, next: (rows, columns), float32, contiguous, on the CPU; `next` may be L.
        threshold: (rows,), float32: each row's smallest magnitude kept in the last iteration, or 0; updated.

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
