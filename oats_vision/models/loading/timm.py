"""Models of timm, by their names there or in a directory; architectures and arguments are closed lists."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oats_vision import network
from oats_vision.errors import ModelError, did_you_mean
from oats_vision.models.aliases import ALIASES, in_timm
from oats_vision.models.library import library
from oats_vision.models.loading.provider import Loaded, Provider, Wanted
from oats_vision.models.loading.registry import provider
from oats_vision.models.source import ModelSource

if TYPE_CHECKING:
    from torch import Tensor, nn

# fields of timm's pretrained_cfg that say how pictures are prepared and where the head is; others lead to files
_CFG = (
    "input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "num_classes",
    "label_names",
    "label_descriptions",
    "label_offset",
    "first_conv",
    "classifier",
)
WITHOUT_THE_HUB = "give a local directory as `model`, or try a run with random weights: `pretrained=False`"
WRAPPED = "timm_model."  # before the names of transformers' wrapper of timm's models
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")


@provider
class Timm(Provider):
    kind = "timm"
    closed = True
    told_in = "model.num_classes"

    def claims(self, name: str) -> bool:
        return in_timm(ALIASES.get(name, name))

    def load(self, name: str, wanted: Wanted) -> Loaded:
        import timm

        failed = f"model {name!r} cannot be loaded"
        name = ALIASES.get(name, name)
        architecture, _, tag = name.partition(".")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        if tag and tag not in tags:
            raise ModelError(
                f"{architecture} has no weights {tag!r}, only {', '.join(tags) or 'random ones'}."
                f"{did_you_mean(tag, tags)}"
            )
        args: dict[str, Any] = {} if wanted.image_size is None else {"img_size": wanted.image_size}
        if not wanted.pretrained:
            model = library(failed, timm.create_model, name, pretrained=False, **args)
        elif not timm.is_model_pretrained(name) and architecture in timm.list_models():  # timm leads older names on
            raise ModelError(
                f"timm has no weights for {name!r}: give `pretrained=False` (random weights, to try a run)"
            )
        else:
            with network.hub(failed, WITHOUT_THE_HUB, ModelError):
                file = _fetch(name)
                if file is not None and _left_in_file(file, wanted):
                    model = _without_blocks(failed, partial(timm.create_model, name, pretrained=False, **args), file)
                else:
                    model = library(failed, timm.create_model, name, pretrained=True, **args)
        return model, _source(model, args, wanted.image_size, "float32")

    def described(self, source: ModelSource, model: nn.Module) -> ModelSource:
        classes, pool = getattr(model, "num_classes", None), getattr(model, "global_pool", None)
        args = source.args
        if isinstance(classes, int):
            args = args | {"num_classes": classes} | ({"global_pool": pool} if isinstance(pool, str) else {})
        return source.with_head(args, classes)

    def builder(self, source: ModelSource, trust_remote_code: bool) -> Callable[[], nn.Module]:
        import timm

        check_architecture(source.name, source.args)
        return partial(timm.create_model, source.name, pretrained=False, **source.args)

    def save_plain(self, model: nn.Module, source: ModelSource, directory: Path) -> None:
        """A directory for `timm.create_model("local-dir:...")`."""
        from oats_vision.models.transforms import plain

        super().save_plain(model, source, directory)
        own: dict[str, Any] = {name: model.pretrained_cfg.get(name) for name in _CFG}  # type: ignore[operator, union-attr]
        data = {name: value for name, value in (source.transform or {}).items() if name != "kind"}
        config = {
            "architecture": source.name.partition(".")[0],
            "num_classes": source.args.get("num_classes"),
            "model_args": {name: value for name, value in source.args.items() if name != "num_classes"},
            "pretrained_cfg": {name: value for name, value in (own | data).items() if value is not None}
            | {"num_classes": source.args.get("num_classes")},
        } | ({"label_names": source.label_names} if source.label_names else {})
        (directory / "config.json").write_text(json.dumps(plain(config), indent=2) + "\n")


def load_directory(path: Path, config: dict[str, Any], wanted: Wanted) -> Loaded:
    """A directory in timm's format, or in that of transformers' wrapper of timm's models.

    Of the file only the architecture, its arguments and how pictures are prepared are used, never a place of weights.
    """
    import timm

    failed = f"model {str(path)!r} cannot be loaded"
    inner = config.get("pretrained_cfg")
    saved = {**(inner if isinstance(inner, dict) else config)}
    saved |= {
        name: config[name]
        for name in ("num_classes", "label_names", "label_descriptions")
        if config.get(name) is not None
    }
    cfg = {name: saved[name] for name in _CFG if saved.get(name) is not None}
    name, args = config["architecture"], {**(config.get("model_args") or {})}
    # timm itself takes these from the configuration's other fields
    if cfg.get("fixed_input_size") and "input_size" in cfg:
        args.setdefault("img_size", list(cfg["input_size"][1:]))
    if "num_classes" in cfg:
        args.setdefault("num_classes", cfg["num_classes"])
    pool = saved.get("global_pool") or config.get("global_pool")
    if isinstance(pool, str):
        args.setdefault("global_pool", pool)
    if wanted.image_size is not None:
        args["img_size"] = wanted.image_size
    check_architecture(name, args)
    build: Any = partial(timm.create_model, name, pretrained=False, pretrained_cfg=cfg, **args)
    weights = next((path / file for file in WEIGHTS if (path / file).is_file()), None)
    if weights is None and wanted.pretrained:
        raise ModelError(f"{failed}: it has none of {', '.join(WEIGHTS)}")
    if weights is not None and _left_in_file(weights, wanted):
        model = _without_blocks(failed, build, weights)
    else:
        model = library(failed, build)
        if wanted.pretrained and weights is not None:
            _load_weights(failed, model, library(failed, _state_dict, weights))
    dtype = _dtype_of(weights) if weights is not None and weights.suffix == ".safetensors" else "float32"
    return model, _source(model, args, wanted.image_size, dtype)


def _load_weights(failed: str, model: Any, state: dict[str, Tensor]) -> None:
    """Load a state dict by timm, which renames and adapts what other libraries saved."""
    import timm

    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    # with three channels, whatever the model has: its own weights are not to be adapted to another number
    sizes = {"num_classes": model.num_classes, "in_chans": 3}
    cfg = {**model.pretrained_cfg, "state_dict": {name.removeprefix(WRAPPED): t for name, t in state.items()}}
    library(failed, timm.models.load_pretrained, model, cfg, filter_fn=rename, **sizes)


def _left_in_file(file: Path, wanted: Wanted) -> bool:
    """Whether blocks are to be read from the file, as there is no room for all weights in float32."""
    from safetensors import safe_open

    if not wanted.pretrained or file.suffix != ".safetensors" or wanted.room == math.inf:
        return False
    with safe_open(file, framework="pt") as content:
        count: int = sum(math.prod(content.get_slice(name).get_shape()) for name in content.keys())  # noqa: SIM118
    return 4 * count > wanted.room


def _without_blocks(failed: str, build: Callable[[], Any], file: Path) -> nn.Module:
    """A model whose blocks are read from the file when they are called.

    timm is given the file's tensors mapped, not read: of blocks, those that it passes on as they are stay there.
    """
    import torch
    from torch import nn

    from oats_vision.models.on_disk import BlocksOnDisk, Place, without_weights
    from oats_vision.models.record import Record, set_record, structure_of

    model: Any = library(failed, without_weights, build)
    stored = library(failed, _state_dict, file)
    keys = {_identity(tensor): name for name, tensor in stored.items()}
    places: dict[str, Place] = {}

    def take(state: Mapping[str, Tensor], strict: bool = True) -> Any:
        places.update({name: Place(file, keys[i]) for name, t in state.items() if (i := _identity(t)) in keys})
        return nn.Module.load_state_dict(model, state, strict=strict, assign=True)

    model.load_state_dict = take
    try:
        _load_weights(failed, model, stored)
    finally:
        del model.load_state_dict
    on_disk = BlocksOnDisk.of(model, structure_of(model), places)
    model._apply(lambda t: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True))
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta and name not in on_disk.places]
    if missing:
        raise ModelError(f"{failed}: {file} has no {missing[0]}")
    set_record(model, Record(on_disk=on_disk))
    return model  # type: ignore[no-any-return]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """What tells one tensor of a mapped file from the others, and from what was made of it."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def check_architecture(name: str, args: Mapping[str, Any]) -> None:
    """See that the name is one of timm's own architectures, and the arguments are numbers and choices of its classes.

    Raises:
        ModelError: they are not.
    """
    import timm

    if not re.fullmatch(r"\w+(\.\w+)?", name) or not timm.is_model(name):
        raise ModelError(f"timm model {name!r} cannot be rebuilt: it is not an architecture of timm {timm.__version__}")
    known = known_arguments()
    for argument, value in args.items():
        if argument not in known:
            raise ModelError(
                f"{argument!r} is not an argument of a timm architecture; known: {', '.join(sorted(known))}"
            )
        if not all(map(_plain_argument, value if isinstance(value, list | tuple) and len(value) <= 256 else [value])):
            raise ModelError(f"{argument} of a timm architecture must be a number or a word, got {value!r}")


@cache
def known_arguments() -> frozenset[str]:
    """Arguments of timm's VisionTransformer and Eva but for those that are classes, a device or a dtype.

    Norms and activations are words that timm looks up in registries of its own.
    """
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    words = ("act_layer", "norm_layer")
    names = {name for kind in (VisionTransformer, Eva) for name in inspect.signature(kind).parameters}
    closed = (name for name in names if name in words or not name.endswith(("_layer", "_fn")))
    return frozenset(closed) - {"device", "dtype"}


def _plain_argument(value: Any) -> bool:
    """A count, a switch, a finite number, a word such as `avg`, or nothing."""
    if isinstance(value, str):
        return re.fullmatch(r"\w*", value) is not None
    if isinstance(value, int):
        return value >= 0
    return value is None or (isinstance(value, float) and math.isfinite(value))


def _fetch(name: str) -> Path | None:
    """Have the weights in the cache before the model is built, which takes long if it is large.

    Returns:
        Their file there; None if they are not on the hub.
    """
    import timm
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return None
    repository, _, revision = cfg.hf_hub_id.partition("@")
    lost: Exception | None = None
    for file in [cfg.hf_hub_filename] if cfg.hf_hub_filename else [WEIGHTS[0], WEIGHTS[-1]]:
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except LocalEntryNotFoundError as problem:  # another may be in the cache
            lost = lost or problem
        except EntryNotFoundError:
            pass
    if lost:
        raise lost
    return None


def _state_dict(file: Path) -> dict[str, Tensor]:
    """A dense model's weights, by the names in its file; a pickled one is read without running what it says."""
    import torch
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        state: Any = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    return dict(state)


def _source(model: Any, args: Mapping[str, Any], image_size: int | None, dtype: str) -> ModelSource:
    import timm.data

    from oats_vision.models.transforms import plain, timm_transform_config

    cfg = model.pretrained_cfg
    data = timm.data.resolve_model_data_config(model)
    size = data["input_size"][1:] if image_size is None else (image_size, image_size)
    channels = args.get("in_chans") or data["input_size"][0]
    data["input_size"] = (channels, *size)
    if channels == 1:
        data |= {name: (sum(data[name]) / len(data[name]),) for name in ("mean", "std")}
    args = {**args, "num_classes": getattr(model, "num_classes", cfg.get("num_classes"))}
    names = cfg.get("label_names")
    names = list(map(str, names)) if names else None
    name = cfg.get("architecture") or type(model).__name__
    return ModelSource("timm", name, plain(args), timm_transform_config(data), dtype, names)


def _dtype_of(file: Path) -> str:
    """Precision of the largest tensor of a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        names = content.keys()
        largest = max(map(content.get_slice, names), key=lambda part: math.prod(part.get_shape()))
        dtypes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        return dtypes.get(largest.get_dtype(), "float32")
