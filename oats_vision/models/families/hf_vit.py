"""Hugging Face vision towers: ViT, DeiT, DINOv2 with and without registers, DINOv3, CLIP and SigLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from oats_vision.models.families.base import Residual
from oats_vision.models.families.hf_family import HuggingFaceFamily
from oats_vision.models.families.registry import shipped

if TYPE_CHECKING:
    from torch import nn

MLP_OUT = ("mlp.fc2", "mlp.down_proj")
DINO = Residual("norm1", "attention", ("attention.o_proj",), "norm2", "mlp", MLP_OUT, "layer_scale1", "layer_scale2")
CLIP = Residual("layer_norm1", "self_attn", ("self_attn.out_proj",), "layer_norm2", "mlp", MLP_OUT)
VIT = Residual("layernorm_before", "attention", ("attention.o_proj",), "layernorm_after", "mlp", MLP_OUT)


class Tower(HuggingFaceFamily):
    """What all have in common."""

    def matches(self, model: nn.Module) -> bool:
        # not a module of the user's own that holds one of transformers, which is found inside it
        return hasattr(model, "config") and super().matches(model)

    def wanted(self, model: nn.Module, path: str) -> bool:
        # text towers have blocks of the same class, but no patches
        return hasattr(_config(model, path), "patch_size")

    def final_norm(self, model: nn.Module) -> str:
        """The norm beside the encoder: `vit.layernorm` for blocks at `vit.layers`."""
        modules = dict(model.named_modules())
        encoder = self.blocks(model).rpartition(".")[0]
        for parent in (encoder, encoder.rpartition(".")[0]):
            for name in ("layernorm", "post_layernorm", "norm"):
                path = f"{parent}.{name}" if parent else name
                if path in modules:
                    return path
        return ""

    def prefix_tokens(self, model: nn.Module) -> int:
        return 1 + int(getattr(_config(model, self.blocks(model)), "num_register_tokens", 0))


def _config(model: nn.Module, path: str) -> Any:
    """Of the innermost module that has one and holds `path`."""
    while path and not hasattr(model.get_submodule(path), "config"):
        path = path.rpartition(".")[0]
    return getattr(model.get_submodule(path), "config", None)


@shipped
class Vit(Tower):
    name = "hf_vit"
    serves = "Hugging Face ViT and DeiT checkpoints of class ViT*"
    block_class = "ViTLayer"
    residual = VIT


@shipped
class Deit(Tower):
    name = "hf_deit"
    serves = "Hugging Face DeiT"
    block_class = "DeiTLayer"
    residual = VIT

    def prefix_tokens(self, model: nn.Module) -> int:
        return 2  # the class token and the distillation token


@shipped
class Dinov2(Tower):
    name = "hf_dinov2"
    serves = "Hugging Face Dinov2*"
    block_class = "Dinov2Layer"
    residual = DINO


@shipped
class Dinov2WithRegisters(Tower):
    name = "hf_dinov2_with_registers"
    serves = "Hugging Face Dinov2WithRegisters*"
    block_class = "Dinov2WithRegistersLayer"
    residual = DINO


@shipped
class Dinov3(Tower):
    name = "hf_dinov3"
    serves = "Hugging Face DINOv3ViT*"
    block_class = "DINOv3ViTLayer"
    residual = DINO


@shipped
class Clip(Tower):
    name = "hf_clip"
    serves = "Hugging Face CLIP vision towers"
    block_class = "CLIPEncoderLayer"
    residual = CLIP


@shipped
class Siglip(Tower):
    name = "hf_siglip"
    serves = "Hugging Face SigLIP vision towers"
    block_class = "SiglipEncoderLayer"
    residual = CLIP

    def prefix_tokens(self, model: nn.Module) -> int:
        return 0
