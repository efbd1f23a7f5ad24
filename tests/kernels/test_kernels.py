"""The products of compressed layers, on each instruction set that this CPU has, against float64."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from oats_vision.core.budget import Budget
from oats_vision.core.oats import Factors
from oats_vision.core.threshold import keep_largest
from oats_vision.errors import ConfigError
from oats_vision.kernels import PackedWeight, Part, expand, native, sparse_low_rank_linear
from oats_vision.kernels.matrix import Matrix, MatrixCache
from oats_vision.nn.sparse import PackedSparse
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of a sum: one rounding to the input's dtype, after about 1e-6 of float32 accumulation
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    assert native.instruction_sets()[-1] == "portable", "the package was installed without its compiled kernels"


def _sparse(rows: int, columns: int, density: float, dtype: torch.dtype) -> tuple[Tensor, PackedSparse]:
    S = torch.randn(rows, columns) * (torch.rand(rows, columns) < density)
    S = S.to(dtype)
    return S, PackedSparse.pack(S, dtype)


@st.composite
def problems(draw):
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 210))
    tokens = draw(st.sampled_from([0, 1, 2, 3, 5, 8, 11, 16, 17, 33, 97, 200]))
    density = draw(st.sampled_from([0.0, 0.03, 0.4, 0.9, 1.0]))
    cut = draw(st.integers(0, rows))  # two parts, or one
    ranks = (draw(st.integers(0, 6)), draw(st.integers(0, 6)))
    layout = draw(st.sampled_from(["contiguous", "rows apart", "transposed"]))
    dtypes = (draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES)))
    return rows, columns, tokens, density, cut, ranks, layout, dtypes, draw(st.booleans()), draw(st.integers(0, 99))


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_every_path_is_the_product_in_float64(instruction_set, problem):
    rows, columns, tokens, density, cut, ranks, layout, (x_dtype, dtype), with_bias, seed = problem
    torch.manual_seed(seed)
    S, packed = _sparse(rows, columns, density, dtype)
    parts = [Part(cut, ranks[0]), Part(rows - cut, ranks[1])]
    U, V = torch.randn(rows, max(ranks)).to(dtype), torch.randn(sum(ranks), columns).to(dtype)
    bias = torch.randn(rows).to(dtype) if with_bias else None
    x = torch.randn(tokens, columns).to(x_dtype)
    if layout == "rows apart":
        x = torch.cat([x, x], 1)[:, :columns]
    elif layout == "transposed":
        x = x.T.contiguous().T

    low_rank = torch.cat(
        [
            u[:, :r].double() @ v.double()
            for u, v, r in zip(U.split([cut, rows - cut]), V.split(ranks), ranks, strict=True)
        ]
    )
    W, b = S.double() + low_rank, torch.zeros(rows) if bias is None else bias
    expected = F.linear(x.double(), W, b.double())
    size = F.linear(x.double().abs(), S.double().abs() + low_rank.abs() + 3, b.double().abs()) + 1e-9
    with native.instruction_set(instruction_set):
        weight = PackedWeight(packed.values, packed.bitmask, U, V, bias, parts)
        matrix = Matrix(weight)
        results = [
            (matrix.few_tokens(x), ROUNDING[x_dtype]),
            (matrix.many_tokens(x.float()).to(x_dtype), ROUNDING[x_dtype]),
        ]
        # the dense path of 16-bit dtypes rounds U V and S x on their own, the matrix units V x
        rounded_more = 4 * ROUNDING[x_dtype]
        results.append((sparse_low_rank_linear(x, weight), rounded_more))
        assert torch.equal(expand(packed.values, packed.bitmask, columns), S)
        if native.multiplies_bfloat16() and dtype == x_dtype == torch.bfloat16:
            results.append((matrix.many_bfloat16(x), rounded_more))
    for y, tolerance in results:
        assert y.shape == expected.shape
        assert y.dtype == x_dtype
        assert ((y.double() - expected).abs() <= tolerance * size).all()


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "density"),
    [
        (2100, 200, 300, 0.3),  # more rows than a task takes
        (70, 200, 1100, 0.3),  # more tokens
        (1200, 3100, 20, 0.95),  # more values than are reordered at a time
        (40, 9000, 1000, 0.02),  # more inputs than are rearranged at a time
    ],
)
def test_large_products_are_put_together_from_their_pieces(instruction_set, threads, rows, columns, tokens, density):
    torch.manual_seed(0)
    S, packed = _sparse(rows, columns, density, torch.bfloat16)
    cut = rows // 3
    U, V = (torch.randn(shape).bfloat16() for shape in ((rows, 70), (110, columns)))
    bias, x = torch.randn(rows).bfloat16(), torch.randn(tokens, columns).bfloat16()
    low_rank = torch.cat([U[:cut].double() @ V[:70].double(), U[cut:, :40].double() @ V[70:].double()])
    W = S.double() + low_rank
    expected = F.linear(x.double(), W, bias.double())
    size = F.linear(x.double().abs(), S.double().abs() + U.double().abs() @ V[:70].double().abs(), bias.double().abs())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with native.instruction_set(instruction_set):
        parts = [Part(cut, 70), Part(rows - cut, 40)]
        matrix = Matrix(PackedWeight(packed.values, packed.bitmask, U, V, bias, parts))
        results = [(matrix.many_tokens(x.float()), 2e-6)]
        if native.multiplies_bfloat16():
            results.append((matrix.many_bfloat16(x), 4 * ROUNDING[torch.bfloat16]))
    torch.set_num_threads(before)
    for y, tolerance in results:
        assert ((y.double() - expected).abs() <= tolerance * size).all()


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("x", [torch.tensor([float("inf"), 1.0, 2.0]), torch.tensor([1e30, 1e38, 3.4e38])])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_at_the_ends_of_a_dtype(instruction_set, x, dtype):
    """Infinite, largest, subnormal, rounded up past the largest."""
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 65504, 65519, 65520, 6e-8, 3e-8, 2.9e-8, 1e-40])
    packed = PackedSparse.pack(torch.eye(10), torch.float32)
    packed.values.data = torch.ones(10)
    with native.instruction_set(instruction_set):
        matrix = Matrix(PackedWeight.of_sparse(packed.values, packed.bitmask, 10))
        y = matrix.few_tokens(torch.diag(special).to(dtype))
    finite = torch.isfinite(special.to(dtype))
    assert torch.equal(y.diagonal()[finite], special.to(dtype)[finite])
    # each token has one special feature; 0 x inf is NaN elsewhere, as in a dense product
    assert torch.equal(y.diagonal().isnan(), special.to(dtype).isnan())


@pytest.mark.parametrize("corruption", ["more ones", "fewer ones", "past the last column"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_bitmask_that_does_not_fit_is_never_followed(corruption, tokens):
    _, packed = _sparse(30, 77, 0.4, torch.float32)
    U, V, x = torch.zeros(30, 1), torch.zeros(1, 77), torch.randn(tokens, 77)
    cache = MatrixCache()

    def product() -> Tensor:
        weight = PackedWeight(packed.values, packed.bitmask, U, V, None, [Part(30, 1)], cache)
        return sparse_low_rank_linear(x, weight)

    product()  # so that the cache holds the sound matrix
    if corruption == "more ones":
        packed.bitmask[-1, :9] = 255
    elif corruption == "fewer ones":
        packed.bitmask[0] = 0
    else:
        packed.bitmask[-1, -1] ^= 128
        packed.values = nn.Parameter(torch.cat([packed.values, torch.ones(1)]), requires_grad=False)
    with pytest.raises(ValueError, match="the bitmask does not fit"):
        product()
    with pytest.raises(ValueError, match="the bitmask does not fit"):
        expand(packed.values, packed.bitmask, 77)


def test_shapes_that_do_not_fit_are_errors():
    _, packed = _sparse(6, 10, 0.5, torch.float32)
    U, V = torch.zeros(6, 2), torch.zeros(2, 10)
    good = PackedWeight(packed.values, packed.bitmask, U, V, torch.zeros(6), [Part(6, 2)])
    Matrix(good)
    bad = {
        "bitmask": packed.bitmask[:, :1],
        "U": U[:5],
        "V": torch.zeros(3, 10),
        "bias": torch.zeros(5),
        "parts": [Part(6, 3)],
    }
    for name, value in bad.items():
        with pytest.raises(ValueError, match=r"must|fit"):
            Matrix(good._replace(**{name: value}))
    with pytest.raises(ValueError, match=r"U must be torch\.float32 \[6, 2\], got torch.float16"):
        Matrix(good._replace(U=U.half()))
    with pytest.raises(ValueError, match="on the CPU"):
        Matrix(good._replace(U=U.to("meta")))
    with pytest.raises(ValueError, match="strides"):
        Matrix(good._replace(U=U.T.contiguous().T))
    with pytest.raises(ValueError, match="10 features"):
        Matrix(good).few_tokens(torch.zeros(2, 11))
    with pytest.raises(ValueError, match="instruction set must be one of"), native.instruction_set("mmx"):
        pass


def _layer(rows: int = 24, columns: int = 40, dtype: torch.dtype = torch.float32) -> SparseLowRankLinear:
    S = torch.randn(rows, columns) * (torch.rand(rows, columns) < 0.4)
    factors = Factors(S, torch.randn(rows, 3), torch.randn(3, columns), 0.1, 1)
    return SparseLowRankLinear.from_factors([("w", factors)], torch.randn(rows), dtype)


@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.parametrize("gradients", [False, True])
def test_it_is_one_operator_for_compile_and_export(tokens, gradients):
    model = nn.Sequential(nn.Linear(40, 40), _layer(), nn.GELU(), _layer(8, 24, torch.float16)).eval()
    x = torch.randn(tokens, 40)
    with torch.set_grad_enabled(gradients):
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=4096)},))
        torch.testing.assert_close(exported.module()(x), expected)
        # few tokens take another path, which sums in another order
        torch.testing.assert_close(exported.module()(x[:2]), expected[:2], rtol=1e-4, atol=1e-4)
    names = [str(node.target) for node in exported.graph.nodes]
    assert sum("sparse_low_rank_linear" in name for name in names) == 2


@pytest.mark.parametrize("tokens", [2, 60])
def test_the_operator_keeps_the_rules_of_pytorch(tokens):
    layer = _layer()
    tensors = (layer.sparse.values, layer.sparse.bitmask, layer.low_rank.U, layer.low_rank.V, layer.bias)
    for x in (torch.randn(tokens, 40), torch.randn(tokens, 40).requires_grad_()):
        torch.library.opcheck(torch.ops.oats_vision.sparse_low_rank_linear.default, (x, *tensors, [24], [3]))


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    S = torch.randn(5, 9, dtype=torch.float64) * (torch.rand(5, 9) < 0.5)
    packed = PackedSparse.pack(S, torch.float64)
    x, U, V, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 9), (5, 3), (4, 9), (5,))
    )
    values = packed.values.detach().requires_grad_()

    def product(x: Tensor, values: Tensor, U: Tensor, V: Tensor, bias: Tensor) -> Tensor:
        weight = PackedWeight(values, packed.bitmask, U, V, bias, [Part(2, 1), Part(3, 3)])
        return sparse_low_rank_linear(x, weight)

    assert torch.autograd.gradcheck(product, (x, values, U, V, bias))
    assert torch.autograd.gradgradcheck(product, (x, values, U, V, bias))


@pytest.mark.parametrize("tokens", [2, 60])
def test_gradients_of_a_layer_are_those_of_the_dense_layer(tokens):
    layer = _layer()
    x, y = (torch.randn(tokens, 40).requires_grad_() for _ in range(2))
    y.data = x.data
    layer(x).square().sum().backward()
    layer.merge()(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-3)
    layer.low_rank.requires_grad_()  # fine-tuning asks by name
    layer(x.detach()).square().sum().backward()
    assert layer.low_rank.U.grad.isfinite().all()
    assert layer.sparse.values.grad is None


@pytest.mark.parametrize("shape", [(2, 3, 40), (2, 50, 40)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", native.instruction_sets())
def test_outputs_can_be_changed_in_place_where_gradients_are_asked_for(shape, dtype, instruction_set):
    layer, x = _layer(dtype=dtype), torch.randn(shape, dtype=dtype, requires_grad=True)
    with native.instruction_set(instruction_set):
        y = layer(x)
        y += 1
        y.float().sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("tokens", [3, 50])
def test_whatever_records_or_transforms_gets_operators_that_depend_on_the_input(tokens):
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    model = nn.Sequential(_layer(), nn.GELU(), _layer(8, 24))
    x, other = torch.randn(tokens, 40), torch.randn(tokens, 40)
    expected, tangent = model(other), torch.randn(tokens, 40)
    dense = nn.Sequential(model[0].merge(), nn.GELU(), model[2].merge())
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.jit.trace(model, x, check_trace=False)(other), expected, **close)
    torch.testing.assert_close(make_fx(model)(x)(other), expected, **close)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = model(mode.from_tensor(x))
    assert fake.shape == expected.shape
    torch.testing.assert_close(torch.vmap(model)(other), expected, **close)
    torch.testing.assert_close(torch.vmap(model)(other.unflatten(0, (1, -1))), expected[None], **close)
    for ours, theirs in zip(
        torch.func.jvp(model, (other,), (tangent,)), torch.func.jvp(dense, (other,), (tangent,)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    loss = lambda one: lambda x: one(x).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss(model))(x), torch.func.grad(loss(dense))(x), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", ["default float64", "default bfloat16", "default device", "autocast"])
def test_outputs_do_not_depend_on_what_is_set_around_them(instruction_set, tokens, dtype, setting):
    layer, x = _layer(dtype=dtype), torch.randn(tokens, 40)
    with native.instruction_set(instruction_set):
        expected = layer(x)
        try:
            if setting == "autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    y = layer(x)
            elif setting == "default device":
                with torch.device("meta"):
                    y = layer(x)
            else:
                torch.set_default_dtype(getattr(torch, setting.removeprefix("default ")))
                y = layer(x)
        finally:
            torch.set_default_dtype(torch.float32)
    if setting == "autocast":  # inputs and outputs are rounded to bfloat16, and so may weights and V x be
        assert y.dtype == torch.bfloat16
        size = F.linear(x.abs(), layer.dense_weight(torch.float32).abs() + 3, layer.bias.float().abs())
        assert ((y.float() - expected).abs() <= 8 * ROUNDING[torch.bfloat16] * size).all()
    else:
        assert torch.equal(y, expected)


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", ["all ones", "one more in the last row", "past the last column", "to another row"])
def test_a_write_past_the_version_counter_is_seen(instruction_set, tokens, dtype, write):
    layer, x = _layer(24, 37, dtype), torch.randn(tokens, 37, dtype=dtype)
    bitmask = layer.sparse.bitmask
    with native.instruction_set(instruction_set):
        layer(x)  # so that the matrix is cached
        if write == "all ones":
            bitmask.data.fill_(255)
        elif write == "one more in the last row":
            free = (~layer.sparse.mask()[-1]).nonzero()[-1]
            bitmask.data[-1, free // 8] |= 1 << free % 8
        elif write == "past the last column":
            row = layer.sparse.mask()[-1].nonzero()[-1]
            bitmask.data[-1, row // 8] &= ~(1 << row % 8) & 255
            bitmask.data[-1, -1] |= 128
        else:  # another matrix, but a sound one
            bitmask.data.copy_(bitmask.flip(0).clone())
            assert torch.equal(layer.sparse.dense() != 0, layer.sparse.mask())
            W, b = layer.dense_weight(torch.float32), layer.bias.float()
            torch.testing.assert_close(layer(x).float(), F.linear(x.float(), W, b), rtol=0.03, atol=0.3)
            return
        with pytest.raises(ValueError, match="the bitmask does not fit"):
            layer(x)
        with pytest.raises(ValueError, match="the bitmask does not fit"):
            layer.sparse.dense()


@pytest.mark.parametrize("tokens", [1, 40])
def test_tensors_that_were_exchanged_are_seen(tokens):
    layer, x = _layer(24, 24), torch.randn(tokens, 24)
    expected = layer(x)
    for change in (
        lambda: layer.half(),
        lambda: layer.float(),
        lambda: setattr(layer.low_rank.V, "data", layer.low_rank.V.data.half().float()),
        lambda: setattr(layer.sparse.values, "data", layer.sparse.values.data.clone()),
    ):
        change()
        torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-1)
    for name in ("U", "V"):  # the same memory in another order
        factor = getattr(layer.low_rank, name)
        kept, factor.data = factor.data, factor.data.T.contiguous().T
        with pytest.raises(ValueError, match="strides"):
            layer(x)
        factor.data = kept
    layer.low_rank.U.data = layer.low_rank.U.data.bfloat16()
    with pytest.raises(ValueError, match=r"U must be torch\.float32"):
        layer(x)


@pytest.mark.parametrize("name", ["sparse.values", "sparse.bitmask", "low_rank.V", "bias"])
@pytest.mark.parametrize("used", [False, True])
def test_memory_that_was_freed_is_seen(name, used):
    layer, x = _layer(), torch.randn(3, 40)
    if used:
        layer(x)
    layer.state_dict()[name].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="its storage was freed"):
        layer(x)


@pytest.fixture
def asked_anew():
    """The environment's instruction set is asked for at the first product: here as in a process that had none yet."""
    before = native.active()
    native.available.cache_clear()
    yield
    native._native.use(before)
    native.available.cache_clear()


@pytest.mark.parametrize("name", native.instruction_sets())
def test_the_environment_forces_an_instruction_set(name, asked_anew, monkeypatch):
    monkeypatch.setenv("OATS_VISION_INSTRUCTION_SET", name)
    _layer()(torch.randn(2, 40))
    assert native.active() == name
    if name in ("avx2", "portable") and name != native.instruction_sets()[0]:
        assert not native.multiplies_bfloat16()
        assert not native.multiplies_16_bits_faster(torch.bfloat16)
        assert not native.multiplies_16_bits_faster(torch.float16)


def test_an_instruction_set_that_is_not_there_is_an_error(asked_anew, monkeypatch):
    monkeypatch.setenv("OATS_VISION_INSTRUCTION_SET", "mmx")
    with pytest.raises(ConfigError, match=r"OATS_VISION_INSTRUCTION_SET must be one of .*, got 'mmx'"):
        _layer()(torch.randn(2, 40))


def test_weights_in_half_precision_take_inputs_in_single_and_under_autocast():
    layer, x = _layer(dtype=torch.float16), torch.randn(4, 40)
    expected = F.linear(x.double(), layer.dense_weight().double(), layer.bias.double())
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-3, atol=2e-2)  # dense_weight is rounded to half
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_layers_that_were_used_can_be_copied_pickled_and_loaded_into():
    layer, x = _layer(), torch.randn(4, 40)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    other = _layer()
    other(x)
    other.sparse.values = nn.Parameter(torch.empty_like(layer.sparse.values), requires_grad=False)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)


def test_threads_follow_torch():
    layer, x = _layer(300, 200), torch.randn(300, 200)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append((layer(x), layer(x[:3])))
    torch.set_num_threads(before)
    for many, few in results[1:]:
        assert torch.equal(few, results[0][1])
        torch.testing.assert_close(many, results[0][0])


def test_without_the_compiled_module_all_is_the_same_and_it_says_so_once():
    program = """
import logging, sys
sys.modules["oats_vision.kernels._native"] = None  # as if it had not been built
import torch
logging.basicConfig(level=logging.WARNING)
from oats_vision.core.oats import Factors
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear
torch.manual_seed(0)
S = torch.randn(9, 20) * (torch.rand(9, 20) < 0.4)
factors = Factors(S, torch.randn(9, 2), torch.randn(2, 20), 0, 1)
layer = SparseLowRankLinear.from_factors([("w", factors)], None, torch.float32)
for tokens in (1, 5, 100):
    x = torch.randn(tokens, 20)
    torch.testing.assert_close(layer(x), x @ factors.dense().T, rtol=1e-4, atol=1e-4)
layer.sparse.bitmask[0] = 255
try:
    layer(x)
except ValueError as problem:
    print(problem)
"""
    where = Path(__file__).parent  # in the repository's folder the sources would be imported, not what is installed
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=where, check=False)
    assert done.returncode == 0
    assert done.stderr.count("compiled kernels are missing") == 1
    assert "bitmask" in done.stdout


@pytest.mark.parametrize("instruction_set", native.instruction_sets())
@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 150),
    share=st.floats(0, 1),
    beta=st.sampled_from([0.0, 0.9]),
    kind=st.sampled_from(["normal", "ties", "zeros", "heavy tails"]),
    guess=st.sampled_from(["none", "last", "wrong"]),
    seed=st.integers(0, 99),
)
def test_the_sparse_step_of_a_round_is_that_of_plain_tensors(
    instruction_set, rows, columns, share, beta, kind, guess, seed
):
    torch.manual_seed(seed)
    A, L, S = (torch.randn(rows, columns) for _ in range(3))
    if kind == "ties":
        A, L = A.round(), L.round()
    elif kind == "zeros":
        A = L.clone()
    elif kind == "heavy tails":
        A = A**9
    keep = round(share * columns)
    R = A - L
    expected = keep_largest(R, Budget(0, keep * rows))
    following = A - (expected + beta * (expected - S))
    threshold = torch.zeros(rows)
    if guess == "last" and 0 < keep < columns:
        threshold = R.abs().topk(keep, dim=1).values[:, -1] * (1 + 0.01 * torch.randn(rows)).abs()
    elif guess == "wrong":
        threshold = torch.rand(rows) * 1e6
    out = L.clone()
    with native.instruction_set(instruction_set):
        lost = native.sparse_step(A, out, S, out, threshold, keep=keep, extrapolation=beta)
    assert ((S != 0).sum(1) <= keep).all()
    if kind == "ties":  # which of equal magnitudes is kept is free
        assert torch.equal(S.abs().sort(1).values, expected.abs().sort(1).values)
    else:
        assert torch.equal(S, expected)
        torch.testing.assert_close(out, following, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lost, float((R - expected).double().square().sum()), rtol=1e-5, atol=1e-6)
