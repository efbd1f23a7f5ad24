"""timm's VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP, AugReg) and Eva (DINOv3, EVA-02)."""

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from oats_vision.models.adapters.base import Adapter, Residual
from oats_vision.models.aliases import SERVES

QKV = {"attn.qkv": ("q", "k", "v")}

STREAM = ("norm1", "attn", ("attn.proj",), "norm2", "mlp", ("mlp.fc2",))


def _norm(model: nn.Module) -> str:
    # with average pooling the norm comes after the pooling, and `norm` is an identity
    return "fc_norm" if isinstance(model.norm, nn.Identity) else "norm"


def _prefix(model: nn.Module) -> int:
    return int(model.num_prefix_tokens)  # type: ignore[arg-type]  # an int of every timm ViT


def _class_token(model: nn.Module) -> bool:
    return model.cls_token is not None


def _pooled_before_norm(model: nn.Module) -> bool:
    return isinstance(model.norm, nn.Identity) and not isinstance(model.fc_norm, nn.Identity)


def _call_qkv_as_module(model: nn.Module) -> None:
    """Eva's attention reads `qkv.weight` past the module unless its bias is added separately."""
    for module in model.modules():
        if getattr(module, "qkv_bias_separate", None) is False:
            module.qkv_bias_separate = True  # type: ignore[assignment]  # a plain attribute of EvaAttention


ADAPTERS = [
    Adapter(
        name="timm_vit",
        serves=SERVES["timm_vit"],
        matches=lambda model: isinstance(model, VisionTransformer),
        blocks=lambda model: "blocks",
        fused=QKV,
        residual=Residual(*STREAM, "ls1", "ls2"),
        final_norm=_norm,
        prefix_tokens=_prefix,
        class_token=_class_token,
        pooled_before_norm=_pooled_before_norm,
    ),
    Adapter(
        name="timm_eva",
        serves=SERVES["timm_eva"],
        matches=lambda model: isinstance(model, Eva),
        blocks=lambda model: "blocks",
        fused=QKV,
        prepare=_call_qkv_as_module,
        residual=Residual(*STREAM, "gamma_1", "gamma_2"),
        final_norm=_norm,
        prefix_tokens=_prefix,
        class_token=_class_token,
        pooled_before_norm=_pooled_before_norm,
    ),
]
