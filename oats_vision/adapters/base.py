"""What a model family must say to be compressed: where its blocks are, and which linears are fused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn


def _nothing(model: nn.Module) -> None:
    pass


@dataclass(frozen=True)
class Residual:
    """Where a block reads and writes its residual stream x, by names of modules in the block.

        y = x + scale1 * attention(norm1(x)),   z = y + scale2 * mlp(norm2(y))

    Every linear of the attention (of the MLP) reads the norm's output, but for the last one, which is the first
    of `attention_out` (`mlp_out`) that the block has. `scale1` and `scale2` name a parameter, or a module with one;
    they may be missing from a block.
    """

    norm1: str
    attention: str
    attention_out: tuple[str, ...]
    norm2: str
    mlp: str
    mlp_out: tuple[str, ...]
    scale1: str = ""
    scale2: str = ""


@dataclass(frozen=True)
class Adapter:
    """One model family.

    name: short name, shown by `oats-vision models`.
    serves: the models it is for, in words.
    matches: whether a model belongs to the family.
    blocks: the path of the ModuleList of the transformer's blocks, which run one after the other; every
        nn.Linear in them is compressed. `""` if the model is itself such a list.
    fused: linears that hold several matrices of equal size, top to bottom, by their name in the block:
        `{"attn.qkv": ("q", "k", "v")}`; each is decomposed by itself.
    prepare: changes a model, without changing what it computes, so that each linear is called as a module.
    residual: how a block of the family uses its residual stream; SliceGPT needs it.
    final_norm: path of the norm after the last block, `""` if there is none, for features.
    prefix_tokens: tokens before the patches (class token, registers); with 0 there is no class token.
    """

    name: str
    serves: str
    matches: Callable[[nn.Module], bool]
    blocks: Callable[[nn.Module], str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] = _nothing
    residual: Residual | None = None
    final_norm: Callable[[nn.Module], str] = lambda model: ""
    prefix_tokens: Callable[[nn.Module], int] = lambda model: 1

    def named_blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks in the order they run, with their full names."""
        path = self.blocks(model)
        children = model.get_submodule(path).named_children()
        return [(f"{path}.{name}" if path else name, block) for name, block in children]

    def named_linears(self, block: nn.Module) -> list[tuple[str, nn.Linear]]:
        """The linears of a block to compress, by their name in the block."""
        return [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
