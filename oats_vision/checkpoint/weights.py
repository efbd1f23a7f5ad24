"""Read a safetensors file from a stranger: its header first, then each tensor into memory of its own."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oats_vision.errors import CheckpointError, ConfigError
from oats_vision.kernels.codes import packed_bytes
from oats_vision.models.values import LARGEST, beyond, broken
from oats_vision.nn.sparse_low_rank import LayerSpec

WEIGHTS = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LARGEST = 1 << 48  # entries one way, or bytes
_HEADER = 100_000_000  # bytes at most, as in safetensors' own reader
_DIMENSIONS = 16  # of a tensor at most
_PIECE = 1 << 16  # values that are looked at, at a time
_POPCOUNT = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its place among the data is [start, end)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class WeightsFile:
    """An open file whose header was checked: the tensors lie one after the other and fill the file.

    Raises:
        CheckpointError: the file is missing, truncated or corrupted.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / WEIGHTS
        if not self.path.is_file():  # a pipe would block
            raise CheckpointError(f"{directory} is not a compressed model: there is no {WEIGHTS}")
        try:
            self._stream = self.path.open("rb")
        except OSError as problem:
            raise CheckpointError(f"{self.path} cannot be read: {problem}") from None
        self.size = os.fstat(self._stream.fileno()).st_size
        try:
            self._header = self._read_header()
            self.tensors = self._entries()
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> "WeightsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(
        self,
        sha256: str,
        dtypes: Callable[[str], torch.dtype | None] = lambda name: None,
        is_parameter: Callable[[str], bool] = lambda name: True,
        keep: Callable[[str], bool] = lambda name: True,
    ) -> dict[str, Tensor]:
        """All tensors in memory of their own, which the file's later fate does not touch.

        Nothing beside them takes memory: where values change their dtype, they do so in pieces.

        Args:
            sha256: what the file's digest must be; it is taken of the very bytes that become tensors.
            dtypes: that a floating tensor of that name is to have; None: its own.
            is_parameter: whether the tensor of that name is one, and no buffer.
            keep: whether its values are kept; else it is on the meta device, and they are only looked at.

        Raises:
            CheckpointError: another digest, a value that is not finite, or the file was cut meanwhile.
            ConfigError: a value is too large for its new dtype.
        """
        digest = hashlib.sha256(self._header)
        self._stream.seek(len(self._header))
        tensors: dict[str, Tensor] = {}
        bad = too_large = ""
        for name, stored in sorted(self.tensors.items(), key=lambda item: item[1].start):
            dtype = (dtypes(name) if stored.dtype.is_floating_point else None) or stored.dtype
            tensors[name] = tensor = torch.empty(stored.shape, dtype=dtype, device="cpu" if keep(name) else "meta")
            for piece in tensor.view(-1).split(_PIECE):
                values = self._next(name, stored.dtype, piece)
                digest.update(values.view(torch.uint8).numpy().data)
                bad = bad or broken(values, name, is_parameter=is_parameter(name))
                if values is not piece:
                    too_large = too_large or beyond(values, name, dtype, is_parameter=is_parameter(name))
                    piece.copy_(values)
        if digest.hexdigest() != sha256:
            raise CheckpointError(f"{self.path} is damaged: its SHA-256 is not the one in config.json")
        if bad:
            raise CheckpointError(f"{self.path} is damaged: {bad}")
        if too_large:
            raise ConfigError(f"{too_large}: use dtype float32 or bfloat16")
        return tensors

    def _next(self, name: str, dtype: torch.dtype, piece: Tensor) -> Tensor:
        """The next values of the file, as many as a piece of a tensor has: in its own memory, if they can be.

        Raises:
            CheckpointError: it ends before, or cannot be read.
        """
        dtype = torch.uint8 if dtype == torch.bool else dtype  # of which any byte but 0 is true
        itself = piece.dtype == dtype and not piece.is_meta
        values = piece if itself else torch.empty(len(piece), dtype=dtype, device="cpu")
        view = values.view(torch.uint8).numpy().data
        try:
            if len(view) and self._stream.readinto(view) != len(view):
                raise CheckpointError(f"{self.path} is damaged: it ends within {name}")
        except OSError as problem:
            raise CheckpointError(f"{self.path} cannot be read: {problem}") from None
        return values

    def check_layers(self, specs: Mapping[str, LayerSpec], storage: torch.dtype) -> None:
        """See that every compressed layer has its tensors, of its shapes and dtypes.

        Raises:
            CheckpointError: it has not.
        """
        for name, spec in specs.items():
            for key, (shape, dtype) in layer_shapes(spec, storage).items():
                found = self.tensors.get(f"{name}.{key}")
                if found is None:
                    raise CheckpointError(f"{self.path} is damaged: {name}.{key} is missing")
                if (found.shape, found.dtype) != (shape, dtype):
                    expected = Stored(dtype, shape, 0, 0)
                    raise CheckpointError(f"{self.path} is damaged: {name}.{key} is {found}, expected {expected}")

    def _read_header(self) -> bytes:
        length = self._stream.read(8)
        count = int.from_bytes(length, "little")
        if len(length) < 8 or count > min(_HEADER, self.size - 8):
            raise CheckpointError(f"{self.path} is damaged: its header is cut, or is not that of safetensors")
        return length + self._stream.read(count)

    def _entries(self) -> dict[str, Stored]:
        try:
            header: Any = json.loads(self._header[8:])
            entries = {name: _entry(fields) for name, fields in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise CheckpointError(f"{self.path} is damaged: its header is not that of safetensors: {problem}") from None
        end = 0
        for name, stored in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if stored.start != end or stored.end < stored.start:
                raise CheckpointError(f"{self.path} is damaged: {name} does not begin where the tensor before it ends")
            end = stored.end
        if end != self.size - len(self._header):
            raise CheckpointError(f"{self.path} is damaged: it is cut, or longer than its tensors")
        return entries


def _entry(fields: Any) -> Stored:
    """Raises KeyError, TypeError or ValueError."""
    dtype, shape, (start, end) = DTYPES[fields["dtype"]], fields["shape"], fields["data_offsets"]
    if any(type(number) is not int or not 0 <= number <= _LARGEST for number in (*shape, start, end)):
        raise ValueError(f"no sizes: {str(fields)[:200]}")
    if len(shape) > _DIMENSIONS or math.prod(number or 1 for number in shape) > _LARGEST:
        raise ValueError(f"a tensor of shape {str(shape)[:200]}")
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"{end - start} bytes for {fields['dtype']} {shape}")
    return Stored(dtype, tuple(shape), start, end)


def layer_shapes(spec: LayerSpec, storage: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a compressed layer's tensors, by their names in the layer."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if spec.grid:
        groups = spec.out_features, spec.grid.groups(spec.in_features)
        shapes["sparse.codes"] = (packed_bytes(spec.nonzeros, spec.grid.bits),), torch.uint8
        shapes["sparse.scales"] = groups, torch.int16
        if not spec.grid.symmetric:
            shapes["sparse.zeros"] = groups, torch.uint8
    else:
        shapes["sparse.values"] = (spec.nonzeros,), storage
    if spec.has_bitmask:
        shapes["sparse.bitmask"] = (spec.out_features, spec.row_bytes), torch.uint8
    of_factors = torch.int8 if spec.int8_factors else storage
    shapes["low_rank.U"] = (spec.out_features, max(spec.ranks)), of_factors
    shapes["low_rank.V"] = (sum(spec.ranks), spec.in_features), of_factors
    if spec.int8_factors:
        shapes["low_rank.U_scale"] = (spec.out_features,), torch.int16
        shapes["low_rank.V_scale"] = (sum(spec.ranks),), torch.int16
    return shapes | ({"bias": ((spec.out_features,), storage)} if spec.bias else {})


def check_layer(tensors: Mapping[str, Tensor], name: str, spec: LayerSpec, where: str) -> None:
    """See that a compressed layer's positions agree with its values, and that its values can be made of its codes.

    Args:
        tensors: of the whole model, by their names. name: of the layer.

    Raises:
        CheckpointError: they do not, or cannot.
    """
    if spec.has_bitmask:
        check_bitmask(tensors[f"{name}.sparse.bitmask"], spec, where)
    if spec.grid is None:
        return
    for key in ("sparse.scales", *(("low_rank.U_scale", "low_rank.V_scale") if spec.int8_factors else ())):
        low, high = torch.aminmax(tensors[f"{name}.{key}"].view(torch.bfloat16))  # NaN if there is one
        if not (low >= -LARGEST and high <= LARGEST):
            raise CheckpointError(f"{where} is damaged: a scale is not finite, or beyond {LARGEST:g}")
    if not spec.grid.symmetric and int(tensors[f"{name}.sparse.zeros"].max()) >= spec.grid.levels:
        raise CheckpointError(f"{where} is damaged: a zero is beyond the {spec.grid.levels} levels")


def check_bitmask(bitmask: Tensor, spec: LayerSpec, where: str) -> None:
    """See that the positions agree with the number of values and lie in the matrix.

    Raises:
        CheckpointError: they do not.
    """
    ones = sum(int(_POPCOUNT[piece.int()].sum(dtype=torch.int64)) for piece in bitmask.view(-1).split(_PIECE))
    if ones != spec.nonzeros:
        raise CheckpointError(f"{where} is damaged: the bitmask has {ones} ones for {spec.nonzeros} values")
    used = spec.in_features % 8
    if used and len(bitmask) and int((bitmask[:, -1] >> used).max()):
        raise CheckpointError(f"{where} is damaged: the bitmask has ones beyond the last column")
