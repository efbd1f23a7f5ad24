"""DINOv2 and DINOv3 backbones in the authors' own code, as torch.hub brings them.

Their classes are known by name: the code is not installed but fetched by torch.hub.
"""

import sys
from typing import Any

import torch
from torch import nn

from oats_vision.models.adapters.base import Adapter, Residual
from oats_vision.models.aliases import SERVES


def _is_hub_model(model: nn.Module, package: str) -> bool:
    # a chunked list of blocks (for sharded training) is not what the published backbones use
    cls = type(model)
    blocks = getattr(model, "blocks", None)
    return (
        cls.__name__ == "DinoVisionTransformer"
        and cls.__module__.startswith(f"{package}.")
        and isinstance(blocks, nn.ModuleList)
        and all(hasattr(block, "attn") for block in blocks)
    )


@torch.no_grad()
def _plain_qkv(model: nn.Module) -> None:
    """DINOv3's qkv multiplies its bias by a mask that is 0 for the keys: the product is an ordinary bias."""
    for attention in model.modules():
        qkv: Any = getattr(attention, "qkv", None)
        if type(qkv).__name__ == "LinearKMaskedBias":
            linear = nn.Linear(1, 1, bias=False, device="meta")
            linear.in_features, linear.out_features = qkv.in_features, qkv.out_features
            linear.weight = qkv.weight
            if qkv.bias is not None:
                linear.bias = nn.Parameter(qkv.bias * qkv.bias_mask, requires_grad=qkv.bias.requires_grad)
            attention.qkv, attention.masks_k_bias = linear, True  # type: ignore[assignment]  # a plain attribute


@torch.no_grad()
def _masked_qkv(model: nn.Module) -> None:
    """The inverse of `_plain_qkv`, for a checkpoint that the authors' code reads."""
    for attention in model.modules():
        qkv: Any = getattr(attention, "qkv", None)
        if getattr(attention, "masks_k_bias", False) and isinstance(qkv, nn.Linear):
            masked_linear = sys.modules[type(attention).__module__].LinearKMaskedBias
            masked = masked_linear(qkv.in_features, qkv.out_features, bias=qkv.bias is not None, device="meta")
            masked.weight, masked.bias = qkv.weight, qkv.bias
            if qkv.bias is not None:
                masked.bias_mask = torch.ones_like(qkv.bias)
                masked.bias_mask.chunk(3)[1].zero_()
            attention.qkv, attention.masks_k_bias = masked, False  # type: ignore[assignment]  # a plain attribute


ADAPTERS = [
    Adapter(
        name="dinov2_hub",
        serves=SERVES["dinov2_hub"],
        matches=lambda model: _is_hub_model(model, "dinov2"),
        blocks=lambda model: "blocks",
        fused={"attn.qkv": ("q", "k", "v")},
        residual=Residual("norm1", "attn", ("attn.proj",), "norm2", "mlp", ("mlp.fc2", "mlp.w3"), "ls1", "ls2"),
        final_norm=lambda model: "norm",
        prefix_tokens=lambda model: 1 + int(getattr(model, "num_register_tokens", 0)),
    ),
    Adapter(  # its blocks take lists of tensors, which sliced blocks do not: no `residual`
        name="dinov3_hub",
        serves=SERVES["dinov3_hub"],
        matches=lambda model: _is_hub_model(model, "dinov3"),
        blocks=lambda model: "blocks",
        fused={"attn.qkv": ("q", "k", "v")},
        prepare=_plain_qkv,
        restore=_masked_qkv,
        final_norm=lambda model: "norm",
        prefix_tokens=lambda model: 1 + int(model.n_storage_tokens),  # type: ignore[arg-type]  # an int
    ),
]
