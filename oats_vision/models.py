"""Find, build and rebuild models: from timm, Hugging Face, torch.hub, a local directory or the demo."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from oats_vision.adapters import find_adapter
from oats_vision.errors import ModelError
from oats_vision.transforms import Transform, TransformConfig, build_transform, timm_transform_config

TOKENIZER = "tokenizer"  # folder of a compressed language model's directory

_DINOV2 = {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}
_DINOV3 = {
    "vits16": "small",
    "vits16plus": "small_plus",
    "vitb16": "base",
    "vitl16": "large",
    "vith16plus": "huge_plus",
    "vit7b16": "7b",
}
ALIASES = {
    **{f"dinov2_{short}": f"vit_{size}_patch14_dinov2.lvd142m" for short, size in _DINOV2.items()},
    **{f"dinov2_{short}_reg": f"vit_{size}_patch14_reg4_dinov2.lvd142m" for short, size in _DINOV2.items()},
    **{f"dinov3_{short}": f"vit_{size}_patch16_dinov3.lvd1689m" for short, size in _DINOV3.items()},
}


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
    """

    kind: Literal["timm", "huggingface", "torch_hub", "module"]
    name: str
    args: dict[str, Any] = field(default_factory=dict)
    transform: TransformConfig | None = None
    dtype: str = "float32"
    label_names: list[str] | None = None
    origin: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def demo_directory() -> Path:
    """The trained demo ViT that ships with the package."""
    return Path(str(resources.files("oats_vision") / "demo"))


def load_model(
    name: str,
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
        pretrained: load the trained weights, or keep the random ones of the architecture.
        image_size: input size in pixels, if not the model's own (timm models).
        dtype: of the model's weights and arithmetic.
        trust_remote_code: allow code from a hub to run.

    Raises:
        ModelError: unknown name, a model that cannot be loaded, or one of no supported family.
    """
    path = demo_directory() if name == "demo" else Path(name)
    try:
        if name.startswith("hf:"):
            model, source = _from_huggingface(name[3:], pretrained, trust_remote_code)
        elif name.startswith("hub:"):
            model, source = _from_torch_hub(name[4:], pretrained, trust_remote_code)
        elif path.suffix == ".gguf":
            model, source = _from_gguf(path, pretrained)
        elif path.is_dir():
            model, source = _from_directory(path, pretrained, image_size, trust_remote_code)
        elif timm.is_model(ALIASES.get(name, name)):
            model, source = _from_timm(ALIASES.get(name, name), pretrained, image_size)
        else:
            raise ModelError(
                f"unknown model {name!r}: give a directory, hf:org/name, hub:entry, a timm name or an alias "
                f"({', '.join(sorted(ALIASES))}, demo); `oats-vision models --search {name.split('.')[0][:12]}` helps"
            )
    except ModelError:
        raise
    except Exception as problem:  # libraries raise what they like: hub, network, file and shape errors
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise ModelError(f"model {name!r} cannot be loaded: {reason[:400]}") from problem
    if image_size is not None and source.kind != "timm":
        raise ModelError(f"image_size {image_size} can be set for timm models only, and {name!r} is not one")
    find_adapter(model)
    model = model.to(device=device, dtype=dtype).eval()
    place = str(path.resolve()) if path.exists() and name != "demo" else name
    remember_source(model, replace(source, origin={"name": place, "image_size": image_size}))
    return model, build_transform(source.transform) if source.transform else None


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a language model, by the name that `load_model` takes, or of a compressed one's directory.

    Raises:
        ModelError: there is none.
    """
    import transformers

    path = Path(name)
    place = path / TOKENIZER if (path / TOKENIZER).is_dir() else path
    try:
        if path.suffix == ".gguf":
            return transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        return transformers.AutoTokenizer.from_pretrained(name[3:] if name.startswith("hf:") else str(place))
    except Exception as problem:  # hub, network, file and parser errors
        reason = " ".join(str(problem).split())[:300]
        raise ModelError(f"{name} has no tokenizer that can be loaded: {reason}") from None


def remember_source(model: nn.Module, source: ModelSource) -> None:
    """Note on the model how it can be rebuilt."""
    model._oats_vision_source = source  # type: ignore[assignment]  # a plain attribute


def source_of(model: nn.Module) -> ModelSource:
    """How a model can be rebuilt: noted by `load_model`, read off a Hugging Face model, else `module`."""
    source = getattr(model, "_oats_vision_source", None)
    if isinstance(source, ModelSource):
        return source
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and type(model).__module__.startswith("transformers."):
        return _huggingface_source(model)
    return ModelSource("module", f"{type(model).__module__}.{type(model).__qualname__}")


def rebuild(source: ModelSource, trust_remote_code: bool = False) -> nn.Module:
    """The architecture, without weights: parameters on the meta device, buffers real.

    Raises:
        ModelError: a module of the user's own, hub code that is not on this machine, or an unknown name.
    """
    try:
        with init_empty_weights(include_buffers=False):
            if source.kind == "timm":
                model = timm.create_model(source.name, pretrained=False, **source.args)
            elif source.kind == "huggingface":
                import transformers

                kind = getattr(transformers, source.name)
                model = kind(kind.config_class.from_dict(source.args))
            elif source.kind == "torch_hub":
                model = _torch_hub(source.args["repository"], source.name, False, trust_remote_code)
            else:
                raise ModelError(
                    f"the checkpoint is of {source.name}: pass a module of that class as load(..., model=)"
                )
    except ModelError:
        raise
    except Exception as problem:
        reason = " ".join(str(problem).split())
        raise ModelError(f"{source.kind} model {source.name!r} cannot be rebuilt: {reason[:400]}") from problem
    return model.eval()


def save_plain(model: nn.Module, source: ModelSource, dtype: torch.dtype, directory: Path) -> None:
    """Write a dense model as a plain checkpoint of its original architecture.

    timm: a directory for `timm.create_model("local-dir:...")`; Hugging Face: `from_pretrained`; else the
    state dict as `model.safetensors`.
    """
    model = model.to(dtype)
    find_adapter(model).restore(model)
    directory.mkdir(exist_ok=True)
    if source.kind == "timm":
        args = {name: value for name, value in source.args.items() if name != "num_classes"}
        timm.models.save_for_hf(model, str(directory), model_args=args, safe_serialization=True)
    elif source.kind == "huggingface":
        model.save_pretrained(directory)  # type: ignore[operator]  # a PreTrainedModel
    else:
        save_file({n: t.clone() for n, t in model.state_dict().items()}, directory / "model.safetensors")


def _from_timm(name: str, pretrained: bool, image_size: int | None, dtype: str = "float32"):
    args: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    model = timm.create_model(name, pretrained=pretrained, **args)
    cfg = dict(model.pretrained_cfg)
    if "local-dir:" in name:
        saved = json.loads(Path(name.removeprefix("local-dir:"), "config.json").read_text())
        args = {**saved.get("model_args", {}), **args}
    args["num_classes"] = getattr(model, "num_classes", cfg.get("num_classes"))
    data = timm.data.resolve_model_data_config(model)
    if image_size is not None:
        data["input_size"] = (3, image_size, image_size)
    names = cfg.get("label_names")
    names = list(names) if names else None
    return model, ModelSource("timm", cfg["architecture"], _plain(args), timm_transform_config(data), dtype, names)


def _from_huggingface(name: str, pretrained: bool, trust_remote_code: bool):
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    towers = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel"}
    architecture = (config.architectures or [""])[0]
    kind = getattr(transformers, towers.get(architecture, architecture), None) or transformers.AutoModel
    if architecture in towers:
        config = config.vision_config
    if pretrained:
        model = kind.from_pretrained(name, trust_remote_code=trust_remote_code, dtype=torch.float32)
    else:
        model = kind(config) if kind is not transformers.AutoModel else kind.from_config(config)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        transform = {"kind": "huggingface", **_plain(processor.to_dict())}
    except (OSError, ValueError):
        transform = None  # a model without a processor still loads; pictures then need a transform from the user
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    labels = [str(name) for _, name in sorted((model.config.id2label or {}).items())]  # may be numbered from 1
    names = labels if any(name != f"LABEL_{i}" for i, name in enumerate(labels)) else None
    return model, _huggingface_source(model, transform, dtype, names)


def _from_gguf(path: Path, pretrained: bool):
    """A language model in llama.cpp's format, dequantised by transformers."""
    import transformers

    if not path.is_file():
        raise ModelError(f"{path} does not exist")
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if pretrained:
        model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    else:
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(**place))
    # what was dequantised from 8 bits or fewer is stored in half precision without a loss that counts
    return model, _huggingface_source(model, dtype="float16")


def _from_torch_hub(name: str, pretrained: bool, trust_remote_code: bool):
    repository, _, entry = name.rpartition(":")
    repository = repository or "facebookresearch/dinov2:main"
    model = _torch_hub(repository, entry, pretrained, trust_remote_code)
    # the preprocessing of the published evaluations: shorter side to 256, bicubic, centre crop of 224
    data = timm.data.resolve_data_config({"input_size": (3, 224, 224), "interpolation": "bicubic"})
    return model, ModelSource("torch_hub", entry, {"repository": repository}, timm_transform_config(data))


def _torch_hub(repository: str, entry: str, pretrained: bool, trust_remote_code: bool) -> nn.Module:
    """Build a model by an entry point of a GitHub repository (owner/name:ref) or of a clone in a directory."""
    if not trust_remote_code:
        raise ModelError(f"{entry} runs code from {repository}: pass --trust-remote-code if you trust it")
    where: Literal["local", "github"] = "local" if Path(repository).is_dir() else "github"
    return torch.hub.load(repository, entry, source=where, trust_repo=True, skip_validation=True, pretrained=pretrained)


def _from_directory(path: Path, pretrained: bool, image_size: int | None, trust_remote_code: bool):
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{path} is no model directory: it has no config.json")
    config = json.loads(config_file.read_text())
    if "format_version" in config:
        raise ModelError(f"{path} is compressed already: load it with oats_vision.load, or `oats-vision eval`")
    if "architecture" in config:
        weights = path / "model.safetensors"
        dtype = _safetensors_dtype(weights) if weights.is_file() else "float32"
        return _from_timm(f"local-dir:{path}", pretrained, image_size, dtype)
    if "model_type" in config:
        return _from_huggingface(str(path), pretrained, trust_remote_code)
    raise ModelError(f"{config_file} is neither timm's (architecture) nor Hugging Face's (model_type)")


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
    dtype: str = "float32",
    names: list[str] | None = None,
) -> ModelSource:
    args = _plain(model.config.to_dict())  # type: ignore[operator, union-attr]
    args.pop("_name_or_path", None)  # as it was typed, which depends on the folder: `origin` has it whole
    return ModelSource("huggingface", type(model).__name__, args, transform, dtype, names)


def _plain(value: Any) -> Any:
    """The same through JSON: tuples become lists, enumerations their values, dtypes their names."""
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", str(other))))
