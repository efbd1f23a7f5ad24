"""Modules of sliced models: what a stream loses counts as zeros."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oats_vision.nn.sliced import SlicedBlock, SlicedNorm, SlicedReader, Slicing
from oats_vision.nn.sparse_low_rank import merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_norm_is_that_of_the_padded_stream(dtype):
    x = torch.randn(2, 5, 6).to(dtype)
    padded = F.pad(x.float(), (0, 4))
    expected = F.rms_norm(padded, (10,), eps=1e-5)[..., :6].to(dtype)
    y = SlicedNorm(10, 1e-5)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected)


def _block() -> SlicedBlock:
    torch.manual_seed(0)
    norms = (SlicedNorm(8, 1e-6), SlicedNorm(8, 1e-6))
    return SlicedBlock(norms, SlicedReader(6, 6), nn.Linear(6, 6), nn.Linear(8, 6), [nn.Linear(6, 6) for _ in "12"], 8)


def test_a_block_is_its_formula_and_merging_leaves_it_as_it_is():
    block, x = _block(), torch.randn(2, 3, 8)
    s = block.entry(x)
    y = block.shortcut1(s) + F.linear(block.norm1(s), block.attention.weight, block.attention.bias)
    expected = block.shortcut2(y) + block.mlp(block.norm2(y))
    torch.testing.assert_close(block(x), expected)
    modules = list(block.modules())
    assert merge(block) is block
    assert list(block.modules()) == modules


def test_impossible_slicings_are_errors():
    good = {"width": 8, "sliced_width": 6, "parameters": 10, "dense_parameters": 16, "kept": [0.9]}
    assert Slicing.from_dict(good).kept == (0.9,)
    for change in ({"sliced_width": 9}, {"sliced_width": 0}, {"width": "8"}):
        with pytest.raises(ValueError, match=r"widths|cannot be sliced"):
            Slicing.from_dict(good | change)
