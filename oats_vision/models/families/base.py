"""What a model family must say to be compressed: where its blocks are, and which linears are fused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import nn


Fused = Mapping[str, tuple[str, ...]]


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


class Family(ABC):
    """One model family: a subclass, registered with `@register_family`.

    Only `name`, `serves`, `matches` and `blocks` must be given. Instances hold no state.

    name: short name, shown by `oats-vision models` and kept in checkpoints.
    serves: the models it is for, in words.
    unit: what calibration data are counted in, `pictures` or `sequences` (of text).
    fused: linears that hold several matrices of equal size, top to bottom, by their name in the block:
        `{"attn.qkv": ("q", "k", "v")}`; each is decomposed by itself. Numbers in the name are left out
        (`experts.gate_up` is that of every expert).
    residual: how a block of the family uses its residual stream; SliceGPT needs it.
    """

    name: ClassVar[str]
    serves: ClassVar[str]
    unit: ClassVar[Literal["pictures", "sequences"]] = "pictures"
    fused: ClassVar[Fused] = {}
    residual: ClassVar[Residual | None] = None

    @abstractmethod
    def matches(self, model: nn.Module) -> bool:
        """Whether a model belongs to the family."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> str:
        """The path of the ModuleList of the transformer's blocks, which run one after the other.

        Every nn.Linear in them is compressed. `""` if the model is itself such a list.
        """

    def final_norm(self, model: nn.Module) -> str:
        """The path of the norm after the last block, for features; `""` if there is none."""
        return ""

    def prefix_tokens(self, model: nn.Module) -> int:
        """How many tokens come before the patches: class token, registers."""
        return 1

    def class_token(self, model: nn.Module) -> bool:
        """Whether the first of the prefix tokens is a class token; registers alone are none."""
        return self.prefix_tokens(model) > 0

    def pooled_before_norm(self, model: nn.Module) -> bool:
        """Whether the model's own features are norm(mean of tokens), not mean(norm(tokens))."""
        return False

    def rows(self, block: nn.Module, linear: str) -> Sequence[int] | None:
        """Heights of the matrices of a fused linear, by its name in the block, where they differ."""
        return None

    def to_replace(self, model: nn.Module) -> list[str]:
        """Paths of the modules whose weights are read past a linear, or that hold them in another form."""
        return []

    def replacement(self, module: nn.Module) -> nn.Module:
        """What takes the place of such a module and computes the same, with each linear called as a module."""
        return module

    def original(self, replacement: nn.Module, model: nn.Module) -> nn.Module:
        """The inverse of `replacement`, in a merged model whose checkpoint is to be of the original architecture."""
        return replacement

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)  # copies and what was unpickled

    def __hash__(self) -> int:
        return hash(type(self))

    def structure(self, model: nn.Module) -> Structure:
        """What the family finds in one model."""
        return Structure(
            family=self,
            blocks=self.blocks(model),
            final_norm=self.final_norm(model),
            prefix_tokens=self.prefix_tokens(model),
            class_token=self.class_token(model),
            pooled_before_norm=self.pooled_before_norm(model),
            replaced=tuple(self.to_replace(model)),
        )


@dataclass(frozen=True)
class Structure:
    """What a family finds in one model, once, before anything of it is replaced: paths in the model, and numbers.

    replaced: paths of what `prepare` replaces. The other fields are the answers of the `Family`'s methods.
    """

    family: Family
    blocks: str
    final_norm: str = ""
    prefix_tokens: int = 1
    class_token: bool = True
    pooled_before_norm: bool = False
    replaced: tuple[str, ...] = ()

    def within(self, path: str) -> Structure:
        """The structure of a model that has this one's at `path`."""
        return replace(
            self,
            blocks=_joined(path, self.blocks),
            final_norm=self.final_norm and _joined(path, self.final_norm),
            replaced=tuple(_joined(path, name) for name in self.replaced),
        )

    def named_blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks in the order they run, with their full names."""
        children = model.get_submodule(self.blocks).named_children()
        return [(_joined(self.blocks, name), block) for name, block in children]

    def named_linears(self, block: nn.Module) -> list[tuple[str, nn.Linear]]:
        """The linears of a block to compress, by their name in the block."""
        from torch import nn

        return [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]

    def parts(self, block: nn.Module, name: str, linear: nn.Linear) -> list[tuple[str, int]]:
        """The matrices that a linear holds, top to bottom, each with its rows; a plain linear is one.

        Raises:
            ValueError: its rows do not divide.
        """
        names = self.family.fused.get(".".join(part for part in name.split(".") if not part.isdigit()), ())
        if not names:
            return [(name.rsplit(".", 1)[-1], linear.out_features)]
        heights = self.family.rows(block, name) or [linear.out_features // len(names)] * len(names)
        if sum(heights) != linear.out_features:
            raise ValueError(f"{linear.out_features} rows do not divide into {len(names)} parts")
        return list(zip(names, heights, strict=True))

    def prepare(self, model: nn.Module) -> None:
        """Change a model, without changing what it computes, so that each linear is called as a module."""
        modules = dict(model.named_modules())
        for path in self.replaced:
            if path in modules:  # sliced blocks have other paths
                model.set_submodule(path, self.family.replacement(modules[path]))

    def restore(self, model: nn.Module) -> None:
        """Undo `prepare`, also on a merged model."""
        modules = dict(model.named_modules())
        for path in self.replaced:
            if path in modules:
                model.set_submodule(path, self.family.original(modules[path], model))


def _joined(path: str, name: str) -> str:
    return ".".join(filter(None, (path, name)))
