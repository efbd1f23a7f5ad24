import pytest
import timm
import torch
from torch import nn

torch.set_num_threads(2)


@pytest.fixture
def tiny_vit() -> nn.Module:
    """A timm ViT with random weights, small enough for any test."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10
    ).eval()


@pytest.fixture
def pictures() -> list[torch.Tensor]:
    """Two batches of random pictures."""
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(8, 3, 32, 32, generator=generator).split(4))
