"""What a model family must say to be compressed: where its blocks are, and which linears are fused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn


def _nothing(model: nn.Module) -> None:
    pass


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
    """

    name: str
    serves: str
    matches: Callable[[nn.Module], bool]
    blocks: Callable[[nn.Module], str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] = _nothing

    def named_blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks in the order they run, with their full names."""
        path = self.blocks(model)
        children = model.get_submodule(path).named_children()
        return [(f"{path}.{name}" if path else name, block) for name, block in children]

    def named_linears(self, block: nn.Module) -> list[tuple[str, nn.Linear]]:
        """The linears of a block to compress, by their name in the block."""
        return [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
