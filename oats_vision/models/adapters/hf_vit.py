"""Hugging Face vision towers: ViT, DeiT, DINOv2 with and without registers, DINOv3, CLIP and SigLIP."""

from typing import Any

from torch import nn

from oats_vision.models.adapters.base import Adapter, Residual, blocks_of_class
from oats_vision.models.aliases import SERVES

# class of a block in transformers -> adapter
FAMILIES = {
    "ViTLayer": "hf_vit",
    "DeiTLayer": "hf_deit",
    "Dinov2Layer": "hf_dinov2",
    "Dinov2WithRegistersLayer": "hf_dinov2_with_registers",
    "DINOv3ViTLayer": "hf_dinov3",
    "CLIPEncoderLayer": "hf_clip",
    "SiglipEncoderLayer": "hf_siglip",
}
MLP_OUT = ("mlp.fc2", "mlp.down_proj")
DINO = Residual("norm1", "attention", ("attention.o_proj",), "norm2", "mlp", MLP_OUT, "layer_scale1", "layer_scale2")
CLIP = Residual("layer_norm1", "self_attn", ("self_attn.out_proj",), "layer_norm2", "mlp", MLP_OUT)
VIT = Residual("layernorm_before", "attention", ("attention.o_proj",), "layernorm_after", "mlp", MLP_OUT)
RESIDUAL = {
    "ViTLayer": VIT,
    "DeiTLayer": VIT,
    "Dinov2Layer": DINO,
    "Dinov2WithRegistersLayer": DINO,
    "DINOv3ViTLayer": DINO,
    "CLIPEncoderLayer": CLIP,
    "SiglipEncoderLayer": CLIP,
}


def _config(model: nn.Module, path: str) -> Any:
    """Of the innermost module that has one and holds `path`."""
    while path and not hasattr(model.get_submodule(path), "config"):
        path = path.rpartition(".")[0]
    return getattr(model.get_submodule(path), "config", None)


def _vision_blocks(model: nn.Module, block_class: str) -> str | None:
    # text towers have blocks of the same class, but no patches
    return blocks_of_class(model, block_class, lambda path: hasattr(_config(model, path), "patch_size"))


def _final_norm(model: nn.Module, blocks: str) -> str:
    """The norm beside the encoder: `vit.layernorm` for blocks at `vit.layers`."""
    modules = dict(model.named_modules())
    for parent in (blocks.rpartition(".")[0], blocks.rpartition(".")[0].rpartition(".")[0]):
        for name in ("layernorm", "post_layernorm", "norm"):
            path = f"{parent}.{name}" if parent else name
            if path in modules:
                return path
    return ""


def _prefix_tokens(model: nn.Module, block_class: str) -> int:
    if block_class == "SiglipEncoderLayer":
        return 0
    if block_class == "DeiTLayer":
        return 2  # the class token and the distillation token
    config = _config(model, _vision_blocks(model, block_class) or "")
    return 1 + int(getattr(config, "num_register_tokens", 0))


def _adapter(block_class: str, name: str) -> Adapter:
    return Adapter(
        name=name,
        serves=SERVES[name],
        # not a module of the user's own that holds one of transformers: that is for `wrappers`
        matches=lambda model: hasattr(model, "config") and _vision_blocks(model, block_class) is not None,
        blocks=lambda model: _vision_blocks(model, block_class) or "",
        residual=RESIDUAL[block_class],
        final_norm=lambda model: _final_norm(model, _vision_blocks(model, block_class) or ""),
        prefix_tokens=lambda model: _prefix_tokens(model, block_class),
    )


ADAPTERS = [_adapter(block_class, name) for block_class, name in FAMILIES.items()]
