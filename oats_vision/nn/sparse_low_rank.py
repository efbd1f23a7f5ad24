"""The compressed layer: a packed sparse matrix plus a low-rank product in the place of nn.Linear.

W = S + U V as in OATS (Zhang and Papyan, ICLR 2025).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision.core.grid import LEVELS, Grid
from oats_vision.core.oats import Factors
from oats_vision.kernels.codes import packed_bytes
from oats_vision.kernels.few_bits import FewBitsCache, kernels_take
from oats_vision.kernels.matrix import MatrixCache
from oats_vision.kernels.packed import PackedWeight
from oats_vision.kernels.product import by_dense, dense_weight, sparse_low_rank_linear
from oats_vision.nn.low_rank import LowRank, QuantisedLowRank
from oats_vision.nn.sparse import PackedSparse, QuantisedSparse, pack_mask


@dataclass(frozen=True)
class PartSpec:
    """One matrix of a layer: the whole weight, or one of q, k and v of a fused qkv."""

    name: str
    out_features: int
    rank: int
    nonzeros: int


@dataclass(frozen=True)
class LayerSpec:
    """All that fixes the shapes of a `SparseLowRankLinear`, as stored in a checkpoint's config.

    grid: of the values of S, if these have few bits. int8_factors: whether U and V have 8 bits then; not without ranks.
    """

    in_features: int
    out_features: int
    bias: bool
    parts: tuple[PartSpec, ...]
    grid: Grid | None = None
    int8_factors: bool = False

    @property
    def ranks(self) -> list[int]:
        """Of the parts."""
        return [part.rank for part in self.parts]

    @property
    def nonzeros(self) -> int:
        return sum(part.nonzeros for part in self.parts)

    @property
    def parameters(self) -> int:
        """Non-zeros, U and V; neither the bitmask nor the bias."""
        return self.nonzeros + sum(part.rank * (part.out_features + self.in_features) for part in self.parts)

    @property
    def row_bytes(self) -> int:
        """Bytes of the bitmask for one row."""
        return -(-self.in_features // 8)

    @property
    def dense_parameters(self) -> int:
        return self.out_features * self.in_features

    @property
    def has_bitmask(self) -> bool:
        """Whether positions are stored: not where values have few bits and all are kept."""
        return self.grid is None or self.nonzeros < self.dense_parameters

    @property
    def bitmask_bytes(self) -> int:
        return self.out_features * self.row_bytes if self.has_bitmask else 0

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales and zeros of values of few bits."""
        if self.grid is None:
            return 0
        return self.out_features * self.grid.groups(self.in_features) * (2 if self.grid.symmetric else 3)

    def stored_bytes(self, itemsize: int) -> int:
        """Bytes of the weight: values, positions, scales, U and V; not of the bias.

        Args:
            itemsize: bytes of a floating value.
        """
        values = packed_bytes(self.nonzeros, self.grid.bits) if self.grid else self.nonzeros * itemsize
        return values + self.factor_bytes(itemsize) + self.bitmask_bytes + self.scale_bytes

    def bits(self, itemsize: int) -> float:
        """Of a weight, all of `stored_bytes` counted."""
        return 8 * self.stored_bytes(itemsize) / max(self.dense_parameters, 1)

    def factor_bytes(self, itemsize: int) -> int:
        """Bytes of U and V, with their scales where they have 8 bits.

        U is one matrix: a part of lower rank than another has zeros in it.

        Args:
            itemsize: bytes of a floating value.
        """
        entries = self.out_features * max(self.ranks, default=0) + sum(self.ranks) * self.in_features
        return entries + 2 * (self.out_features + sum(self.ranks)) if self.int8_factors else entries * itemsize

    def to_dict(self) -> dict[str, Any]:
        """For JSON: without what files of format version 1 do not have."""
        fields = asdict(self)
        if self.grid is None:
            del fields["grid"]
        if not self.int8_factors:
            del fields["int8_factors"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "LayerSpec":
        """Raises KeyError, TypeError or ValueError if a field is missing, unknown or impossible."""
        grid = Grid(**fields["grid"]) if fields.get("grid") else None
        spec = cls(**{**fields, "parts": tuple(PartSpec(**part) for part in fields["parts"]), "grid": grid})
        counts = [spec.in_features, spec.out_features, *(x for p in spec.parts for x in (p.rank, p.nonzeros))]
        if any(not isinstance(count, int) or count < 0 for count in counts):
            raise ValueError(f"counts must be whole numbers, got {counts}")
        if sum(part.out_features for part in spec.parts) != spec.out_features:
            raise ValueError(f"the parts do not make up {spec.out_features} rows")
        if spec.int8_factors and not (spec.grid and sum(spec.ranks)):
            raise ValueError("U and V of 8 bits are for values of few bits and a rank")
        if spec.grid and spec.grid.normal and not (spec.grid.symmetric and spec.grid.bits in LEVELS):
            raise ValueError(f"normal levels have {', '.join(map(str, LEVELS))} bits, and no zeros of groups")
        if spec.nonzeros > spec.dense_parameters:
            raise ValueError(f"{spec.nonzeros} values do not fit into {spec.dense_parameters} places")
        return spec


class SparseLowRankLinear(nn.Module):
    """y = S x + U (V x) + b: replaces an nn.Linear and takes the same inputs (..., in_features).

    It holds no dense copy. The weights stay in their own dtype and the product has that of the input (or of autocast).
    None of its parameters asks for gradients; those that are made to get them, with `low_rank.requires_grad_()`, say.

    Args:
        spec: shapes, and the parts of a fused weight.
        sparse, low_rank: of these shapes; what is floating, in one dtype.
        bias: (out_features,), in the same dtype, or None.
        dtype: of the layer, where none of this is floating.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        spec: LayerSpec,
        sparse: PackedSparse | QuantisedSparse,
        low_rank: LowRank | QuantisedLowRank,
        bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.spec = spec
        self._dtype = dtype
        self.sparse = sparse
        self.low_rank = low_rank
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._forget()

    @property
    def in_features(self) -> int:
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        return self.spec.out_features

    @property
    def packed(self) -> PackedWeight:
        """The weight and bias as the kernels take them: these very tensors, no copies.

        Values of few bits are spread out to the dtype of the layer.
        """
        if self.spec.grid:
            return self._spread_out()
        # nn.Module looks up each attribute in several places, which for one token takes as long as the product
        modules: dict[str, Any] = self._modules
        sparse, low_rank = modules["sparse"], modules["low_rank"]
        own, factors = sparse._parameters, low_rank._parameters
        if own:
            values, bitmask = own["values"], sparse._buffers["bitmask"]
            U, V, bias = factors["U"], factors["V"], self._parameters["bias"]
        else:  # a replica of nn.DataParallel: plain tensors in place of parameters
            values, bitmask, U, V, bias = sparse.values, sparse.bitmask, low_rank.U, low_rank.V, self.bias
        return PackedWeight(values, bitmask, U, V, bias, self.spec.parts, self._cache)

    @property
    def dtype(self) -> torch.dtype:
        """Of U, V and the bias; where none of these is floating, what they would have."""
        U, bias = self.low_rank.U, self.bias
        return U.dtype if U.is_floating_point() else self._dtype if bias is None else bias.dtype

    def _spread_out(self) -> PackedWeight:
        mask = self.sparse.mask()
        weight = self._besides_S()
        values = self.sparse.dense()[mask].to(self.dtype)
        return weight._replace(values=values, bitmask=pack_mask(mask), U=weight.U.to(values), V=weight.V.to(values))

    def _besides_S(self) -> PackedWeight:
        """U, V and the bias, for what is given S."""
        U, V = self.low_rank.floating()
        nothing = U.new_empty(0)
        return PackedWeight(nothing, nothing, U, V, self.bias, self.spec.parts)

    @classmethod
    def from_factors(
        cls, parts: Sequence[tuple[str, Factors]], bias: Tensor | None, dtype: torch.dtype
    ) -> "SparseLowRankLinear":
        """Build from the decompositions of a weight's parts, which have the same in_features.

        Args:
            parts: names and factors, from top to bottom: S (rows, in_features), U (rows, rank), V (rank, in_features).
            bias: (out_features,) or None.
            dtype: what all of it is rounded to.
        """
        # what rounds to zero is no non-zero: the count must be that of the stored values
        S = [factors.S.to(dtype) for _, factors in parts]
        rounded = [factors.quantised for _, factors in parts if factors.quantised]
        int8 = [factors.low_rank for _, factors in parts if factors.low_rank]
        kept = [
            factors.quantised.count if factors.quantised else int(torch.count_nonzero(s))
            for (_, factors), s in zip(parts, S, strict=True)
        ]
        spec = LayerSpec(
            in_features=S[0].shape[1],
            out_features=sum(map(len, S)),
            bias=bias is not None,
            parts=tuple(
                PartSpec(name, factors.U.shape[0], factors.U.shape[1], count)
                for (name, factors), count in zip(parts, kept, strict=True)
            ),
            grid=rounded[0].scales.grid if rounded else None,
            int8_factors=bool(int8),
        )
        bias = None if bias is None else bias.detach().to(dtype).clone()
        sparse = QuantisedSparse.pack(rounded) if rounded else PackedSparse.pack(torch.cat(S), dtype)
        floating = [(factors.U, factors.V) for _, factors in parts]
        low_rank = QuantisedLowRank.pack(int8) if int8 else LowRank.pack(floating, dtype)
        return cls(spec, sparse, low_rank, bias, dtype)

    @classmethod
    def empty(cls, spec: LayerSpec, dtype: torch.dtype, device: torch.device | str = "meta") -> "SparseLowRankLinear":
        """A layer of the right shapes with no data yet, to load a state dict into."""
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        bitmask = torch.empty(spec.out_features, spec.row_bytes, dtype=torch.uint8, device=device)
        sparse: PackedSparse | QuantisedSparse
        if spec.grid:
            groups = spec.out_features, spec.grid.groups(spec.in_features)
            sparse = QuantisedSparse(
                spec.grid,
                torch.empty(packed_bytes(spec.nonzeros, spec.grid.bits), dtype=torch.uint8, device=device),
                torch.empty(groups, dtype=torch.int16, device=device),
                None if spec.grid.symmetric else torch.empty(groups, dtype=torch.uint8, device=device),
                bitmask if spec.has_bitmask else None,
                spec.nonzeros,
                spec.in_features,
            )
        else:
            sparse = PackedSparse(torch.empty(spec.nonzeros, **options), bitmask, spec.in_features)
        U_shape, V_shape = (spec.out_features, max(spec.ranks)), (sum(spec.ranks), spec.in_features)
        low_rank: LowRank | QuantisedLowRank
        if spec.int8_factors:
            codes = [torch.empty(shape, dtype=torch.int8, device=device) for shape in (U_shape, V_shape)]
            scales = [torch.empty(len(X), dtype=torch.int16, device=device) for X in codes]
            low_rank = QuantisedLowRank(*codes, *scales)
        else:
            low_rank = LowRank(torch.empty(U_shape, **options), torch.empty(V_shape, **options))
        bias = torch.empty(spec.out_features, **options) if spec.bias else None
        return cls(spec, sparse, low_rank, bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of x or of autocast.

        Raises:
            ValueError: x has another width, or the bitmask does not fit the values any more.
        """
        kind = "cpu" if x.is_cpu else x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if self.spec.grid is None:
            return sparse_low_rank_linear(x, self.packed)
        return self._of_few_bits(x)

    def _of_few_bits(self, x: Tensor) -> Tensor:
        # nn.Module looks up each attribute in several places, which for one token takes as long as the product
        modules: dict[str, Any] = self._modules
        sparse, low_rank = modules["sparse"], modules["low_rank"]
        bias = self._parameters["bias"] if self._parameters else self.bias  # else a replica, as in `packed`
        factors: dict[str, Any] = low_rank._parameters or low_rank._buffers or vars(low_rank)
        U, V, scales = factors["U"], factors["V"], (factors.get("U_scale"), factors.get("V_scale"))
        matrix = self._few_bits.known((*sparse.tensors(), U, V, *scales, bias), x)
        if matrix is not None:
            return matrix.few_tokens(x)
        weight = sparse.with_factors(U, V, bias, self.spec.parts, scales)
        if kernels_take(weight, x):
            return self._few_bits.get(weight).few_tokens(x)
        if kernels_take(weight):
            S = self._few_bits.get(weight).dequantise()
        else:
            S = sparse.dense(x.dtype if x.dtype.itemsize >= 4 else torch.float32)
        return by_dense(x, S.to(x.dtype), self._besides_S())

    def _forget(self) -> None:
        self._cache, self._few_bits = MatrixCache(), FewBitsCache()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        self._forget()  # what would keep the memory of tensors that move to another device
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device="cpu")).dtype
        return super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]  # of PyTorch

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """S + U V in float32 or better, rounded once to `dtype` (or the layer's): (out_features, in_features)."""
        stored = self.dtype
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            S = self.sparse.dense().to(torch.promote_types(stored, torch.float32))
            return dense_weight(S, self._besides_S()).to(dtype or stored)

    def merge(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary nn.Linear with the weight S + U V in `dtype` (or the layer's): full size, for any backend."""
        linear = nn.Linear(1, 1, bias=False)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        weight = self.dense_weight(dtype).detach()
        linear.weight = nn.Parameter(weight, requires_grad=False)
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().to(weight.dtype), requires_grad=False)
        linear.register_parameter("bias", bias)
        return linear

    def extra_repr(self) -> str:
        ranks = "+".join(str(part.rank) for part in self.spec.parts)
        values = f", values={self.spec.grid}" * bool(self.spec.grid) + ", int8 U and V" * self.spec.int8_factors
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"nonzeros={self.spec.nonzeros}, rank={ranks}, bias={self.bias is not None}{values}"
        )


def compressed_layers(model: nn.Module) -> dict[str, SparseLowRankLinear]:
    """The compressed layers of a model, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseLowRankLinear)}


def layer_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's compressed layers, by name."""
    return {
        f"{name}.{key}": tensor
        for name, layer in compressed_layers(model).items()
        for key, tensor in layer.state_dict().items()
    }


def other_parameter(model: nn.Module) -> nn.Parameter | None:
    """A floating parameter outside of the compressed layers, which has the dtype that the model computes in."""
    compressed = tuple(f"{name}." for name in compressed_layers(model))
    others = (p for name, p in model.named_parameters() if p.is_floating_point() and not name.startswith(compressed))
    return next(others, None)


def merge(model: nn.Module) -> nn.Module:
    """Replace every `SparseLowRankLinear` of `model`, in place, by the dense nn.Linear it stands for; return the model.

    The dense weights get the dtype of the model's other parameters, that of the compressed layers if there are none.
    All other modules stay: blocks that SliceGPT sliced hold dense linears already, of a smaller width, and layers of
    `to_semi_structured` can only run.
    """
    other = other_parameter(model)
    for name, layer in compressed_layers(model).items():
        model.set_submodule(name, layer.merge(None if other is None else other.dtype))
    return model
