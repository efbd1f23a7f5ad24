"""DINOv2 backbones in the authors' own code, as torch.hub brings them."""

from torch import nn

from oats_vision.adapters.base import Adapter, Residual


def _is_hub_dinov2(model: nn.Module) -> bool:
    # the class is known by name: its code is not installed but fetched by torch.hub; a chunked list of
    # blocks (for sharded training) is not what the published backbones use
    cls = type(model)
    blocks = getattr(model, "blocks", None)
    return (
        cls.__name__ == "DinoVisionTransformer"
        and cls.__module__.startswith("dinov2.")
        and isinstance(blocks, nn.ModuleList)
        and all(hasattr(block, "attn") for block in blocks)
    )


ADAPTERS = [
    Adapter(
        name="dinov2_hub",
        serves="facebookresearch/dinov2 from torch.hub",
        matches=_is_hub_dinov2,
        blocks=lambda model: "blocks",
        fused={"attn.qkv": ("q", "k", "v")},
        residual=Residual("norm1", "attn", ("attn.proj",), "norm2", "mlp", ("mlp.fc2", "mlp.w3"), "ls1", "ls2"),
        final_norm=lambda model: "norm",
        prefix_tokens=lambda model: 1 + int(getattr(model, "num_register_tokens", 0)),
    ),
]
