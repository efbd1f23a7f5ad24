"""Products with values of few bits, on each instruction set that this CPU has, against float64."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from oats_vision.core.grid import LEVELS, Grid, Quantised, Scales
from oats_vision.core.oats import Factors
from oats_vision.kernels import Part, native
from oats_vision.kernels.codes import WIDTHS
from oats_vision.kernels.few_bits import FewBitsMatrix, FewBitsWeight, kernels_take
from oats_vision.nn.sparse import QuantisedSparse
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear
from tests.helpers.rounding import of_inputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of a sum: one rounding to the input's dtype, after about 1e-6 of float32 accumulation
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    assert native.instruction_sets()[-1] == "portable", "the package was installed without its compiled kernels"


def _values(rows: int, columns: int, grid: Grid, density: float | None) -> Quantised:
    groups = rows, grid.groups(columns)
    codes = torch.randint(grid.levels, (rows, columns), dtype=torch.uint8)
    zero = None if grid.symmetric else torch.randint(256, groups, dtype=torch.uint8)  # beyond the codes too
    kept = None if density is None else torch.rand(rows, columns) < density
    return Quantised(codes, kept, Scales(grid, torch.randn(groups).bfloat16(), zero))


@st.composite
def problems(draw):
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(0, 210) | st.sampled_from([512, 600, 1100]))
    bits, group_size = draw(st.sampled_from(list(WIDTHS))), draw(st.sampled_from([0, 16, 48, 64, 128, 272, 512]))
    levels = draw(st.sampled_from(["symmetric", "zeros", *["normal"] * (bits in LEVELS)]))
    grid = Grid(bits, group_size, levels != "zeros", levels == "normal")
    tokens = draw(st.integers(0, 16))
    density = draw(st.sampled_from([None, 0.0, 0.03, 0.4, 0.9, 1.0]))
    cut = draw(st.integers(0, rows))  # two parts, or one
    ranks = (draw(st.integers(0, 6)), draw(st.integers(0, 6)))
    dtypes = (
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([*DTYPES, torch.int8])),
        draw(st.sampled_from([*DTYPES, None])),  # without a bias
    )
    return rows, columns, grid, tokens, density, cut, ranks, dtypes, draw(st.integers(0, 99))


def _factor(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    """U or V, the scales of its rows if it is int8, and what both stand for in float64."""
    if dtype != torch.int8:
        factor = torch.randn(rows, columns).to(dtype)
        return factor, None, factor.double()
    factor = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    scale = (torch.randn(rows) / 64).bfloat16()
    return factor, scale.view(torch.int16), factor.double() * scale.double()[:, None]


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_both_kernels_are_the_matrix_in_float64(instruction_set, problem):
    rows, columns, grid, tokens, density, cut, ranks, (x_dtype, dtype, bias_dtype), seed = problem
    torch.manual_seed(seed)
    values = _values(rows, columns, grid, density)
    parts = [Part(cut, ranks[0]), Part(rows - cut, ranks[1])]
    U, U_scale, U_values = _factor(rows, max(ranks), dtype)
    V, V_scale, V_values = _factor(sum(ranks), columns, dtype)
    bias = None if bias_dtype is None else torch.randn(rows).to(bias_dtype)
    x = torch.randn(tokens, columns).to(x_dtype)

    low_rank = torch.cat(
        [u[:, :r] @ v for u, v, r in zip(U_values.split([cut, rows - cut]), V_values.split(ranks), ranks, strict=True)]
    )
    S = values.dense().double()
    b = (torch.zeros(rows) if bias is None else bias).double()
    expected = F.linear(x.double(), S + low_rank, b)
    # zeros are taken off products of codes as large as they
    codes = (values.scales.scale.double().abs() * 256).repeat_interleave(grid.group_size or max(columns, 1), 1)
    size = F.linear(x.double().abs(), codes[:, :columns] + low_rank.abs(), b.abs()) + 1e-9
    weight = QuantisedSparse.pack([values]).with_factors(U, V, bias, parts)
    weight = weight._replace(U_scale=U_scale, V_scale=V_scale)
    assert kernels_take(weight, x) or tokens > 2
    matrix = FewBitsMatrix(weight)
    with native.instruction_set(instruction_set):
        y, dense = matrix.few_tokens(x), matrix.dequantise()
    assert torch.equal(dense, values.dense())
    assert y.shape == expected.shape
    assert y.dtype == x_dtype
    assert ((y.double() - expected).abs() <= ROUNDING[x_dtype] * size + of_inputs(x, S)).all()


def _layer(
    rows: int = 24,
    columns: int = 100,
    dtype: torch.dtype = torch.float32,
    density: float | None = 0.4,
    grid: Grid | None = None,
) -> SparseLowRankLinear:
    values = _values(rows, columns, grid or Grid(3, 16, False), density)
    factors = Factors(values.dense(), torch.randn(rows, 3), torch.randn(3, columns), 0.1, 1, quantised=values)
    return SparseLowRankLinear.from_factors([("w", factors)], torch.randn(rows), dtype)


def _weight(layer: SparseLowRankLinear) -> FewBitsWeight:
    return layer.sparse.with_factors(layer.low_rank.U, layer.low_rank.V, layer.bias, layer.spec.parts)


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("tokens", [(), (1,), (2, 8), (17,), (3, 40)])
def test_a_layer_takes_any_number_of_tokens(instruction_set, density, x_dtype, tokens):
    torch.manual_seed(0)
    layer, x = _layer(dtype=torch.float16, density=density), torch.randn(*tokens, 100).to(x_dtype)
    W, b = layer.sparse.dense().double() + layer.low_rank.U.double() @ layer.low_rank.V.double(), layer.bias.double()
    with native.instruction_set(instruction_set):
        y = layer(x)
        if x[..., 0].numel() <= (
            2 if instruction_set == "portable" else 16
        ):  # in one pass, which dense products in 16 bits do not equal to the bit
            assert torch.equal(y, FewBitsMatrix(_weight(layer)).few_tokens(x))
    assert y.dtype == x_dtype
    size = F.linear(x.double().abs(), W.abs() + 3, b.abs())
    allowed = 4 * ROUNDING[x_dtype] * size + of_inputs(x, layer.sparse.dense())
    assert ((y.double() - F.linear(x.double(), W, b)).abs() <= allowed).all()


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_threads_share_rows(instruction_set):
    torch.manual_seed(0)
    layer, x = _layer(1100, 300), torch.randn(3, 300)
    expected, before, results = layer.sparse.dense(), torch.get_num_threads(), []
    with native.instruction_set(instruction_set):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(layer(x))
            assert torch.equal(layer.sparse.dense(), expected)
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_shapes_that_do_not_fit_are_errors():
    good = _weight(_layer())
    FewBitsMatrix(good)
    bad = {
        "bits": 7,
        "group_size": 32,
        "code_count": good.code_count + 8,
        "codes": good.codes[:-1],
        "scales": good.scales[:, 1:],
        "zeros": good.zeros[1:],
        "bitmask": good.bitmask[:, :1],
        "U": good.U[:5],
        "V": good.V[:2],
        "bias": good.bias[:5],
        "parts": [Part(24, 4)],
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match="must"):
            FewBitsMatrix(good._replace(**{name: value}))
    with pytest.raises(ValueError, match="group_size must be 0 or a multiple of 16, got 8"):
        FewBitsMatrix(good._replace(group_size=8))
    with pytest.raises(ValueError, match="without a bitmask cannot have"):
        FewBitsMatrix(good._replace(bitmask=None))
    with pytest.raises(ValueError, match=r"scales must be torch\.int16 \[24, 7\], got torch.bfloat16"):
        FewBitsMatrix(good._replace(scales=good.scales.view(torch.bfloat16)))
    with pytest.raises(ValueError, match="on the CPU"):
        FewBitsMatrix(good._replace(codes=good.codes.to("meta")))
    with pytest.raises(ValueError, match="strides"):
        FewBitsMatrix(good._replace(scales=good.scales.T.contiguous().T))
    with pytest.raises(ValueError, match="100 features"):
        FewBitsMatrix(good).few_tokens(torch.zeros(2, 99))


def test_factors_in_int8_that_do_not_fit_are_errors():
    good = _weight(_layer())
    U, V = torch.ones(24, 3, dtype=torch.int8), torch.ones(3, 100, dtype=torch.int8)
    scales = {"U_scale": torch.zeros(24, dtype=torch.int16), "V_scale": torch.zeros(3, dtype=torch.int16)}
    FewBitsMatrix(good._replace(U=U, V=V, **scales))
    floats, without = good._replace(**scales), good._replace(U=U, V=V)
    assert not kernels_take(floats)
    assert not kernels_take(without)
    for bad in (
        floats,
        without,
        floats._replace(U=U),
        floats._replace(V=V),
        floats._replace(U=U, V=V, U_scale=scales["U_scale"][1:]),
        floats._replace(U=U, V=V, V_scale=scales["U_scale"]),
        floats._replace(U=U, V=V, V_scale=None),
        floats._replace(U=U, V=V, U_scale=scales["U_scale"].view(torch.bfloat16)),
        floats._replace(U=U, V=V, bias=U[:, 0].contiguous()),
    ):
        with pytest.raises(ValueError, match="must"):
            FewBitsMatrix(bad)


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("write", ["all ones", "fewer ones", "past the last column", "to another row"])
def test_bits_that_do_not_fit_the_codes_are_never_followed(instruction_set, write):
    layer, x = _layer(), torch.randn(2, 100)
    bitmask = layer.sparse.bitmask
    with native.instruction_set(instruction_set):
        layer(x)  # so that the matrix is cached
        if write == "all ones":
            bitmask.data.fill_(255)
        elif write == "fewer ones":
            bitmask.data[0] = 0
        elif write == "past the last column":
            last = layer.sparse.mask()[-1].nonzero()[-1]
            bitmask.data[-1, last // 8] &= ~(1 << last % 8) & 255
            bitmask.data[-1, -1] |= 128
        else:  # another matrix, but a sound one
            bitmask.data.copy_(bitmask.flip(0).clone())
            W = layer.sparse.dense() + layer.low_rank.U @ layer.low_rank.V
            assert ((layer(x) - F.linear(x, W, layer.bias)).abs() <= 1e-3 + 2 * of_inputs(x, W)).all()
            return
        with pytest.raises(ValueError, match="the bitmask does not fit"):
            layer(x)
        with pytest.raises(ValueError, match="the bitmask does not fit"):
            layer.sparse.dense()


@pytest.mark.parametrize("name", ["codes", "scales", "zeros", "bitmask"])
@pytest.mark.parametrize("used", [False, True])
def test_memory_that_was_freed_is_seen(name, used):
    layer, x = _layer(), torch.randn(3, 100)
    if used:
        layer(x)
    getattr(layer.sparse, name).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="its storage was freed"):
        layer(x)
    with pytest.raises(ValueError, match="its storage was freed"):
        layer.sparse.dense()


def test_tensors_that_were_exchanged_are_seen():
    layer, x = _layer(), torch.randn(4, 100)
    expected = layer(x)
    for change in (
        lambda: layer.half(),
        lambda: layer.float(),
        lambda: setattr(layer.low_rank.V, "data", layer.low_rank.V.data.half().float()),
        lambda: setattr(layer.sparse, "codes", layer.sparse.codes.clone()),
    ):
        change()
        torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-1)
    layer.sparse.scales = layer.sparse.scales * 0
    assert not layer.sparse.dense().any()
    assert (layer(x) - expected).abs().max() > 1


def test_layers_that_were_used_can_be_copied_pickled_and_loaded_into():
    layer, x = _layer(), torch.randn(4, 100)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    other = SparseLowRankLinear.empty(layer.spec, torch.float32, "cpu")
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("density", [None, 0.4])
@pytest.mark.parametrize("tokens", [3, 50])
def test_whatever_records_or_transforms_gets_operators_that_depend_on_the_input(density, tokens):
    torch.manual_seed(0)
    model = nn.Sequential(_layer(density=density), nn.GELU(), _layer(8, 24, density=density))
    dense = nn.Sequential(model[0].merge(), nn.GELU(), model[2].merge())
    x, other = torch.randn(tokens, 100), torch.randn(tokens, 100)
    expected = model(other)
    close = {"rtol": 1e-4, "atol": 1e-4 * float(expected.abs().max())}
    torch.testing.assert_close(expected, dense(other), **close)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(other), expected, **close)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(other), expected, **close)
    torch.testing.assert_close(torch.vmap(model)(other), expected, **close)

    def loss(one: nn.Module, x: Tensor) -> Tensor:
        return one(x).square().sum()

    wanted = torch.func.grad(lambda x: loss(dense, x))(x)
    close = {"rtol": 1e-3, "atol": 1e-3 * float(wanted.abs().max())}
    torch.testing.assert_close(torch.func.grad(lambda x: loss(model, x))(x), wanted, **close)
    x.requires_grad_()
    loss(model, x).backward()
    torch.testing.assert_close(x.grad, wanted, **close)
    model[0].low_rank.requires_grad_()  # fine-tuning asks by name
    loss(model, other).backward()
    assert model[0].low_rank.U.grad.abs().sum() > 0


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_seen(instruction_set, value):
    layer, x = _layer(density=None), torch.randn(3, 100)
    x[1, 70] = value
    with native.instruction_set(instruction_set):
        y = FewBitsMatrix(_weight(layer)).few_tokens(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("size", [1e-44, 1e-37, 1e-30, 1e30])
def test_inputs_of_any_size(instruction_set, size):
    torch.manual_seed(0)
    layer, x = _layer(density=None), torch.randn(2, 100)
    with native.instruction_set(instruction_set):
        matrix = FewBitsMatrix(_weight(layer)._replace(bias=None))
        y, scaled = matrix.few_tokens(x).double() * size, matrix.few_tokens(x * size).double()
    # below 4e-34 all are taken for zeros
    torch.testing.assert_close(scaled, y, rtol=1e-3, atol=max(float(y.abs().max()) / 1e4, 1e-32))


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_an_outlier_leaves_other_groups_as_they_are(instruction_set):
    torch.manual_seed(0)
    layer = _layer(columns=128, density=None, grid=Grid(4, 64))
    outlier, x = torch.zeros(1, 128), torch.randn(1, 128)
    outlier[0, 3], x[0, :64] = 1e4, 0
    with native.instruction_set(instruction_set):
        y = layer(outlier + x) - layer(outlier)
    expected = F.linear(x.double(), layer.merge().weight.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=0.05)


def test_groups_that_the_kernels_do_not_take_are_left_to_pytorch():
    layer, x = _layer(grid=Grid(4, 8)), torch.randn(2, 100)
    torch.testing.assert_close(layer(x), layer.merge()(x), rtol=1e-4, atol=1e-3)
