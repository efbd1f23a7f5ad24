"""Codes of 2 to 6 or 8 bits, packed.

A code of 3, 5 or 6 bits is cut in two, whose widths divide a byte: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, the low bits first.
All codes' first pieces come one after another, then all second ones; within a byte the first is in the lowest bits, and
what is left of the last byte is 0.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}  # of a code's pieces, by its bits


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of so many codes."""
    return sum(-(-count * width // 8) for width in WIDTHS[bits])


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (count,), uint8, each below 2^bits: (packed_bytes,), uint8."""
    pieces = []
    for shift, width in _pieces(bits):
        piece = (codes >> shift) & ((1 << width) - 1)
        each = 8 // width  # in a byte
        piece = torch.nn.functional.pad(piece, (0, -len(codes) % each)).view(-1, each)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        pieces.append((piece << shifts).sum(1, dtype=torch.uint8))
    return torch.cat(pieces)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes (count,), uint8, that were packed."""
    codes, start = None, 0
    for shift, width in _pieces(bits):
        end = start + -(-count * width // 8)
        piece = packed[start:end]
        if width < 8:
            powers = torch.tensor([1 << shift for shift in range(0, 8, width)], dtype=torch.uint8, device=packed.device)
            # divisions, since ONNX has neither `&` nor, for what is computed with further, `>>`
            piece = (torch.div(piece[:, None], powers, rounding_mode="floor") % (1 << width)).flatten()[:count]
        codes = piece if codes is None else codes + piece * (1 << shift)
        start = end
    assert codes is not None
    return codes


def _pieces(bits: int) -> Iterator[tuple[int, int]]:
    """First bit and width of each piece of a code."""
    shift = 0
    for width in WIDTHS[bits]:
        yield shift, width
        shift += width
