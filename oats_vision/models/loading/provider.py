"""What a place that models come from must say. None needs PyTorch to be asked whether a name is its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from oats_vision.errors import ModelError
from oats_vision.models.source import ModelSource

if TYPE_CHECKING:
    from torch import nn

Loaded = tuple["nn.Module", ModelSource]


@dataclass(frozen=True)
class Wanted:
    """How a model is to be loaded: arguments of `load_model`.

    room: bytes that weights in float32 may take; those of blocks that take more are left in their files, where these
    are safetensors.
    """

    pretrained: bool = True
    image_size: int | None = None
    trust_remote_code: bool = False
    room: float = math.inf

    def check_no_size(self, name: str) -> None:
        """Raises ModelError if an image size was given, for models that have their own."""
        if self.image_size is not None:
            raise ModelError(f"image_size {self.image_size} can be set for timm models only, and {name!r} is not one")


class Provider:
    """A place that models come from.

    Some find models by names, some rebuild what a `ModelSource` of their kind says, most do both.

    kind: of the sources that it rebuilds, empty if it rebuilds none.
    closed: whether it does so from closed lists of classes and arguments: without others' code, and by itself.
    told_in: where such a model says what head it has.
    """

    kind: ClassVar[Literal["", "timm", "huggingface", "torch_hub", "module"]] = ""
    closed: ClassVar[bool] = False
    told_in: ClassVar[str] = ""

    def claims(self, name: str) -> bool:
        """Whether a name is one of its own; said in milliseconds, `load` has the last word."""
        return False

    def load(self, name: str, wanted: Wanted) -> Loaded:
        """The dense model of that name, in float32, and how it is rebuilt.

        Raises:
            ModelError: it cannot be loaded.
        """
        raise NotImplementedError

    def origin(self, name: str) -> str:
        """What finds the model again from another folder."""
        return name

    def load_tokenizer(self, name: str) -> Any:
        """The tokenizer of a language model.

        Raises:
            ModelError: there is none.
        """
        raise ModelError(f"{name} has no tokenizer: it is not a language model")

    def recognise(self, model: nn.Module) -> ModelSource | None:
        """How a model that was not loaded here is rebuilt; None if it is not a model of this provider's."""
        return None

    def described(self, source: ModelSource, model: nn.Module) -> ModelSource:
        """A noted source with what the model itself says by now: its number of classes, its configuration."""
        return source

    def builder(self, source: ModelSource, trust_remote_code: bool) -> Callable[[], nn.Module]:
        """What builds the architecture, once all that the source says is seen to be allowed.

        Raises:
            ModelError: it is not.
        """
        raise NotImplementedError

    def save_plain(self, model: nn.Module, source: ModelSource, directory: Path) -> None:
        """Write a dense model's weights, and what its own library needs to read them."""
        from safetensors.torch import save_file

        save_file({n: t.clone() for n, t in model.state_dict().items()}, directory / "model.safetensors")


def read_json(file: Path) -> dict[str, Any]:
    """Raises ModelError if the file holds no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{file} cannot be read: {problem}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object")
    return content
