"""2:4 sparse terms on NVIDIA GPUs: PyTorch's semi-structured tensors (cuSPARSELt or CUTLASS) plus the low-rank term."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oats_vision.errors import ModelError
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear, compressed_layers, other_parameter


class SemiStructuredLinear(nn.Module):
    """y = S x + U (V x) + b with S in the GPU's own 2:4 format: for running, not for saving.

    All of it is ordinary PyTorch, so that torch.compile fuses the low-rank term's sum and the bias.

    Args:
        layer: on a GPU of compute capability 8.0 or later.
        dtype: float16 or bfloat16, of the weights here and of the inputs.

    Raises:
        ValueError: S is not 2:4, or PyTorch's format takes no matrix of its shape.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: SparseLowRankLinear, dtype: torch.dtype) -> None:
        super().__init__()
        if not has_the_form(layer):
            raise ValueError(
                "the sparse term keeps more than 2 of 4 neighbours, none at all, or its shape does not fit"
            )
        self.in_features, self.out_features = layer.in_features, layer.out_features
        S = torch.sparse.to_sparse_semi_structured(layer.sparse.dense().to(dtype))
        self.weight = nn.Parameter(S, requires_grad=False)
        # one U for all parts, so that two products serve a fused layer
        packed = layer.packed
        self.U = nn.Parameter(packed.U_blocks().to(dtype), requires_grad=False)
        self.V = nn.Parameter(packed.V.to(dtype), requires_grad=False)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.V), self.U) if len(self.V) else y


def is_two_of_four(mask: Tensor) -> bool:
    """Whether each group of 4 neighbours in a row of `mask` (out_features, in_features) has 2 ones at most."""
    if mask.shape[1] % 4:
        return False
    return bool((mask.view(len(mask), -1, 4).sum(-1) <= 2).all())


def has_the_form(layer: SparseLowRankLinear) -> bool:
    """Whether a layer's S is 2:4, is not empty, and has a shape that PyTorch takes in 16 bits."""
    # of CUTLASS, where that is forced, and of cuSPARSELt; `_DTYPE_SHAPE_CONSTRAINTS` of their tensors' classes
    rows, columns = (32, 64) if torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS else (16, 16)
    fits = layer.out_features % rows == 0 and layer.in_features % columns == 0
    return fits and layer.spec.nonzeros > 0 and is_two_of_four(layer.sparse.mask())


def to_semi_structured(model: nn.Module) -> nn.Module:
    """Let every compressed layer of `model` whose S is 2:4 run on the GPU's sparse matrix units; return the model.

    In place. Other layers stay as they are, and those of a shape that PyTorch does not take.

    Raises:
        ModelError: the model is not on a GPU that has such units (NVIDIA Ampere or later), or not in a 16-bit dtype.
    """
    other = other_parameter(model)
    first = other if other is not None else next(model.parameters())
    if first.device.type != "cuda" or torch.cuda.get_device_capability(first.device) < (8, 0):
        raise ModelError(f"2:4 products need an NVIDIA GPU of compute capability 8.0 or later, got {first.device}")
    if first.dtype not in (torch.float16, torch.bfloat16):
        raise ModelError(f"2:4 products need float16 or bfloat16, got {first.dtype}: load with dtype=torch.float16")
    for name, layer in compressed_layers(model).items():
        if has_the_form(layer):
            model.set_submodule(name, SemiStructuredLinear(layer, first.dtype))
    return model
