"""Families of transformers, each known by the class of its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from oats_vision.models.families.base import Family

if TYPE_CHECKING:
    from torch import nn


class HuggingFaceFamily(Family):
    """A family whose blocks lie in a ModuleList of modules of one class.

    block_class: its name in transformers.
    """

    block_class: ClassVar[str]

    def matches(self, model: nn.Module) -> bool:
        return self.find_blocks(model) is not None

    def blocks(self, model: nn.Module) -> str:
        return self.find_blocks(model) or ""

    def find_blocks(self, model: nn.Module) -> str | None:
        """Path of the first ModuleList of such blocks that is wanted, None if there is none."""
        from torch import nn

        for path, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) and self.wanted(model, path):
                kind = type(module[0])
                if kind.__name__ == self.block_class and kind.__module__.startswith("transformers."):
                    return str(path)
        return None

    def wanted(self, model: nn.Module, path: str) -> bool:
        """Whether the blocks at a path are meant, and not those of a text tower."""
        return True
