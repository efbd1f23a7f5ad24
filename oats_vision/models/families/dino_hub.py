"""DINOv2 and DINOv3 backbones in the authors' own code, as torch.hub brings them.

Their classes are known by name: the code is not installed but fetched by torch.hub.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

from oats_vision.models.families.base import Family, Fused, Residual
from oats_vision.models.families.registry import shipped

if TYPE_CHECKING:
    from torch import nn


class DinoHub(Family):
    """What both have in common.

    package: the Python package of the authors' code.
    """

    package: ClassVar[str]
    fused: ClassVar[Fused] = {"attn.qkv": ("q", "k", "v")}

    def matches(self, model: nn.Module) -> bool:
        from torch import nn

        # a chunked list of blocks (for sharded training) is not what the published backbones use
        kind = type(model)
        blocks = getattr(model, "blocks", None)
        return (
            kind.__name__ == "DinoVisionTransformer"
            and kind.__module__.startswith(f"{self.package}.")
            and isinstance(blocks, nn.ModuleList)
            and all(hasattr(block, "attn") for block in blocks)
        )

    def blocks(self, model: nn.Module) -> str:
        return "blocks"

    def final_norm(self, model: nn.Module) -> str:
        return "norm"


@shipped
class Dinov2Hub(DinoHub):
    name = "dinov2_hub"
    serves = "facebookresearch/dinov2 from torch.hub"
    package = "dinov2"
    residual = Residual("norm1", "attn", ("attn.proj",), "norm2", "mlp", ("mlp.fc2", "mlp.w3"), "ls1", "ls2")

    def prefix_tokens(self, model: nn.Module) -> int:
        return 1 + int(getattr(model, "num_register_tokens", 0))


@shipped
class Dinov3Hub(DinoHub):
    """Its blocks take lists of tensors, which sliced blocks do not: no `residual`.

    Its qkv multiplies its bias by a mask that is 0 for the keys: the product is an ordinary bias.
    """

    name = "dinov3_hub"
    serves = "facebookresearch/dinov3 from torch.hub"
    package = "dinov3"

    def prefix_tokens(self, model: nn.Module) -> int:
        return 1 + int(model.n_storage_tokens)  # type: ignore[arg-type]  # an int

    def to_replace(self, model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if type(module).__name__ == "LinearKMaskedBias"]

    def replacement(self, module: nn.Module) -> nn.Module:
        import torch
        from torch import nn

        masked: Any = module
        if type(masked).__name__ != "LinearKMaskedBias":
            return module
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = masked.in_features, masked.out_features
        linear.weight = masked.weight
        if masked.bias is not None:
            with torch.no_grad():
                bias = masked.bias * masked.bias_mask
            linear.bias = nn.Parameter(bias, requires_grad=masked.bias.requires_grad)
        return linear

    def original(self, replacement: nn.Module, model: nn.Module) -> nn.Module:
        import torch
        from torch import nn

        if type(replacement) is not nn.Linear:
            return replacement
        kind = _class_named("LinearKMaskedBias", model)
        linear = replacement
        masked: Any = kind(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        masked.weight, masked.bias = linear.weight, linear.bias
        if linear.bias is not None:
            masked.bias_mask = torch.ones_like(linear.bias)
            masked.bias_mask.chunk(3)[1].zero_()
        built: nn.Module = masked
        return built


def _class_named(name: str, model: nn.Module) -> Any:
    """A class of the code that a model is made of."""
    modules = (sys.modules.get(type(module).__module__) for module in model.modules())
    return next(found for module in modules if (found := getattr(module, name, None)) is not None)
