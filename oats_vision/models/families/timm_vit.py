"""timm's VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP, AugReg) and Eva (DINOv3, EVA-02)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from oats_vision.models.families.base import Family, Fused, Residual
from oats_vision.models.families.registry import shipped

if TYPE_CHECKING:
    from torch import nn

STREAM = ("norm1", "attn", ("attn.proj",), "norm2", "mlp", ("mlp.fc2",))


class Timm(Family):
    """What both have in common."""

    fused: ClassVar[Fused] = {"attn.qkv": ("q", "k", "v")}

    def blocks(self, model: nn.Module) -> str:
        return "blocks"

    def final_norm(self, model: nn.Module) -> str:
        return "fc_norm" if _no_norm(model) else "norm"

    def prefix_tokens(self, model: nn.Module) -> int:
        return int(model.num_prefix_tokens)  # type: ignore[arg-type]  # an int of every timm ViT

    def class_token(self, model: nn.Module) -> bool:
        return model.cls_token is not None

    def pooled_before_norm(self, model: nn.Module) -> bool:
        from torch import nn

        return _no_norm(model) and not isinstance(model.fc_norm, nn.Identity)


def _no_norm(model: nn.Module) -> bool:
    """With average pooling the norm comes after the pooling, and `norm` is an identity."""
    from torch import nn

    return isinstance(model.norm, nn.Identity)


@shipped
class TimmVit(Timm):
    name = "timm_vit"
    serves = "timm VisionTransformer: ViT, DeiT, DINOv2 with and without registers, SigLIP, CLIP, AugReg"
    residual = Residual(*STREAM, "ls1", "ls2")

    def matches(self, model: nn.Module) -> bool:
        from timm.models.vision_transformer import VisionTransformer

        return isinstance(model, VisionTransformer)


@shipped
class TimmEva(Timm):
    """Its attention reads `qkv.weight` past the module unless its bias is added separately."""

    name = "timm_eva"
    serves = "timm Eva: DINOv3, EVA-02, Perception Encoder"
    residual = Residual(*STREAM, "gamma_1", "gamma_2")

    def matches(self, model: nn.Module) -> bool:
        from timm.models.eva import Eva

        return isinstance(model, Eva)

    def to_replace(self, model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if getattr(module, "qkv_bias_separate", None) is False]

    def replacement(self, module: nn.Module) -> nn.Module:
        attention: Any = module
        attention.qkv_bias_separate = True
        return module

    def original(self, replacement: nn.Module, model: nn.Module) -> nn.Module:
        attention: Any = replacement
        attention.qkv_bias_separate = False
        return replacement
