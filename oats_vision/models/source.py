"""Which architectures may be built from what a file says, and how: closed lists of classes and of arguments."""

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from accelerate import init_empty_weights
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from oats_vision.errors import CheckpointError, ModelError, OatsVisionError
from oats_vision.models.adapters import causal_lm, hf_vit
from oats_vision.models.bounds import BUILDING, Limits, bounded
from oats_vision.models.transforms import TransformConfig, plain

# fields of a Hugging Face configuration that lead to code or to other files
_LEADING = (
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "quantization_config",
    "attn_implementation",
    "experts_implementation",
    "backbone",
    "use_pretrained_backbone",
    "use_timm_backbone",
)
_BLOCKS = ("depth", "num_hidden_layers", "n_layer", "num_layers")  # names of the number of blocks


@dataclass(frozen=True)
class ModelSource:
    """How to rebuild a model without its weights.

    kind: "timm" (name: architecture), "huggingface" (name: class in transformers), "torch_hub" (name: entry
        point) or "module" (a module of the user's own, which must be given again to be loaded).
    args: keyword arguments, or the Hugging Face configuration.
    transform: the model's input preprocessing, if known.
    dtype: precision of the original weights.
    label_names: of the head's classes, in order, if known.
    origin: what `load_model` was called with (name, image_size), to find the dense weights again.
    dense_sha256: of the dense weights as they were loaded, see `models.weights_digest`.
    """

    kind: Literal["timm", "huggingface", "torch_hub", "module"]
    name: str
    args: dict[str, Any] = field(default_factory=dict)
    transform: TransformConfig | None = None
    dtype: str = "float32"
    label_names: list[str] | None = None
    origin: dict[str, Any] | None = None
    dense_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def is_architecture_of(self, noted: "ModelSource") -> bool:
        """Whether this source, of a model just loaded, is of the architecture that a checkpoint notes.

        Releases of a library add arguments, and some are of no architecture.
        """
        other = {"transformers_version", "dtype", "torch_dtype", "architectures"}
        args = {name: value for name, value in noted.args.items() if name not in other and not name.startswith("_")}
        same = all(name in self.args and self.args[name] == value for name, value in args.items())
        return (self.kind, self.name) == (noted.kind, noted.name) and same

    def described_by(self, model: nn.Module) -> "ModelSource":
        """With what the model itself now says: its number of classes, its configuration."""
        args = self.args
        classes, pool = getattr(model, "num_classes", None), getattr(model, "global_pool", None)
        if self.kind == "timm" and isinstance(classes, int):
            args = args | {"num_classes": classes} | ({"global_pool": pool} if isinstance(pool, str) else {})
        elif self.kind == "huggingface":
            args = huggingface_args(model)
            classes = len(args.get("id2label") or ())
        names = self.label_names if self.label_names and len(self.label_names) == classes else None
        return replace(self, args=args, label_names=names)


def library(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call timm or transformers on what a file or a hub says, where they raise what they like.

    Raises:
        ModelError: one line, `what` and the reason.
    """
    try:
        return function(*args, **kwargs)
    except OatsVisionError:
        raise
    except Exception as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise ModelError(f"{what}: {reason[:400]}") from problem


def rebuild(source: ModelSource, trust_remote_code: bool = False, limits: Limits | None = None) -> nn.Module:
    """The architecture, without weights: parameters on the meta device, buffers real.

    Args:
        limits: of what may be built; None for a source that is trusted.

    Raises:
        ModelError: a module of the user's own, hub code that is not on this machine, an unknown name, or an argument
            that is none of an architecture's.
        CheckpointError: the limits are passed.
    """
    what = f"{source.kind} model {source.name!r} cannot be rebuilt"
    build: Callable[[], nn.Module]
    if source.kind == "timm":
        timm_architecture(source.name, source.args)
        build = lambda: timm.create_model(source.name, pretrained=False, **source.args)  # noqa: E731
    elif source.kind == "huggingface":
        kind: Any = huggingface_class(source.name)
        if kind is None:
            raise ModelError(f"{what}: it is no model class of transformers that an adapter knows")
        args = _closed(source.args)
        _check_types(args, library(what, kind.config_class).to_dict())
        build = lambda: kind(kind.config_class.from_dict(args))  # noqa: E731
    elif source.kind == "torch_hub":
        repository = source.args.get("repository")
        if not isinstance(repository, str):
            raise ModelError(f"{what}: it names no repository")
        build = lambda: from_torch_hub(repository, source.name, False, trust_remote_code)  # noqa: E731
    else:
        raise ModelError(f"the checkpoint is of {source.name}: pass a module of that class as load(..., model=)")
    if limits:
        _check_blocks(source.args, limits)
    with BUILDING, bounded(limits) if limits else nullcontext(), init_empty_weights(include_buffers=False):
        model: nn.Module = library(what, build)
    return model.eval()


def timm_architecture(name: str, args: Mapping[str, Any]) -> None:
    """See that the name is one of timm's own architectures, and the arguments are numbers and choices of its classes.

    Raises:
        ModelError: they are not.
    """
    if not re.fullmatch(r"\w+(\.\w+)?", name) or not timm.is_model(name):
        raise ModelError(f"timm model {name!r} cannot be rebuilt: it is no architecture of timm {timm.__version__}")
    known = timm_arguments()
    for argument, value in args.items():
        if argument not in known:
            raise ModelError(f"{argument!r} is no argument of a timm architecture; known: {', '.join(sorted(known))}")
        if not all(map(_plain_argument, value if isinstance(value, list | tuple) and len(value) <= 256 else [value])):
            raise ModelError(f"{argument} of a timm architecture must be a number or a word, got {value!r}")


def _plain_argument(value: Any) -> bool:
    """A count, a switch, a finite number, a word such as `avg`, or nothing."""
    if isinstance(value, str):
        return re.fullmatch(r"\w*", value) is not None
    if isinstance(value, int):
        return value >= 0
    return value is None or (isinstance(value, float) and math.isfinite(value))


@cache
def timm_arguments() -> frozenset[str]:
    """Arguments of timm's VisionTransformer and Eva but for those that are classes, a device or a dtype.

    Norms and activations are words that timm looks up in registries of its own.
    """
    words = ("act_layer", "norm_layer")
    names = {name for kind in (VisionTransformer, Eva) for name in inspect.signature(kind).parameters}
    closed = (name for name in names if name in words or not name.endswith(("_layer", "_fn")))
    return frozenset(closed) - {"device", "dtype"}


def huggingface_class(name: str) -> type | None:
    """The model class of that name in transformers, None if there is none or no adapter knows its blocks."""
    import transformers

    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None
    blocks = {*hf_vit.FAMILIES, *causal_lm.FAMILIES}
    own = kind.__module__.startswith("transformers.models.") and blocks & vars(sys.modules[kind.__module__]).keys()
    return kind if own else None


def is_of_our_own(config: Any) -> None:
    """See that a Hugging Face configuration leads neither to code nor to other files.

    Raises:
        ModelError: it does.
    """
    _closed(plain(config.to_dict()))
    if config.model_type in ("timm_wrapper", "timm_backbone"):  # their arguments reach timm whole
        raise ModelError(f"a {config.model_type} without its timm architecture: load it by its name in timm")


def huggingface_args(model: nn.Module) -> dict[str, Any]:
    """A Hugging Face model's configuration, without what is not of its architecture."""
    return _without_private(plain(model.config.to_dict()))  # type: ignore[operator, union-attr]


def from_torch_hub(repository: str, entry: str, pretrained: bool, trust_remote_code: bool) -> nn.Module:
    """Build a model by an entry point of a GitHub repository (owner/name:ref) or of a clone in a directory."""
    if not trust_remote_code:
        raise ModelError(f"{entry} runs code from {repository}: pass --trust-remote-code if you trust it")
    where: Literal["local", "github"] = "local" if Path(repository).is_dir() else "github"
    return torch.hub.load(repository, entry, source=where, trust_repo=True, skip_validation=True, pretrained=pretrained)


def _closed(args: Any) -> Any:
    """A Hugging Face configuration from a file, without private fields.

    Raises:
        ModelError: a field leads to code or to another file.
    """
    if not isinstance(args, dict):
        return args
    leading = [name for name in _LEADING if args.get(name)]
    if leading:
        raise ModelError(f"{leading[0]} in a configuration leads to code or other files: it is not followed")
    # the number of labels is that of their names; by itself it makes as many names
    # and in what form outputs are given is of a call, not of the architecture
    dropped = {"num_labels", "return_dict", "output_attentions", "output_hidden_states", *_LEADING}
    return {name: _closed(value) for name, value in _without_private(args).items() if name not in dropped}


def _check_types(args: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises ModelError if a switch is none, or a count is negative or no number: not each release looks itself."""
    for name, value in args.items():
        default = defaults.get(name)
        switch = isinstance(default, bool) and not isinstance(value, bool)
        word = isinstance(default, int | float) and isinstance(value, str | dict)
        positive = name.startswith("num_") or name.endswith("eps")
        negative = positive and isinstance(value, int | float) and value < 0
        if value is not None and (switch or word or negative):
            raise ModelError(f"{name} in a configuration must be like {default!r}, got {value!r}")


def _without_private(args: Any) -> Any:
    if not isinstance(args, dict):
        return args
    return {name: _without_private(value) for name, value in args.items() if not name.startswith("_")}


def _check_blocks(args: Any, limits: Limits) -> None:
    """Each block has a tensor at least, and lists as long as the number of blocks are made before any module."""
    if not isinstance(args, dict):
        return
    for name, value in args.items():
        _check_blocks(value, limits)
        if name in _BLOCKS and isinstance(value, int | float) and value > limits.tensors:
            raise CheckpointError(f"config.json asks for {value} blocks, and its weights are {limits.tensors} tensors")
