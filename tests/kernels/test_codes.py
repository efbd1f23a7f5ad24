import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oats_vision.kernels.codes import WIDTHS, pack_codes, packed_bytes, unpack_codes


@settings(max_examples=100, deadline=None)
@given(count=st.integers(0, 70), bits=st.sampled_from(sorted(WIDTHS)), seed=st.integers(0, 1000))
def test_codes_are_packed_as_the_format_says_and_come_back(count, bits, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint8))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(count, bits)
    assert torch.equal(unpack_codes(packed, bits, count), codes)
    stream, shift = [], 0
    for width in WIDTHS[bits]:  # the low bits first, bit by bit
        pieces = [(int(code) >> shift) % 2**width for code in codes]
        line = [(piece >> bit) & 1 for piece in pieces for bit in range(width)]
        stream += line + [0] * (-len(line) % 8)
        shift += width
    expected = [sum(bit << place for place, bit in enumerate(stream[i : i + 8])) for i in range(0, len(stream), 8)]
    assert packed.tolist() == expected


def test_a_code_takes_its_bits():
    for bits in WIDTHS:
        assert packed_bytes(8000, bits) == 1000 * bits
