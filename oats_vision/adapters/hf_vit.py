"""Hugging Face vision towers: ViT, DINOv2 with and without registers, DINOv3, CLIP and SigLIP."""

from torch import nn

from oats_vision.adapters.base import Adapter

# class of a block in transformers -> adapter; the text tower of CLIP and SigLIP has the same class of block
FAMILIES = {
    "ViTLayer": ("hf_vit", "Hugging Face ViT and DeiT checkpoints of class ViT*"),
    "Dinov2Layer": ("hf_dinov2", "Hugging Face Dinov2*"),
    "Dinov2WithRegistersLayer": ("hf_dinov2_with_registers", "Hugging Face Dinov2WithRegisters*"),
    "DINOv3ViTLayer": ("hf_dinov3", "Hugging Face DINOv3ViT*"),
    "CLIPEncoderLayer": ("hf_clip", "Hugging Face CLIP vision towers"),
    "SiglipEncoderLayer": ("hf_siglip", "Hugging Face SigLIP vision towers"),
}


def _vision_blocks(model: nn.Module, block_class: str) -> str | None:
    """Path of the ModuleList whose members are of the class, outside text towers."""
    for path, module in model.named_modules():
        if "text_model" in path.split("."):
            continue
        if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__ == block_class:
            return path if type(module[0]).__module__.startswith("transformers.") else None
    return None


def _adapter(block_class: str, name: str, serves: str) -> Adapter:
    return Adapter(
        name=name,
        serves=serves,
        matches=lambda model: _vision_blocks(model, block_class) is not None,
        blocks=lambda model: _vision_blocks(model, block_class) or "",
    )


ADAPTERS = [_adapter(block_class, name, serves) for block_class, (name, serves) in FAMILIES.items()]
