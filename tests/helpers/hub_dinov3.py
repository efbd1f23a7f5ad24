"""A small stand-in for the code of facebookresearch/dinov3, which no package carries: what of it matters to us."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearKMaskedBias(nn.Linear):
    """The bias of q, k and v, times a mask that is zero for k; unknown until weights are loaded."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: object = None) -> None:
        super().__init__(in_features, out_features, bias, device)
        self.register_buffer("bias_mask", torch.full_like(self.bias, math.nan))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = LinearKMaskedBias(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        sine, cosine = rope
        patches = sine.shape[0]  # the tokens before them are not turned
        q, k = (torch.cat([t[:, :, :-patches], self._turned(t[:, :, -patches:], sine, cosine)], 2) for t in (q, k))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    @staticmethod
    def _turned(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cosine + torch.cat([-b, a], -1) * sine


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttentionBlock(nn.Module):
    """Takes and gives either a tensor or a list of them, one for each resolution."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), SelfAttention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor | list[Tensor], rope: object = None) -> Tensor | list[Tensor]:
        if isinstance(x, Tensor):
            return self([x], [rope])[0]
        y = [t + self.attn(self.norm1(t), r) for t, r in zip(x, rope, strict=True)]
        return [t + self.mlp(self.norm2(t)) for t in y]


class DinoVisionTransformer(nn.Module):
    def __init__(self, width: int = 48, depth: int = 2, heads: int = 3, n_storage_tokens: int = 4) -> None:
        super().__init__()
        self.n_storage_tokens, self.heads = n_storage_tokens, heads
        self.patch_embed = nn.Conv2d(3, width, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.storage_tokens = nn.Parameter(torch.randn(1, n_storage_tokens, width))
        self.blocks = nn.ModuleList(SelfAttentionBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Identity()
        for block in self.blocks:
            mask = block.attn.qkv.bias_mask.fill_(1)
            mask[width : 2 * width] = 0

    def _rope(self, patches: int) -> tuple[Tensor, Tensor]:
        size = self.cls_token.shape[-1] // self.heads
        angles = torch.linspace(0, 1, patches)[:, None] * torch.linspace(1, 9, size // 2).repeat(2)
        return angles.sin(), angles.cos()

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        patches = self.patch_embed(x).flatten(2).mT
        before = torch.cat([self.cls_token, self.storage_tokens], 1).expand(len(x), -1, -1)
        states = [torch.cat([before, patches], 1)]
        for block in self.blocks:
            states = block(states, [self._rope(patches.shape[1])])  # a new table for each block
        y = self.norm(states[0])
        return {"x_norm_clstoken": y[:, 0], "x_norm_patchtokens": y[:, 1 + self.n_storage_tokens :]}

    def forward(self, *args: Tensor, is_training: bool = False, **kwargs: Tensor) -> Tensor | dict[str, Tensor]:
        features = self.forward_features(*args, **kwargs)
        return features if is_training else self.head(features["x_norm_clstoken"])


for _class in (DinoVisionTransformer, LinearKMaskedBias):
    _class.__module__ = "dinov3.models.vision_transformer"  # by which the family is known
