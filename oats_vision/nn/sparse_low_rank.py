"""The compressed layer: a packed sparse matrix plus a low-rank product in the place of nn.Linear.

W = S + U V as in OATS (Zhang and Papyan, ICLR 2025).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oats_vision.core.oats import Factors
from oats_vision.kernels.matrix import MatrixCache
from oats_vision.kernels.packed import PackedWeight, unpack
from oats_vision.kernels.product import dense_weight, expand, sparse_low_rank_linear


@dataclass(frozen=True)
class PartSpec:
    """One matrix of a layer: the whole weight, or one of q, k and v of a fused qkv."""

    name: str
    out_features: int
    rank: int
    nonzeros: int


@dataclass(frozen=True)
class LayerSpec:
    """All that fixes the shapes of a `SparseLowRankLinear`, as stored in a checkpoint's config."""

    in_features: int
    out_features: int
    bias: bool
    parts: tuple[PartSpec, ...]

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "LayerSpec":
        """Raises KeyError, TypeError or ValueError if a field is missing, unknown or impossible."""
        spec = cls(**{**fields, "parts": tuple(PartSpec(**part) for part in fields["parts"])})
        counts = [spec.in_features, spec.out_features, *(x for p in spec.parts for x in (p.rank, p.nonzeros))]
        if any(not isinstance(count, int) or count < 0 for count in counts):
            raise ValueError(f"counts must be whole numbers, got {counts}")
        if sum(part.out_features for part in spec.parts) != spec.out_features:
            raise ValueError(f"the parts do not make up {spec.out_features} rows")
        return spec


class PackedSparse(nn.Module):
    """A sparse matrix S (out_features, in_features).

    Args:
        values: (nonzeros,), any floating dtype: its non-zeros in row order.
        bitmask: (out_features, ceil(in_features / 8)), uint8: where they are, as in `PackedWeight`.
        in_features: the columns of S.
    """

    bitmask: Tensor

    def __init__(self, values: Tensor, bitmask: Tensor, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.values = nn.Parameter(values, requires_grad=False)
        self.register_buffer("bitmask", bitmask)

    @classmethod
    def pack(cls, S: Tensor, dtype: torch.dtype) -> "PackedSparse":
        """Pack a dense S (out_features, in_features); values are rounded to `dtype`."""
        mask = S != 0
        bits = F.pad(mask, (0, -S.shape[1] % 8)).view(len(S), -1, 8).to(torch.uint8)
        weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=S.device)
        return cls(S[mask].to(dtype), (bits * weights).sum(-1, dtype=torch.uint8), S.shape[1])

    def mask(self) -> Tensor:
        """Where the non-zeros are: bool (out_features, in_features)."""
        return unpack(self.bitmask, self.in_features)

    def dense(self) -> Tensor:
        """S with its zeros, (out_features, in_features), dtype of the values.

        Raises:
            ValueError: the bitmask does not fit the values.
        """
        return expand(self.values, self.bitmask, self.in_features)


class LowRank(nn.Module):
    """U (out_features, largest rank of a part) and V (sum of the parts' ranks, in_features), in one floating dtype.

    The rows of U that belong to a part multiply that part's rows of V.
    """

    def __init__(self, U: Tensor, V: Tensor) -> None:
        super().__init__()
        self.U = nn.Parameter(U, requires_grad=False)
        self.V = nn.Parameter(V, requires_grad=False)


class SparseLowRankLinear(nn.Module):
    """y = S x + U (V x) + b: replaces an nn.Linear and takes the same inputs (..., in_features).

    It holds no dense copy. The weights stay in their own dtype and the product has that of the input (or of autocast).
    None of its parameters asks for gradients; those that are made to get them, with `low_rank.requires_grad_()`, say.

    Args:
        spec: shapes, and the parts of a fused weight.
        sparse, low_rank: of these shapes, in one dtype.
        bias: (out_features,), in the same dtype, or None.
    """

    bias: nn.Parameter | None

    def __init__(self, spec: LayerSpec, sparse: PackedSparse, low_rank: LowRank, bias: Tensor | None) -> None:
        super().__init__()
        self.spec = spec
        self.sparse = sparse
        self.low_rank = low_rank
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._cache = MatrixCache()

    @property
    def in_features(self) -> int:
        return self.spec.in_features

    @property
    def out_features(self) -> int:
        return self.spec.out_features

    @property
    def packed(self) -> PackedWeight:
        """The weight and bias as the kernels take them: these very tensors, no copies."""
        # nn.Module looks up each attribute in several places, which for one token takes as long as the product
        modules: dict[str, Any] = self._modules
        sparse, low_rank = modules["sparse"], modules["low_rank"]._parameters
        values, bitmask = sparse._parameters["values"], sparse._buffers["bitmask"]
        U, V, bias = low_rank["U"], low_rank["V"], self._parameters["bias"]
        return PackedWeight(values, bitmask, U, V, bias, self.spec.parts, self._cache)

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
        rank = max(factors.U.shape[1] for _, factors in parts)
        U = torch.cat([F.pad(factors.U, (0, rank - factors.U.shape[1])) for _, factors in parts])
        V = torch.cat([factors.V for _, factors in parts])
        # what rounds to zero is no non-zero: the count must be that of the stored values
        S = [factors.S.to(dtype) for _, factors in parts]
        spec = LayerSpec(
            in_features=V.shape[1],
            out_features=U.shape[0],
            bias=bias is not None,
            parts=tuple(
                PartSpec(name, factors.U.shape[0], factors.U.shape[1], int(torch.count_nonzero(s)))
                for (name, factors), s in zip(parts, S, strict=True)
            ),
        )
        bias = None if bias is None else bias.detach().to(dtype).clone()
        return cls(spec, PackedSparse.pack(torch.cat(S), dtype), LowRank(U.to(dtype), V.to(dtype)), bias)

    @classmethod
    def empty(cls, spec: LayerSpec, dtype: torch.dtype, device: torch.device | str = "meta") -> "SparseLowRankLinear":
        """A layer of the right shapes with no data yet, to load a state dict into."""
        rank = max(part.rank for part in spec.parts)
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        bitmask = torch.empty(spec.out_features, spec.row_bytes, dtype=torch.uint8, device=device)
        sparse = PackedSparse(torch.empty(spec.nonzeros, **options), bitmask, spec.in_features)
        U = torch.empty(spec.out_features, rank, **options)
        V = torch.empty(sum(part.rank for part in spec.parts), spec.in_features, **options)
        return cls(spec, sparse, LowRank(U, V), torch.empty(spec.out_features, **options) if spec.bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of x or of autocast.

        Raises:
            ValueError: x has another width, or the bitmask does not fit the values any more.
        """
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return sparse_low_rank_linear(x, self.packed)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._cache = MatrixCache()  # which would keep the memory of tensors that move to another device
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # of PyTorch

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """S + U V in float32 or better, rounded once to `dtype` (or the layer's): (out_features, in_features)."""
        stored = self.sparse.values.dtype
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            S = self.sparse.dense().to(torch.promote_types(stored, torch.float32))
            return dense_weight(S, self.packed).to(dtype or stored)

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
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"nonzeros={self.spec.nonzeros}, rank={ranks}, bias={self.bias is not None}"
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
