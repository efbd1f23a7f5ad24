"""y = S x + U (V x) + b, S packed: one operator of PyTorch, so that torch.compile and torch.export keep it whole.

Several ways lead to the same product. For few tokens, one pass over the packed weights, where reading them is most of
the work. For many tokens in float32, a sparse product on the CPU, where arithmetic is; in bfloat16, a dense product on
the CPU's matrix units if it has them, which S reaches in tiles spread out on the way. Else S is spread out for the time
of one dense product: on other devices, and in float16 where PyTorch's product is faster than that in float32.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

from oats_vision.kernels import native
from oats_vision.kernels.matrix import Matrix, MatrixCache
from oats_vision.kernels.packed import PackedWeight, Part, unpack

# so many tokens at once take one pass over the packed weights; more are worth building the stream of a sparse product,
# or, where there are matrix units for bfloat16, filling their tiles
ONE_PASS_TOKENS = 16
ONE_PASS_TOKENS_WITH_UNITS = 4

_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))
# looked up once: these are asked in every product
_transforming = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._is_tracing
_modes = torch._C._len_torch_dispatch_stack


def sparse_low_rank_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """S x + U (V x) + b, accumulated in float32, in the dtype of x.

    Args:
        x: (..., in_features), any floating dtype, on the device of the weight.
        weight: any floating dtype.

    Returns:
        (..., out_features).

    Raises:
        ValueError: the bitmask does not fit the values, or the input does not fit the weight.
    """
    if not torch.compiler.is_compiling() and _transforms():
        return _by_dense(x, weight)  # PyTorch's own operators, which all of them know
    tensors, records = (x, *weight[:5]), _records()
    if records and torch.onnx.is_in_onnx_export():
        return _by_dense(x, weight)
    if records or not _are_plain(tensors) or asks_for_gradients(tensors):
        y: Tensor = _operator(*tensors, weight.heights(), weight.ranks())
        return y
    return _product(x, weight)  # without an operator's overhead


def _transforms() -> bool:
    """Whether functions are transformed here (vmap, jvp, torch.func)."""
    return _transforming() is not None or forward_ad._current_level >= 0


def _records() -> bool:
    """Whether operators are recorded here and not only run: by compile, export, make_fx, fake tensors, a trace."""
    return torch.compiler.is_compiling() or _modes() > 0 or _tracing()


def only_runs(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a product of these runs here, in memory, and is neither recorded nor transformed."""
    return not (_records() or _transforms()) and _are_plain(tensors)


def asks_for_gradients(tensors: Iterable[Tensor | None]) -> bool:
    """Whether gradients of a product of these are asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all are tensors with memory, and none of a class that stands for one."""
    return _PLAIN.issuperset(map(type, tensors))


def expand(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    """S with its zeros, (out_features, in_features), dtype of the values.

    Args:
        values, bitmask: as in `PackedWeight`.

    Raises:
        ValueError: the bitmask does not fit the values.
    """
    runs = only_runs((values, bitmask))
    usable = values.device.type == "cpu" and values.dtype in native.TYPES and not values.requires_grad
    if runs and usable and native.available():
        return Matrix(PackedWeight.of_sparse(values, bitmask, in_features)).expand()
    mask = unpack(bitmask, in_features)
    if runs:
        check_ones(mask, len(values))
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def check_ones(mask: Tensor, count: int) -> None:
    """Raises ValueError if a mask, unless it has no memory, has not as many ones as there are values."""
    if not mask.is_meta and (ones := int(mask.sum())) != count:
        raise ValueError(f"the bitmask has {ones} ones for {count} values")


def _product(x: Tensor, weight: PackedWeight) -> Tensor:
    dtype, stored = x.dtype, weight.values.dtype
    if not x.is_cpu or dtype not in native.TYPES or stored not in native.TYPES or not native.available():
        return _by_dense(x, weight)
    tokens = x.numel() // max(x.shape[-1], 1)
    by_units = (
        tokens > ONE_PASS_TOKENS_WITH_UNITS and dtype == stored == torch.bfloat16 and native.multiplies_bfloat16()
    )
    one_pass = tokens <= ONE_PASS_TOKENS and not by_units
    if not by_units and not one_pass and dtype != torch.float32 and native.multiplies_16_bits_faster(dtype):
        return _by_dense(x, weight)
    matrix = Matrix(weight) if weight.cache is None else weight.cache.get(weight)
    if by_units:
        return matrix.many_bfloat16(x)
    return matrix.few_tokens(x) if one_pass else matrix.many_tokens(x.float()).to(dtype)


def _by_dense(x: Tensor, weight: PackedWeight) -> Tensor:
    """By a dense product."""
    return by_dense(x, expand(weight.values, weight.bitmask, weight.in_features).to(x.dtype), weight)


def by_dense(x: Tensor, S: Tensor, weight: PackedWeight) -> Tensor:
    """S x + U (V x) + b, with S spread out.

    Args:
        x: (..., in_features).
        S: (out_features, in_features), in the dtype of x; of the weight only U, V and the bias count.
    """
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    if not len(weight.V):
        return F.linear(x, S, bias)
    tokens = x.numel() // max(x.shape[-1], 1)
    if tokens * sum(S.shape) < S.numel():  # U (V x) is less work than U V
        flat = x.reshape(-1, x.shape[-1])
        return torch.addmm(_low_rank(flat, weight), flat, S.T).view(*x.shape[:-1], len(S))
    return F.linear(x, dense_weight(S, weight), bias)


def dense_weight(S: Tensor, weight: PackedWeight) -> Tensor:
    """S + U V in float32 or better, rounded once to the dtype of S: (out_features, in_features)."""
    dtype = torch.promote_types(S.dtype, torch.float32)
    parts = zip(
        S.to(dtype).split(weight.heights()), weight.U_parts(), weight.V.to(dtype).split(weight.ranks()), strict=True
    )
    rows = [torch.addmm(s, u.to(dtype), v) for s, u, v in parts]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(S.dtype)


def _low_rank(x: Tensor, weight: PackedWeight) -> Tensor:
    """U (V x) + b for x (tokens, in_features), in the dtype of x."""
    inner = (x @ weight.V.to(x.dtype).T).split(weight.ranks(), dim=1)
    bias = x.new_zeros(len(weight.U)) if weight.bias is None else weight.bias.to(x.dtype)
    parts = zip(inner, weight.U_parts(), bias.split(weight.heights()), strict=True)
    rows = [torch.addmm(b, z, u.to(x.dtype).T) for z, u, b in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


# A compiled model calls the operator with tensors alone, as PyTorch's schemas have it: what was checked of them is kept
# here.
_caches = WeakIdKeyDictionary()  # by bitmask


# spelled out, since what can be read off annotations differs between releases of PyTorch
_SCHEMA = (
    "(Tensor x, Tensor values, Tensor bitmask, Tensor U, Tensor V, Tensor? bias, int[] out_features, int[] ranks)"
    " -> Tensor"
)


@torch.library.custom_op("oats_vision::sparse_low_rank_linear", mutates_args=(), schema=_SCHEMA)
def _operator(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    out_features: list[int],
    ranks: list[int],
) -> Tensor:
    cache = _caches.get(bitmask)
    if cache is None:
        cache = _caches[bitmask] = MatrixCache()
    y = _product(x, PackedWeight(values, bitmask, U, V, bias, _parts(out_features, ranks), cache))
    return y.clone() if y._is_view() else y  # models add to it in place, which autograd allows for no view


def _parts(out_features: list[int], ranks: list[int]) -> list[Part]:
    return list(map(Part, out_features, ranks))


@_operator.register_fake
def _(x: Tensor, values: Tensor, bitmask: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(bitmask))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, out_features, ranks = inputs
    ctx.save_for_backward(*tensors)
    ctx.parts = _parts(out_features, ranks)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of y = S x + U (V x) + b: dx = (S^T + V^T U^T) dy, dS = dy x^T where S has a value, dU = dy (V x)^T, ..."""
    x, values, bitmask, U, V, bias = ctx.saved_tensors
    weight = PackedWeight(values, bitmask, U, V, bias, ctx.parts)
    wanted: dict[str, bool] = dict(
        zip(("x", "values", "bitmask", "U", "V", "bias"), ctx.needs_input_grad, strict=False)
    )
    dtype = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
    dy, flat = grad.reshape(-1, grad.shape[-1]).to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
    dy_parts = dy.split(weight.heights(), dim=1)
    dz = torch.cat([d @ u.to(dtype) for d, u in zip(dy_parts, weight.U_parts(), strict=True)], dim=1)  # (tokens, ranks)
    out: dict[str, Tensor] = {}
    if wanted["x"]:
        S = expand(values, bitmask, weight.in_features).to(dtype)
        out["x"] = (dy @ S + dz @ V.to(dtype)).view(x.shape).to(x.dtype)
    if wanted["values"]:
        out["values"] = (dy.T @ flat)[unpack(bitmask, weight.in_features)].to(values.dtype)
    if wanted["U"]:
        z = (flat @ V.to(dtype).T).split(weight.ranks(), dim=1)
        rows = [d.T @ part for d, part in zip(dy_parts, z, strict=True)]
        out["U"] = torch.cat([F.pad(r, (0, U.shape[1] - r.shape[1])) for r in rows]).to(U.dtype)
    if wanted["V"]:
        out["V"] = (dz.T @ flat).to(V.dtype)
    if wanted["bias"]:
        out["bias"] = dy.sum(0).to(bias.dtype)
    return (*(out.get(name) for name in wanted), None, None)


_operator.register_autograd(_gradients, setup_context=_save)
