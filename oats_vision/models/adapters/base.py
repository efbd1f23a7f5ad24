"""What a model family must say to be compressed: where its blocks are, and which linears are fused."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
        `{"attn.qkv": ("q", "k", "v")}`; each is decomposed by itself. Numbers in the name are left out
        (`experts.gate_up` is that of every expert).
    rows: heights of the matrices of a fused linear, from the block and its name there, where they differ.
    prepare: changes a model, without changing what it computes, so that each linear is called as a module.
    restore: undoes `prepare` on a merged model, so that its checkpoint is of the original architecture.
    residual: how a block of the family uses its residual stream; SliceGPT needs it.
    final_norm: path of the norm after the last block, `""` if there is none, for features.
    unit: what calibration data are counted in, `pictures` or `sequences` (of text).
    prefix_tokens: tokens before the patches (class token, registers).
    class_token: whether the first of them is a class token; registers alone are none. By default: if there is any.
    pooled_before_norm: whether the model's own features are norm(mean of tokens), not mean(norm(tokens)).
    """

    name: str
    serves: str
    matches: Callable[[nn.Module], bool]
    blocks: Callable[[nn.Module], str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: Callable[[nn.Module, str], Sequence[int] | None] = lambda block, linear: None
    prepare: Callable[[nn.Module], None] = _nothing
    restore: Callable[[nn.Module], None] = _nothing
    residual: Residual | None = None
    unit: Literal["pictures", "sequences"] = "pictures"
    final_norm: Callable[[nn.Module], str] = lambda model: ""
    prefix_tokens: Callable[[nn.Module], int] = lambda model: 1
    class_token: Callable[[nn.Module], bool] = None  # type: ignore[assignment]  # set below
    pooled_before_norm: Callable[[nn.Module], bool] = lambda model: False

    def __post_init__(self) -> None:
        if self.class_token is None:
            object.__setattr__(self, "class_token", lambda model: self.prefix_tokens(model) > 0)

    def named_blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks in the order they run, with their full names."""
        path = self.blocks(model)
        children = model.get_submodule(path).named_children()
        return [(f"{path}.{name}" if path else name, block) for name, block in children]

    def named_linears(self, block: nn.Module) -> list[tuple[str, nn.Linear]]:
        """The linears of a block to compress, by their name in the block."""
        return [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]

    def parts(self, block: nn.Module, name: str, linear: nn.Linear) -> list[tuple[str, int]]:
        """The matrices that a linear holds, top to bottom, each with its rows; a plain linear is one.

        Raises:
            ValueError: its rows do not divide.
        """
        names = self.fused.get(".".join(part for part in name.split(".") if not part.isdigit()), ())
        if not names:
            return [(name.rsplit(".", 1)[-1], linear.out_features)]
        heights = self.rows(block, name) or [linear.out_features // len(names)] * len(names)
        if sum(heights) != linear.out_features:
            raise ValueError(f"{linear.out_features} rows do not divide into {len(names)} parts")
        return list(zip(names, heights, strict=True))


def blocks_of_class(
    model: nn.Module, block_class: str, wanted: Callable[[str], bool] = lambda path: True
) -> str | None:
    """Path of the first ModuleList of transformers blocks of that class, None if there is none.

    Args:
        wanted: of the list's path; what is not is passed over, such as a text tower.
    """
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        kind = type(module[0])
        if kind.__name__ == block_class and kind.__module__.startswith("transformers.") and wanted(path):
            return path
    return None
