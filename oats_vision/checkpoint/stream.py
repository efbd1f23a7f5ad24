"""Write a safetensors file tensor by tensor, as safetensors itself would: same bytes, and one tensor in memory."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from oats_vision.checkpoint.weights import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# safetensors puts those first that must lie at multiples of more bytes, which its order of dtypes says
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")


def write_tensors(file: Path, shapes: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> str:
    """Write tensors to a new file.

    Args:
        shapes: tensors of the right shapes and dtypes, by name; their values are not looked at.
        read: gives a tensor by its name, on the CPU and contiguous.

    Returns:
        The SHA-256 of the file.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    order = sorted(shapes, key=lambda name: (_ORDER.index(_NAMES[shapes[name].dtype]), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + shapes[name].nbytes
        dtype, shape = _NAMES[shapes[name].dtype], list(shapes[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("xb") as stream:
        for content in (len(text).to_bytes(8, "little"), text):
            stream.write(content)
            digest.update(content)
        for name in order:
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (shapes[name].shape, shapes[name].dtype), name
            data = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
            stream.write(data)
            digest.update(data)
    return digest.hexdigest()
