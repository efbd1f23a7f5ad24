"""y = S x + U (V x) + b, S packed: one operator of PyTorch, so that torch.compile and torch.export keep it whole.

Several ways lead to the same product. For few tokens, one pass over the packed weights, where reading them is most of
the work. For many tokens in float32, a sparse product on the CPU, where arithmetic is; in bfloat16, a dense product on
the CPU's matrix units if it has them, which S reaches in tiles spread out on the way. Else S is spread out for the time
of one dense product: on other devices, and in float16 where PyTorch's product is faster than that in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

from oats_vision.kernels import native

FEW_TOKENS = 16  # up to here, spreading out values in registers beats building the stream of a sparse product
FEW_FOR_UNITS = 4  # and here, filling the tiles of matrix units

_PLAIN = frozenset((Tensor, nn.Parameter, type(None)))
# looked up once: these are asked in every product
_transforming = torch._C._functorch.peek_interpreter_stack
_tracing = torch._C._is_tracing
_modes = torch._C._len_torch_dispatch_stack


def sparse_low_rank_linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    out_features: Sequence[int],
    ranks: Sequence[int],
    cache: native.MatrixCache | None = None,
) -> Tensor:
    """S x + U (V x) + b, accumulated in float32, in the dtype of x.

    Args:
        x: (..., in_features), any floating dtype.
        values, bitmask: of S, as in `oats_vision.nn.sparse_low_rank.PackedSparse`.
        U: (out_features, largest rank of a part); V: (sum of the parts' ranks, in_features).
        bias: (out_features,) or None.
        out_features, ranks: of each part: its rows of U multiply its rows of V.
        cache: kept by the caller for these tensors, so that they are checked once and not in each call.

    Raises:
        ValueError: the bitmask does not fit the values, or the input does not fit the matrix.
    """
    if not torch.compiler.is_compiling() and _transforms():
        # PyTorch's own operators, which all of them know
        return _by_dense(x, values, bitmask, U, V, bias, out_features, ranks)
    if _records() or not _are_plain(x, values, bitmask, U, V, bias) or _asks_for_gradients(x, values, U, V, bias):
        return _operator(x, values, bitmask, U, V, bias, out_features, ranks)
    return _product(x, values, bitmask, U, V, bias, out_features, ranks, cache)  # without an operator's overhead


def _transforms() -> bool:
    """Whether functions are transformed here (vmap, jvp, torch.func), or exported to ONNX by tracing."""
    if _transforming() is not None or forward_ad._current_level >= 0:
        return True
    return _tracing() and torch.onnx.is_in_onnx_export()


def _records() -> bool:
    """Whether operators are recorded here and not only run: by compile, export, make_fx, fake tensors, a trace."""
    return torch.compiler.is_compiling() or _modes() > 0 or _tracing()


def _are_plain(*tensors: Tensor | None) -> bool:
    """Whether all are tensors with memory, and none of a class that stands for one."""
    return _PLAIN.issuperset(map(type, tensors))


def _asks_for_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def expand(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    """S with its zeros, (out_features, in_features), dtype of the values.

    Raises:
        ValueError: the bitmask does not fit the values.
    """
    only_runs = not (_records() or _transforms()) and _are_plain(values, bitmask)
    usable = values.device.type == "cpu" and values.dtype in native.TYPES and not values.requires_grad
    if only_runs and usable and native.available():
        return native.expand(values, bitmask, in_features)
    mask = unpack(bitmask, in_features)
    if only_runs and int(mask.sum()) != len(values):
        raise ValueError(f"the bitmask has {int(mask.sum())} positions for {len(values)} values")
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def unpack(bitmask: Tensor, in_features: int) -> Tensor:
    """Where the non-zeros are: bool (out_features, in_features)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    bits = (bitmask.unsqueeze(-1) >> shifts) % 2  # `& 1` has no equal in ONNX
    return bits.bool().flatten(1)[:, :in_features]


def _product(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    out_features: Sequence[int],
    ranks: Sequence[int],
    cache: native.MatrixCache | None,
) -> Tensor:
    dtype = x.dtype
    if not x.is_cpu or dtype not in native.TYPES or values.dtype not in native.TYPES or not native.available():
        return _by_dense(x, values, bitmask, U, V, bias, out_features, ranks)
    tokens = x.numel() // max(x.shape[-1], 1)
    by_units = tokens > FEW_FOR_UNITS and dtype == values.dtype == torch.bfloat16 and native.multiplies_bfloat16()
    if tokens > FEW_TOKENS and not by_units and dtype != torch.float32 and native.multiplies_16_bits_faster(dtype):
        return _by_dense(x, values, bitmask, U, V, bias, out_features, ranks)
    matrix = (cache or native.MatrixCache()).get(values, bitmask, U, V, bias, out_features, ranks)
    if by_units:
        return matrix.many_bfloat16(x)
    return matrix.few_tokens(x) if tokens <= FEW_TOKENS else matrix.many_tokens(x.float()).to(dtype)


def _by_dense(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    out_features: Sequence[int],
    ranks: Sequence[int],
) -> Tensor:
    """By a dense product; U (V x) on its own where that is less work than U V."""
    S = expand(values, bitmask, x.shape[-1]).to(x.dtype)
    tokens = x.numel() // max(x.shape[-1], 1)
    if tokens * sum(S.shape) < S.numel():
        y = _low_rank(x.reshape(-1, x.shape[-1]), U, V, bias, out_features, ranks)
        return F.linear(x, S) + y.view(*x.shape[:-1], len(S))
    return F.linear(x, dense_weight(S, U, V, out_features, ranks), None if bias is None else bias.to(x.dtype))


def dense_weight(S: Tensor, U: Tensor, V: Tensor, out_features: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """S + U V in float32 or better, rounded once to the dtype of S: (out_features, in_features)."""
    dtype = torch.promote_types(S.dtype, torch.float32)
    terms = zip(S.to(dtype).split(list(out_features)), U.to(dtype).split(list(out_features)), strict=True)
    parts = zip(terms, V.to(dtype).split(list(ranks)), strict=True)
    rows = [torch.addmm(s, u[:, : len(v)], v) for (s, u), v in parts]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(S.dtype)


def _low_rank(
    x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None, out_features: Sequence[int], ranks: Sequence[int]
) -> Tensor:
    """U (V x) + b for x (tokens, in_features), in the dtype of x."""
    U, V = U.to(x.dtype), V.to(x.dtype)
    bias = x.new_zeros(len(U)) if bias is None else bias.to(x.dtype)
    if len(ranks) == 1:
        return torch.addmm(bias, x @ V.T, U.T)
    inner = (x @ V.T).split(list(ranks), dim=1)
    parts = zip(inner, U.split(list(out_features)), bias.split(list(out_features)), strict=True)
    return torch.cat([torch.addmm(b, z, u[:, : z.shape[1]].T) for z, u, b in parts], dim=1)


# compiled models call the operator with their tensors alone
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
        cache = _caches[bitmask] = native.MatrixCache()
    y = _product(x, values, bitmask, U, V, bias, out_features, ranks, cache)
    return y.clone() if y._is_view() else y  # models add to it in place, which autograd allows for no view


@_operator.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    U: Tensor,
    V: Tensor,
    bias: Tensor | None,
    out_features: list[int],
    ranks: list[int],
) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(bitmask))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.out_features, ctx.ranks = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of y = S x + U (V x) + b: dx = (S^T + V^T U^T) dy, dS = dy x^T where S has a value, dU = dy (V x)^T, ..."""
    x, values, bitmask, U, V, bias = ctx.saved_tensors
    wanted: dict[str, bool] = dict(
        zip(("x", "values", "bitmask", "U", "V", "bias"), ctx.needs_input_grad, strict=False)
    )
    dtype = torch.promote_types(torch.promote_types(x.dtype, values.dtype), torch.float32)
    dy, flat = grad.reshape(-1, grad.shape[-1]).to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
    U_parts = [u[:, :rank] for u, rank in zip(U.to(dtype).split(ctx.out_features), ctx.ranks, strict=True)]
    dy_parts = dy.split(ctx.out_features, dim=1)
    dz = torch.cat([d @ u for d, u in zip(dy_parts, U_parts, strict=True)], dim=1)  # (tokens, ranks)
    out: dict[str, Tensor] = {}
    if wanted["x"]:
        S = expand(values, bitmask, x.shape[-1]).to(dtype)
        out["x"] = (dy @ S + dz @ V.to(dtype)).view(x.shape).to(x.dtype)
    if wanted["values"]:
        out["values"] = (dy.T @ flat)[unpack(bitmask, x.shape[-1])].to(values.dtype)
    if wanted["U"]:
        z = (flat @ V.to(dtype).T).split(ctx.ranks, dim=1)
        rows = [d.T @ part for d, part in zip(dy_parts, z, strict=True)]
        out["U"] = torch.cat([F.pad(r, (0, U.shape[1] - r.shape[1])) for r in rows]).to(U.dtype)
    if wanted["V"]:
        out["V"] = (dz.T @ flat).to(V.dtype)
    if wanted["bias"]:
        out["bias"] = dy.sum(0).to(bias.dtype)
    return (*(out.get(name) for name in wanted), None, None)


_operator.register_autograd(_gradients, setup_context=_save)
