"""The value that carries a layer's packed weights."""

import torch

from oats_vision.core.oats import Factors
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear


def test_a_layers_value_holds_its_tensors_and_splits_u_by_parts():
    shapes = {"q": (4, 3), "k": (2, 1), "v": (2, 0)}
    parts = [
        (name, Factors(torch.eye(rows, 6), torch.randn(rows, rank), torch.randn(rank, 6), 0.0, 1))
        for name, (rows, rank) in shapes.items()
    ]
    layer = SparseLowRankLinear.from_factors(parts, torch.randn(8), torch.float32)
    packed = layer.packed
    state = layer.state_dict(keep_vars=True)
    assert packed.values is state["sparse.values"]
    assert packed.bitmask is state["sparse.bitmask"]
    assert packed.U is state["low_rank.U"]
    assert packed.V is state["low_rank.V"]
    assert packed.bias is state["bias"]
    assert (packed.in_features, packed.heights(), packed.ranks()) == (6, [4, 2, 2], [3, 1, 0])
    for U, (_, factors) in zip(packed.U_parts(), parts, strict=True):
        assert torch.equal(U, factors.U)
    expected = torch.cat([factors.U @ factors.V for _, factors in parts])
    torch.testing.assert_close(packed.U_blocks() @ packed.V, expected)
