"""Find and build dense models: from timm, Hugging Face, torch.hub, a local directory or the demo."""

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oats_vision import demo, network
from oats_vision.errors import ModelError, did_you_mean, near
from oats_vision.models.adapters import SHIPPED, adapters, find_adapter
from oats_vision.models.aliases import ALIASES, unknown_model
from oats_vision.models.source import (
    ModelSource,
    from_torch_hub,
    huggingface_args,
    huggingface_class,
    is_of_our_own,
    library,
    rebuild,
    timm_architecture,
)
from oats_vision.models.transforms import Transform, TransformConfig, build_transform, plain, timm_transform_config

__all__ = ["ModelSource", "load_model", "load_tokenizer", "rebuild", "remember_source", "source_of"]

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer"  # folder of a compressed language model's directory


def load_model(
    name: str | Path,
    *,
    pretrained: bool = True,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Transform | None]:
    """Load a model in eval mode, and its own preprocessing.

    Args:
        name: `demo`; an alias such as `dinov2_vitl14`; a timm name; `hf:org/name`; `hub:entry` or
            `hub:repository_or_directory:entry`; a directory in timm's or Hugging Face's format; a .gguf file.
        pretrained: load the trained weights, or keep random ones of the architecture, the same each time.
        image_size: input size in pixels, if not the model's own (timm models).
        dtype: of the model's weights and arithmetic; buffers that are computed and not stored keep theirs.
        trust_remote_code: allow code from a hub to run.

    Raises:
        ModelError: unknown name, a model that cannot be loaded, or one of no supported family.
    """
    name = os.fspath(name)
    path = demo.DIRECTORY if name == "demo" else Path(name)
    with nullcontext() if pretrained else _same_random_weights():
        model, source = _from_anywhere(name, path, pretrained, image_size, trust_remote_code)
    if image_size is not None and source.kind != "timm":
        raise ModelError(f"image_size {image_size} can be set for timm models only, and {name!r} is not one")
    find_adapter(model)
    transform, source = _known_transform(name, source)
    origin = {"name": str(path.resolve()) if path.exists() and name != "demo" else name, "image_size": image_size}
    remember_source(model, replace(source, origin=origin, dense_sha256=weights_digest(model)))
    return cast_weights(model, dtype).to(device=device).eval(), transform


def _from_anywhere(name: str, path: Path, pretrained: bool, image_size: int | None, trust_remote_code: bool):
    """The model that a name or a path stands for."""
    if name.startswith("hf:"):
        return _from_hub(name[3:], pretrained, image_size, trust_remote_code)
    if name.startswith("hub:"):
        return _from_torch_hub(name[4:], pretrained, trust_remote_code)
    if path.suffix == ".gguf":
        return _from_gguf(path, pretrained)
    if path.is_dir():
        return _from_directory(path, pretrained, image_size, trust_remote_code)
    if timm.is_model(ALIASES.get(name, name)):
        return _from_timm(name, pretrained, image_size)
    raise unknown_model(name)


@contextmanager
def _same_random_weights() -> Iterator[None]:
    """Random numbers from a fixed start; the caller's go on as if none had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed the GPU too
        yield


def _known_transform(name: str, source: ModelSource) -> tuple[Transform | None, ModelSource]:
    """The model's preprocessing; none, which is said and noted, if it is of a kind that we do not make."""
    try:
        return build_transform(source.transform) if source.transform else None, source
    except ModelError as unknown:
        log.warning("%s is loaded without its preprocessing (%s): give batches of your own", name, unknown)
        return None, replace(source, transform=None)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's state dict in the order of its names: name, shape and values, floating ones as float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def note_weights(model: nn.Module) -> None:
    """Note which weights a loaded model has now: it may have been trained since.

    In 16 bits they cannot be told from the loaded ones, which were rounded: what was noted stays.
    """
    source = getattr(model, "_oats_vision_source", None)
    whole = all(p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point())
    if isinstance(source, ModelSource) and source.dense_sha256 and whole:
        remember_source(model, replace(source, dense_sha256=weights_digest(model)))


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a model's weights another dtype, in place, as `from_pretrained(dtype=)` does.

    What no checkpoint holds keeps its precision: rotary frequencies are computed, and wrong if they are rounded.
    """
    stored = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a language model, by the name that `load_model` takes, or of a compressed one's directory.

    Raises:
        ModelError: there is none.
    """
    import transformers

    name = os.fspath(name)
    options: dict[str, Any] = {"trust_remote_code": False}
    path = Path(name.removeprefix("hf:"))
    place = path / TOKENIZER if (path / TOKENIZER).is_dir() else path
    if path.suffix == ".gguf":
        place, options = path.parent, options | {"gguf_file": path.name}
    failed = f"{name} has no tokenizer that can be loaded"
    if not name.startswith("hf:") or Path(name[3:]).is_dir():
        return library(failed, transformers.AutoTokenizer.from_pretrained, str(place), **options)
    with network.hub(failed, "give a local directory", ModelError):
        return library(failed, transformers.AutoTokenizer.from_pretrained, name[3:], **options)


def remember_source(model: nn.Module, source: ModelSource) -> None:
    """Note on the model how it can be rebuilt."""
    model._oats_vision_source = source  # type: ignore[assignment]  # a plain attribute


def source_of(model: nn.Module) -> ModelSource:
    """How a model can be rebuilt: noted by `load_model`, read off a Hugging Face model, else `module`."""
    source = getattr(model, "_oats_vision_source", None)
    if isinstance(source, ModelSource):
        return source.described_by(model)
    if huggingface_class(type(model).__name__) is type(model):
        return ModelSource("huggingface", type(model).__name__, huggingface_args(model))
    return ModelSource("module", f"{type(model).__module__}.{type(model).__qualname__}")


def save_plain(model: nn.Module, source: ModelSource, dtype: torch.dtype, directory: Path) -> None:
    """Write a dense model as a plain checkpoint of its original architecture, with its preprocessing.

    timm: a directory for `timm.create_model("local-dir:...")`; Hugging Face: `from_pretrained`; else the
    state dict as `model.safetensors`.
    """
    cast_weights(model, dtype)
    find_adapter(model).restore(model)
    directory.mkdir(exist_ok=True)
    if source.kind == "huggingface":
        model.save_pretrained(directory)  # type: ignore[operator]  # a PreTrainedModel
        if source.transform:
            transform: Any = build_transform(source.transform)
            transform.processor.save_pretrained(directory)
        return
    save_file({n: t.clone() for n, t in model.state_dict().items()}, directory / "model.safetensors")
    if source.kind == "timm":
        own: dict[str, Any] = {name: model.pretrained_cfg.get(name) for name in _TIMM_CFG}  # type: ignore[operator, union-attr]
        data = {name: value for name, value in (source.transform or {}).items() if name != "kind"}
        config = {
            "architecture": source.name.partition(".")[0],
            "num_classes": source.args.get("num_classes"),
            "model_args": {name: value for name, value in source.args.items() if name != "num_classes"},
            "pretrained_cfg": {name: value for name, value in (own | data).items() if value is not None}
            | {"num_classes": source.args.get("num_classes")},
        } | ({"label_names": source.label_names} if source.label_names else {})
        (directory / "config.json").write_text(json.dumps(plain(config), indent=2) + "\n")


# fields of timm's pretrained_cfg that say how pictures are prepared and where the head is; others lead to files
_TIMM_CFG = (
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
_WITHOUT_THE_HUB = "give a local directory as --model, or try a run with random weights: --no-pretrained"
_TIMM_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")


def _from_timm(name: str, pretrained: bool, image_size: int | None):
    failed = f"model {name!r} cannot be loaded"
    name = ALIASES.get(name, name)
    architecture, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ModelError(
            f"{architecture} has no weights {tag!r}, only {', '.join(tags) or 'random ones'}.{did_you_mean(tag, tags)}"
        )
    args: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    if not pretrained:
        model = library(failed, timm.create_model, name, pretrained=False, **args)
    elif not timm.is_model_pretrained(name) and architecture in timm.list_models():  # timm leads older names on
        raise ModelError(f"timm has no weights for {name!r}: use --no-pretrained (random weights, to try a run)")
    else:
        with network.hub(failed, _WITHOUT_THE_HUB, ModelError):
            _fetch_timm(name)
            model = library(failed, timm.create_model, name, pretrained=True, **args)
    return model, _timm_source(model, args, image_size, "float32")


def _fetch_timm(name: str) -> None:
    """Have the weights in the cache before the model is built, which takes long if it is large."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return
    repository, _, revision = cfg.hf_hub_id.partition("@")
    lost: Exception | None = None
    for file in [cfg.hf_hub_filename] if cfg.hf_hub_filename else [_TIMM_WEIGHTS[0], _TIMM_WEIGHTS[-1]]:
        try:
            hf_hub_download(repository, file, revision=revision or None)
            return
        except LocalEntryNotFoundError as problem:  # another may be in the cache
            lost = lost or problem
        except EntryNotFoundError:
            pass
    if lost:
        raise lost


def _from_timm_directory(path: Path, config: dict[str, Any], pretrained: bool, image_size: int | None):
    """A directory in timm's format, or in that of transformers' wrapper of timm's models.

    Of the file only the architecture, its arguments and how pictures are prepared are used, never a place of weights.
    """
    failed = f"model {str(path)!r} cannot be loaded"
    inner = config.get("pretrained_cfg")
    saved = {**(inner if isinstance(inner, dict) else config)}
    saved |= {
        name: config[name]
        for name in ("num_classes", "label_names", "label_descriptions")
        if config.get(name) is not None
    }
    cfg = {name: saved[name] for name in _TIMM_CFG if saved.get(name) is not None}
    name, args = config["architecture"], {**(config.get("model_args") or {})}
    # timm itself takes these from the configuration's other fields
    if cfg.get("fixed_input_size") and "input_size" in cfg:
        args.setdefault("img_size", list(cfg["input_size"][1:]))
    if "num_classes" in cfg:
        args.setdefault("num_classes", cfg["num_classes"])
    pool = saved.get("global_pool") or config.get("global_pool")
    if isinstance(pool, str):
        args.setdefault("global_pool", pool)
    if image_size is not None:
        args["img_size"] = image_size
    timm_architecture(name, args)
    model: Any = library(failed, timm.create_model, name, pretrained=False, pretrained_cfg=cfg, **args)
    weights = next((path / file for file in _TIMM_WEIGHTS if (path / file).is_file()), None)
    if pretrained:
        if weights is None:
            raise ModelError(f"{failed}: it has none of {', '.join(_TIMM_WEIGHTS)}")
        cfg = {**model.pretrained_cfg, "state_dict": library(failed, _state_dict, weights)}
        rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        # with three channels, whatever the model has: its own weights are not to be adapted to another number
        sizes = {"num_classes": model.num_classes, "in_chans": 3}
        library(failed, timm.models.load_pretrained, model, cfg, filter_fn=rename, **sizes)
    dtype = _safetensors_dtype(weights) if weights is not None and weights.suffix == ".safetensors" else "float32"
    return model, _timm_source(model, args, image_size, dtype)


def _state_dict(file: Path) -> dict[str, Tensor]:
    """A dense model's weights as float32, by timm's names; a pickled file is read without running what it says."""
    if file.suffix == ".safetensors":
        state: Any = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    return {name.removeprefix("timm_model."): tensor for name, tensor in state.items()}


def _timm_source(model: Any, args: Mapping[str, Any], image_size: int | None, dtype: str) -> ModelSource:
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


def _from_hub(name: str, pretrained: bool, image_size: int | None, trust_remote_code: bool):
    """A repository of the Hugging Face hub, of transformers or of timm, or a local copy of one."""
    from huggingface_hub import hf_hub_download

    if Path(name).is_dir():
        return _from_directory(Path(name), pretrained, image_size, trust_remote_code)
    failed = f"model {'hf:' + name!r} cannot be loaded"
    advice = _WITHOUT_THE_HUB if pretrained else "give a local directory as --model"
    with network.hub(failed, advice, ModelError):
        file = Path(library(failed, hf_hub_download, name, "config.json"))
        config = _read_json(file)
        if "architecture" not in config:
            return _from_huggingface(name, pretrained, trust_remote_code)
        if pretrained:
            library(failed, hf_hub_download, name, _TIMM_WEIGHTS[0])
        return _from_timm_directory(file.parent, config, pretrained, image_size)


def _from_huggingface(name: str, pretrained: bool, trust_remote_code: bool):
    import transformers

    failed = f"model {name!r} cannot be loaded"
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if (Path(name) / "adapter_config.json").is_file():
        raise ModelError(f"{failed}: it holds adapters of another model: merge them first (merge_and_unload)")
    config = library(failed, transformers.AutoConfig.from_pretrained, name, **trust)
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{failed}: it is quantised already: give the model that it was made from")
    if not trust_remote_code:
        for field in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(getattr(config, field, None)):
                raise ModelError(
                    f"{failed}: its {field[1:]} is code of a hub: pass --trust-remote-code if you trust it"
                )
    if not trust_remote_code:
        is_of_our_own(config)
    towers = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel"}
    architecture = str((config.architectures or [""])[0])
    kind: Any = huggingface_class(towers.get(architecture, architecture)) or _mapped_class(config)
    if kind is None:
        if adapters() == list(SHIPPED) and not trust_remote_code:
            raise ModelError(f"{failed}: no adapter knows {architecture or config.model_type}")
        kind = transformers.AutoModel
    if architecture in towers:
        config = config.vision_config
    if pretrained:
        options = trust | {"dtype": torch.float32, "output_loading_info": True}
        model, loaded = library(failed, kind.from_pretrained, name, **options)
        if loaded["missing_keys"]:
            missing = sorted(loaded["missing_keys"])
            log.warning("%d tensors are not in the weights of %s and are random: %s", len(missing), name, missing[0])
    else:
        model = library(failed, kind if kind is not transformers.AutoModel else kind.from_config, config)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        transform = {"kind": "huggingface", **plain(processor.to_dict())}
    except (OSError, ValueError):
        transform = None  # a model without a processor still loads; pictures then need a transform from the user
    labels = [str(name) for _, name in sorted((model.config.id2label or {}).items())]  # may be numbered from 1
    names = labels if any(name != f"LABEL_{i}" for i, name in enumerate(labels)) else None
    return model, _huggingface_source(model, transform, config.dtype, names)


def _mapped_class(config: Any) -> type | None:
    """The class of a known family that transformers would take for a configuration that names none."""
    import transformers

    found = transformers.MODEL_MAPPING.get(type(config), None)
    names = [kind.__name__ for kind in (found if isinstance(found, tuple) else (found,)) if kind is not None]
    return next(filter(None, map(huggingface_class, names)), None)


def _from_gguf(path: Path, pretrained: bool):
    """A language model in llama.cpp's format, dequantised by transformers."""
    import transformers

    if not path.is_file():
        raise ModelError(f"{path} does not exist.{near(path)}")
    failed = f"model {str(path)!r} cannot be loaded"
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    auto = transformers.AutoModelForCausalLM
    if pretrained:
        model = library(failed, auto.from_pretrained, **place, dtype=torch.float32)
    else:
        model = library(failed, auto.from_config, library(failed, transformers.AutoConfig.from_pretrained, **place))
    # what was dequantised from 8 bits or fewer is stored in half precision without a loss that counts
    return model, _huggingface_source(model, dtype=torch.float16)


def _from_torch_hub(name: str, pretrained: bool, trust_remote_code: bool):
    repository, _, entry = name.rpartition(":")
    repository = repository or "facebookresearch/dinov2:main"
    failed = f"model {'hub:' + name!r} cannot be loaded"
    with network.github(failed, Path(repository).is_dir() or _has_clone(repository)):
        model = library(failed, from_torch_hub, repository, entry, pretrained, trust_remote_code)
    # the preprocessing of the published evaluations: shorter side to 256, bicubic, centre crop of 224
    data = timm.data.resolve_data_config({"input_size": (3, 224, 224), "interpolation": "bicubic"})
    return model, ModelSource("torch_hub", entry, {"repository": repository}, timm_transform_config(data))


def _has_clone(repository: str) -> bool:
    """Whether torch.hub has downloaded the GitHub repository (owner/name:ref)."""
    place, _, ref = repository.partition(":")
    return bool(list(Path(torch.hub.get_dir()).glob(f"{place.replace('/', '_')}_{ref.replace('/', '_') or 'ma*'}")))


def _from_directory(path: Path, pretrained: bool, image_size: int | None, trust_remote_code: bool):
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{path} is no model directory: it has no config.json")
    config = _read_json(config_file)
    if "format_version" in config:
        raise ModelError(f"{path} is compressed already: load it with oats_vision.load, or `oats-vision eval`")
    if isinstance(config.get("architecture"), str):
        return _from_timm_directory(path, config, pretrained, image_size)
    if "model_type" in config:
        return _from_huggingface(str(path), pretrained, trust_remote_code)
    raise ModelError(f"{config_file} is neither timm's (architecture) nor Hugging Face's (model_type)")


def _read_json(file: Path) -> dict[str, Any]:
    """Raises ModelError if the file holds no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{file} cannot be read: {problem}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds no JSON object")
    return content


def _safetensors_dtype(path: Path) -> str:
    """Precision of the largest tensor of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        largest = max(map(file.get_slice, names), key=lambda part: math.prod(part.get_shape()))
        dtypes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        return dtypes.get(largest.get_dtype(), "float32")


def _huggingface_source(
    model: nn.Module,
    transform: TransformConfig | None = None,
    dtype: torch.dtype | None = None,
    names: list[str] | None = None,
) -> ModelSource:
    precision = str(dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32).removeprefix("torch.")
    return ModelSource("huggingface", type(model).__name__, huggingface_args(model), transform, precision, names)
