"""How a model is rebuilt without its weights, as plain data: kept with it and in its checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from oats_vision.models.transforms import TransformConfig

Kind = Literal["timm", "huggingface", "torch_hub", "module"]


@dataclass(frozen=True)
class ModelSource:
    """How to rebuild a model without its weights.

    kind: the provider that rebuilds it: "timm" (name: architecture), "huggingface" (name: class in transformers),
        "torch_hub" (name: entry point) or "module" (a module of the user's own, which must be given again to be
        loaded).
    args: keyword arguments, or the Hugging Face configuration.
    transform: the model's input preprocessing, if known.
    dtype: precision of the original weights.
    label_names: of the head's classes, in order, if known.
    origin: what `load_model` was called with (name, image_size), to find the dense weights again.
    dense_sha256: of the dense weights as they were loaded, see `weights_digest`.
    """

    kind: Kind
    name: str
    args: dict[str, Any] = field(default_factory=dict)
    transform: TransformConfig | None = None
    dtype: str = "float32"
    label_names: list[str] | None = None
    origin: dict[str, Any] | None = None
    dense_sha256: str | None = None

    @classmethod
    def of_module(cls, model: nn.Module) -> ModelSource:
        """Of a module of the user's own."""
        return cls("module", f"{type(model).__module__}.{type(model).__qualname__}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def origin_name(self) -> str:
        """What the model was loaded as, else its architecture."""
        return str((self.origin or {}).get("name") or self.name)

    def is_architecture_of(self, noted: ModelSource) -> bool:
        """Whether this source, of a model just loaded, is of the architecture that a checkpoint notes.

        Releases of a library add arguments, and some are of no architecture.
        """
        other = {"transformers_version", "dtype", "torch_dtype", "architectures"}
        args = {name: value for name, value in noted.args.items() if name not in other and not name.startswith("_")}
        same = all(name in self.args and self.args[name] == value for name, value in args.items())
        return (self.kind, self.name) == (noted.kind, noted.name) and same

    def with_head(self, args: dict[str, Any], classes: int | None) -> ModelSource:
        """With other arguments, and the labels' names only if there are as many as the head has classes."""
        names = self.label_names if self.label_names and len(self.label_names) == classes else None
        return replace(self, args=args, label_names=names)
