import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.utils import pack_bitmasks
from hypothesis import given, settings
from hypothesis import strategies as st

from oats_vision.core.oats import Factors
from oats_vision.errors import ModelError
from oats_vision.nn.semi_structured import has_the_form, is_two_of_four, to_semi_structured
from oats_vision.nn.sparse import PackedSparse
from oats_vision.nn.sparse_low_rank import LayerSpec, SparseLowRankLinear
from tests.helpers.replicas import replica_of


def _factors(m: int, n: int, rank: int, density: float, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    S = torch.randn(m, n, generator=generator)
    S[torch.rand(m, n, generator=generator) >= density] = 0
    U, V = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    return Factors(S, U, V, error=0.1, iterations=1)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 40),
    rank=st.integers(0, 5),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.booleans(),
    batch=st.sampled_from([(), (0,), (1,), (3,), (2, 5), (2, 1, 3)]),
)
def test_forward_is_the_dense_product_in_float64(m, n, rank, density, bias, batch):
    factors = _factors(m, n, rank, density)
    b = torch.randn(m) if bias else None
    layer = SparseLowRankLinear.from_factors([("w", factors)], b, torch.float32)
    x = torch.randn(*batch, n)
    W = factors.S.double() + factors.U.double() @ factors.V.double()
    expected = F.linear(x.double(), W, None if b is None else b.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.merge()(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_parts_with_different_ranks_and_sizes():
    parts = [("q", _factors(8, 12, 3, 0.5, 1)), ("k", _factors(4, 12, 1, 0.5, 2)), ("v", _factors(4, 12, 0, 0.5, 3))]
    layer = SparseLowRankLinear.from_factors(parts, None, torch.float32)
    x = torch.randn(5, 12)
    expected = torch.cat([x @ factors.dense().T for _, factors in parts], -1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.dense_weight(), torch.cat([factors.dense() for _, factors in parts]))
    assert layer.spec.parameters == layer.sparse.values.numel() + 3 * (8 + 12) + 1 * (4 + 12)
    assert layer.spec.stored_bytes(4) == sum(tensor.nbytes for tensor in layer.state_dict().values())


def test_shapes_are_known_on_the_meta_device():
    layer = SparseLowRankLinear.from_factors([("w", _factors(24, 40, 3, 0.5))], torch.randn(24), torch.float32)
    y = layer.to("meta")(torch.empty(5, 40, device="meta"))
    assert (y.shape, y.device.type) == ((5, 24), "meta")


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_an_export_to_onnx_gives_the_same_outputs(tokens, dynamo, tmp_path):
    parts = [("q", _factors(24, 40, 3, 0.5, 1)), ("k", _factors(8, 40, 1, 0.5, 2))]
    layer = SparseLowRankLinear.from_factors(parts, torch.randn(32), torch.float32).eval()
    x, other = torch.randn(tokens, 40), torch.randn(tokens, 40)
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", input_names=["x"], dynamo=dynamo, verbose=False)
    (y,) = onnxruntime.InferenceSession(tmp_path / "layer.onnx").run(None, {"x": other.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [8, 13, 1, 64])
def test_bitmask_is_that_of_compressed_tensors(columns):
    S = torch.randn(5, columns) * (torch.rand(5, columns) > 0.5)
    packed = PackedSparse.pack(S, torch.float32)
    assert torch.equal(packed.bitmask, pack_bitmasks(S != 0))
    np.testing.assert_array_equal(packed.values.numpy(), S.numpy()[S.numpy() != 0])  # row order
    assert torch.equal(packed.dense(), S)


def test_values_that_vanish_in_half_precision_are_no_non_zeros():
    S = torch.tensor([[1.0, 1e-12, 0.0], [2.0, 3.0, 0.0]])
    factors = Factors(S, torch.zeros(2, 0), torch.zeros(0, 3), 0.0, 1)
    layer = SparseLowRankLinear.from_factors([("w", factors)], None, torch.float16)
    assert layer.spec.nonzeros == layer.sparse.values.numel() == 3


def test_non_contiguous_inputs_and_other_precisions():
    layer = SparseLowRankLinear.from_factors([("w", _factors(6, 10, 2, 0.5))], None, torch.float32)
    x = torch.randn(10, 7).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_impossible_specs_are_errors():
    spec = LayerSpec(
        4, 6, True, SparseLowRankLinear.from_factors([("w", _factors(6, 4, 1, 0.5))], None, torch.float32).spec.parts
    )
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    for change in ({"in_features": -4}, {"out_features": 7}, {"in_features": "4"}):
        with pytest.raises(ValueError, match=r"counts|rows"):
            LayerSpec.from_dict(spec.to_dict() | change)


def test_what_is_two_of_four_and_that_it_needs_a_gpu():
    rows = torch.tensor([[1, 1, 0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 1, 0, 0, 0]]).bool()
    assert is_two_of_four(rows)
    assert not is_two_of_four(rows[:, 1:])  # no whole groups
    assert not is_two_of_four(torch.ones(1, 4).bool())
    model = torch.nn.Sequential(SparseLowRankLinear.from_factors([("w", _factors(6, 8, 2, 0.5))], None, torch.float16))
    with pytest.raises(ModelError, match="NVIDIA GPU"):
        to_semi_structured(model)


@pytest.mark.parametrize(
    ("shape", "kept", "cutlass", "has"),
    [((32, 64), 2, True, True), ((32, 64), 3, False, False), ((32, 64), 0, False, False), ((16, 64), 2, True, False),
     ((32, 72), 2, False, False), ((16, 16), 2, False, True)],
)  # fmt: skip
def test_layers_of_another_form_keep_away_from_sparse_units(shape, kept, cutlass, has, monkeypatch):
    monkeypatch.setattr(torch.sparse.SparseSemiStructuredTensor, "_FORCE_CUTLASS", cutlass)
    S = torch.ones(shape) * (torch.arange(shape[1]) % 4 < kept)
    factors = Factors(S, torch.zeros(shape[0], 0), torch.zeros(0, shape[1]), 0.0, 1)
    assert has_the_form(SparseLowRankLinear.from_factors([("w", factors)], None, torch.float16)) == has


@pytest.mark.parametrize("bias", [None, torch.randn(24)], ids=["no bias", "bias"])
def test_a_replica_for_data_parallel_computes_the_same(bias):
    layer = SparseLowRankLinear.from_factors([("w", _factors(24, 40, 3, 0.5))], bias, torch.float32)
    x = torch.randn(5, 40)
    assert torch.equal(replica_of(layer)(x), layer(x))
