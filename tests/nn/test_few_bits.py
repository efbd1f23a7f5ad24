"""Compressed layers whose values have few bits."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from oats_vision.core.grid import Grid
from oats_vision.core.oats import Factors
from oats_vision.core.quantise import gptq, nearest
from oats_vision.nn.sparse_low_rank import LayerSpec, SparseLowRankLinear, merge
from tests.helpers.replicas import replica_of
from tests.helpers.rounding import of_inputs

CLOSE = {"rtol": 1e-4, "atol": 1e-3}  # of outputs of about 5: kernels round the inputs of few tokens to 16 bits


def _factors(m: int, n: int, rank: int, density: float, grid: Grid, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=generator)
    kept = None if density == 1 else torch.rand(m, n, generator=generator) < density
    found = nearest(W, grid) if kept is None else gptq(W, torch.eye(n), grid, kept)
    U, V = torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator)
    return Factors(found.dense(), U, V, error=0.1, iterations=1, quantised=found)


def _in_8_bits(factors: Factors) -> Factors:
    """U and V too."""
    return replace(factors, low_rank=(nearest(factors.U, Grid(8, 0)), nearest(factors.V, Grid(8, 0))))


def _layer(density: float = 0.5) -> SparseLowRankLinear:
    grid = Grid(4, 16)
    parts = [("q", _factors(8, 40, 3, density, grid, 1)), ("k", _factors(4, 40, 0, density, grid, 2))]
    return SparseLowRankLinear.from_factors(parts, torch.randn(12), torch.float32)


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    rank=st.integers(0, 4),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    bits=st.sampled_from([2, 3, 4, 6, 8]),
    group=st.sampled_from([0, 16, 32]),
    symmetric=st.booleans(),
    bias=st.booleans(),
    batch=st.sampled_from([(), (0,), (1,), (3,), (2, 5), (40,)]),
)
def test_forward_is_the_dense_product_in_float64(m, n, rank, density, bits, group, symmetric, bias, batch):
    factors = _factors(m, n, rank, density, Grid(bits, group, symmetric))
    b = torch.randn(m) if bias else None
    layer = SparseLowRankLinear.from_factors([("w", factors)], b, torch.float32)
    x = torch.randn(*batch, n)
    expected = F.linear(x.double(), factors.S.double() + factors.U.double() @ factors.V.double())
    expected = expected if b is None else expected + b.double()
    assert ((layer(x) - expected).abs() <= 1e-4 + 1e-4 * expected.abs() + of_inputs(x, factors.S)).all()
    torch.testing.assert_close(layer.merge()(x).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.sparse.dense(), factors.S.float())
    stored = [tensor.nbytes for name, tensor in layer.state_dict().items() if name != "bias"]
    assert sum(stored) == layer.spec.stored_bytes(4)
    assert ("sparse.bitmask" in layer.state_dict()) == (layer.spec.nonzeros < m * n)


def test_fused_weights_keep_each_parts_rows_and_the_spec_says_what_is_stored():
    for density in (0.5, 1.0):
        layer = _layer(density)
        assert LayerSpec.from_dict(layer.spec.to_dict()) == layer.spec
        assert layer.spec.grid == Grid(4, 16)
        weight = sum(tensor.nbytes for name, tensor in layer.state_dict().items() if name != "bias")
        assert layer.spec.stored_bytes(4) == weight
        empty = SparseLowRankLinear.empty(layer.spec, torch.float32)
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()}
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.state_dict().items()} == shapes
        empty.load_state_dict(layer.state_dict(), assign=True)
        x = torch.randn(5, 40)
        assert torch.equal(empty(x), layer(x))


def test_parts_that_keep_all_and_parts_that_do_not_share_a_bitmask():
    parts = [("q", _factors(8, 40, 0, 1.0, Grid(4, 16), 1)), ("k", _factors(4, 40, 0, 0.5, Grid(4, 16), 2))]
    layer = SparseLowRankLinear.from_factors(parts, None, torch.float32)
    torch.testing.assert_close(layer.dense_weight(), torch.cat([factors.S for _, factors in parts]).float())
    assert layer.spec.nonzeros == 8 * 40 + int(parts[1][1].quantised.kept.sum())


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_the_layer_survives_copies_conversions_and_compilation(density):
    layer, x = _layer(density), torch.randn(6, 40)
    expected = layer(x)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)]
    for other in copies:
        assert torch.equal(other(x), expected)
    half = copy.deepcopy(layer).half()
    assert torch.equal(half.sparse.dense(), layer.sparse.dense())  # what has few bits stays as it is
    torch.testing.assert_close(half(x.half()).float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(copy.deepcopy(layer).double()(x.double()).float(), expected, **CLOSE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), expected, **CLOSE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, **CLOSE)


def _other_codes(layer: SparseLowRankLinear) -> None:
    layer.sparse.codes = layer.sparse.codes.flip(0)


def _other_codes_in_place(layer: SparseLowRankLinear) -> None:
    layer.sparse.codes.copy_(layer.sparse.codes.flip(0))


def _other_memory(layer: SparseLowRankLinear) -> None:
    layer.low_rank.U.data = layer.low_rank.U.data.flip(1)


def _other_bias(layer: SparseLowRankLinear) -> None:
    layer.bias = nn.Parameter(torch.randn(12))


def _no_bias(layer: SparseLowRankLinear) -> None:
    layer.bias = None


def _other_state(layer: SparseLowRankLinear) -> None:
    layer.load_state_dict({name: tensor.flip(0) for name, tensor in _layer(1.0).state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    "change", [_other_codes, _other_codes_in_place, _other_memory, _other_bias, _no_bias, _other_state]
)
def test_a_layer_in_use_sees_what_becomes_of_its_tensors(change):
    layer, x = _layer(1.0), torch.randn(6, 40)
    for _ in range(2):
        before = layer(x)
    change(layer)
    after = F.linear(x, layer.dense_weight(), layer.bias)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(layer(x), after, **CLOSE)


def test_a_layer_in_use_sees_what_is_asked_of_it():
    layer, x = _layer(1.0), torch.randn(6, 40)
    for _ in range(2):
        expected = layer(x)
    asking = x.clone().requires_grad_()
    assert layer(asking).requires_grad
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected, **CLOSE)
    torch.testing.assert_close(layer(x.repeat(10, 1)), expected.repeat(10, 1), **CLOSE)
    torch.testing.assert_close(layer(x.double()).float(), expected, **CLOSE)
    with pytest.raises(ValueError, match="40 features"):
        layer(x[:, :39])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x)).shape == expected.shape
    layer.low_rank.U.requires_grad_()
    assert layer(x).requires_grad


def test_gradients_go_through_to_the_inputs_and_the_factors():
    layer, x = _layer(), torch.randn(6, 40, requires_grad=True)
    layer.low_rank.requires_grad_()
    layer(x).square().sum().backward()
    W = layer.dense_weight()
    y = F.linear(x.detach(), W, layer.bias)
    torch.testing.assert_close(x.grad, 2 * y @ W, rtol=1e-4, atol=1e-4)
    assert layer.low_rank.U.grad.isfinite().all()


def test_spreading_out_gives_what_kernels_take():
    layer, x = _layer(), torch.randn(6, 40)
    packed = layer.packed
    assert packed.values.dtype == layer.low_rank.U.dtype
    from oats_vision.kernels.product import sparse_low_rank_linear

    torch.testing.assert_close(sparse_low_rank_linear(x, packed), layer(x), **CLOSE)


@pytest.mark.parametrize(("bits", "normal"), [(2, True), (3, False), (4, False), (4, True), (5, False), (6, False)])
@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traces_give_the_same_outputs(bits, normal, density, tokens, tmp_path):
    import onnxruntime

    factors = _in_8_bits(_factors(24, 40, 3, density, Grid(bits, 16, normal=normal)))
    layer = SparseLowRankLinear.from_factors([("w", factors)], torch.randn(24), torch.float32).eval()
    x, other = torch.randn(tokens, 40), torch.randn(tokens, 40)
    torch.testing.assert_close(torch.jit.trace(layer, x)(other), layer(other), **CLOSE)
    for dynamo in (False, True):
        torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", input_names=["x"], dynamo=dynamo, verbose=False)
        (y,) = onnxruntime.InferenceSession(tmp_path / "layer.onnx").run(None, {"x": other.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), layer(other), **CLOSE)


def test_shapes_are_known_on_the_meta_device():
    for density in (0.5, 1.0):
        y = _layer(density).to("meta")(torch.empty(5, 40, device="meta"))
        assert (y.shape, y.device.type) == ((5, 12), "meta")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_layer_without_anything_floating_has_a_dtype(dtype):
    factors = _in_8_bits(_factors(8, 40, 3, 1.0, Grid(4, 16)))
    layer = SparseLowRankLinear.from_factors([("w", factors)], None, dtype)
    assert not any(tensor.is_floating_point() for tensor in layer.state_dict().values())
    empty = SparseLowRankLinear.empty(layer.spec, dtype)
    empty.load_state_dict(layer.state_dict(), assign=True)
    for one in (layer, empty, copy.deepcopy(layer), copy.deepcopy(layer).float().to(dtype), nn.Sequential(layer)):
        merged = merge(copy.deepcopy(one)) if isinstance(one, nn.Sequential) else one.merge()
        assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert layer.dense_weight().dtype == layer.packed.values.dtype == dtype
    assert copy.deepcopy(layer).float().merge().weight.dtype == torch.float32


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("factors_in_8_bits", [False, True])
@pytest.mark.parametrize("bias", [None, torch.randn(8)], ids=["no bias", "bias"])
def test_a_replica_for_data_parallel_computes_the_same(tokens, factors_in_8_bits, bias):
    factors = _factors(8, 40, 3, 0.5, Grid(4, 16))
    factors = _in_8_bits(factors) if factors_in_8_bits else factors
    layer = SparseLowRankLinear.from_factors([("w", factors)], bias, torch.float32)
    x = torch.randn(tokens, 40)
    assert torch.equal(replica_of(layer)(x), layer(x))
