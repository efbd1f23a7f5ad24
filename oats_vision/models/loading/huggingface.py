"""Models of transformers, from the Hugging Face hub or a copy of a repository; their classes are a closed list."""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oats_vision import network
from oats_vision.errors import ModelError
from oats_vision.models.families import families
from oats_vision.models.families.hf_family import HuggingFaceFamily
from oats_vision.models.families.registry import is_shipped
from oats_vision.models.library import library
from oats_vision.models.loading import timm
from oats_vision.models.loading.provider import Loaded, Provider, Wanted, read_json
from oats_vision.models.loading.registry import provider, provider_of
from oats_vision.models.source import ModelSource

if TYPE_CHECKING:
    import torch
    from torch import nn

    from oats_vision.models.transforms import TransformConfig

log = logging.getLogger(__name__)

# fields of a configuration that lead to code or to other files
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
_TOWERS = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel"}


@provider
class HuggingFace(Provider):
    kind = "huggingface"
    closed = True
    told_in = "model.config (num_labels, ...)"

    def claims(self, name: str) -> bool:
        return name.startswith("hf:")

    def load(self, name: str, wanted: Wanted) -> Loaded:
        """A repository of the hub, of transformers or of timm, or a local copy of one."""
        from huggingface_hub import hf_hub_download

        place = name.removeprefix("hf:")
        if Path(place).is_dir():
            return provider_of(place).load(place, wanted)
        failed = f"model {name!r} cannot be loaded"
        advice = timm.WITHOUT_THE_HUB if wanted.pretrained else "give a local directory as `model`"
        with network.hub(failed, advice, ModelError):
            file = Path(library(failed, hf_hub_download, place, "config.json"))
            config = read_json(file)
            if "architecture" not in config:
                return load_repository(place, wanted)
            if wanted.pretrained:
                library(failed, hf_hub_download, place, timm.WEIGHTS[0])
            return timm.load_directory(file.parent, config, wanted)

    def load_tokenizer(self, name: str) -> Any:
        place = name.removeprefix("hf:")
        if Path(place).is_dir():
            return provider_of(place).load_tokenizer(place)
        with network.hub(f"{name} has no tokenizer that can be loaded", "give a local directory", ModelError):
            return tokenizer_at(name, place)

    def recognise(self, model: nn.Module) -> ModelSource | None:
        if model_class(type(model).__name__) is not type(model):
            return None
        return ModelSource("huggingface", type(model).__name__, _args(model))

    def described(self, source: ModelSource, model: nn.Module) -> ModelSource:
        args = _args(model)
        return source.with_head(args, len(args.get("id2label") or ()))

    def builder(self, source: ModelSource, trust_remote_code: bool) -> Callable[[], nn.Module]:
        what = f"huggingface model {source.name!r} cannot be rebuilt"
        kind: Any = model_class(source.name)
        if kind is None:
            raise ModelError(f"{what}: it is not a model class of transformers of a known family")
        args = _closed(source.args)
        _check_types(args, library(what, kind.config_class).to_dict())
        return partial(_build, kind, args)

    def save_plain(self, model: nn.Module, source: ModelSource, directory: Path) -> None:
        from oats_vision.models.transforms import build_transform

        model.save_pretrained(directory)  # type: ignore[operator]  # a PreTrainedModel
        if source.transform:
            transform: Any = build_transform(source.transform)
            transform.processor.save_pretrained(directory)


def load_repository(name: str, wanted: Wanted) -> Loaded:
    """A model of transformers, from a directory or, by its name there, from the hub.

    Raises:
        ModelError: it cannot be loaded, or leads to code or files that are not its own.
    """
    import torch
    import transformers

    wanted.check_no_size(name)
    failed = f"model {name!r} cannot be loaded"
    trust: dict[str, Any] = {"trust_remote_code": wanted.trust_remote_code}
    if (Path(name) / "adapter_config.json").is_file():
        raise ModelError(f"{failed}: it holds adapters of another model: merge them first (merge_and_unload)")
    config = library(failed, transformers.AutoConfig.from_pretrained, name, **trust)
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{failed}: it is quantised already: give the model that it was made from")
    if not wanted.trust_remote_code:
        _without_code(config)
        _check_closed(config, failed)
    architecture = str((config.architectures or [""])[0])
    kind: Any = model_class(_TOWERS.get(architecture, architecture)) or _mapped_class(config)
    if kind is None:
        if all(map(is_shipped, families())) and not wanted.trust_remote_code:
            raise ModelError(f"{failed}: no model family fits {architecture or config.model_type}")
        kind = transformers.AutoModel
    if architecture in _TOWERS:
        config = config.vision_config
    if wanted.pretrained:
        options = trust | {"dtype": torch.float32, "output_loading_info": True}
        blocks = _left_on_disk(failed, kind, config, wanted)
        if blocks:
            model, loaded = _without_blocks(failed, partial(kind.from_pretrained, name, **options), blocks)
        else:
            model, loaded = library(failed, kind.from_pretrained, name, **options)
        if loaded["missing_keys"]:
            missing = sorted(loaded["missing_keys"])
            log.warning("%d tensors are not in the weights of %s and are random: %s", len(missing), name, missing[0])
    else:
        model = library(failed, kind if kind is not transformers.AutoModel else kind.from_config, config)
    if type(model) is kind:
        _without_code(model.config)
    labels = [str(name) for _, name in sorted((model.config.id2label or {}).items())]  # may be numbered from 1
    names = labels if any(name != f"LABEL_{i}" for i, name in enumerate(labels)) else None
    return model, source_for(model, _transform(name), config.dtype, names)


def source_for(
    model: nn.Module,
    transform: TransformConfig | None = None,
    dtype: torch.dtype | None = None,
    names: list[str] | None = None,
) -> ModelSource:
    """The source of a model of transformers; `dtype` and `names` (of the labels) are those of its files."""
    import torch

    precision = str(dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32).removeprefix("torch.")
    return ModelSource("huggingface", type(model).__name__, _args(model), transform, precision, names)


def model_class(name: str) -> type | None:
    """The model class of that name in transformers, None if there is none or no family knows its blocks."""
    import transformers

    kind = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        return None
    blocks = {family.block_class for family in families() if isinstance(family, HuggingFaceFamily)}
    own = kind.__module__.startswith("transformers.models.") and blocks & vars(sys.modules[kind.__module__]).keys()
    return kind if own else None


def tokenizer_at(name: str, place: str = "", **options: Any) -> Any:
    """The tokenizer at a place; `name` is what the user gave.

    Raises:
        ModelError: there is none.
    """
    import transformers

    where = (place,) if place else ()
    load = partial(transformers.AutoTokenizer.from_pretrained, trust_remote_code=False)
    return library(f"{name} has no tokenizer that can be loaded", load, *where, **options)


def _left_on_disk(failed: str, kind: Any, config: Any, wanted: Wanted) -> dict[str, str]:
    """Where each of a model's parts is to be, blocks on the disk, if there is no room for all; else nothing."""
    import transformers

    from oats_vision.models.on_disk import blocks_are_as_stored, without_weights
    from oats_vision.models.record import structure_of

    if wanted.room == math.inf:
        return {}
    build = kind if kind is not transformers.AutoModel else partial(kind.from_config, trust_remote_code=False)
    model = library(failed, without_weights, partial(build, deepcopy(config)))
    structure = structure_of(model)
    if 4 * sum(parameter.numel() for parameter in model.parameters()) <= wanted.room:
        return {}
    if not blocks_are_as_stored(model, structure):
        return {}
    others = [name for name in model.state_dict() if not name.startswith(f"{structure.blocks}.")]
    return {structure.blocks: "disk", **dict.fromkeys(others, "cpu")}


def _without_blocks(failed: str, load: Callable[..., Any], places: dict[str, str]) -> tuple[Any, dict[str, Any]]:
    """A model whose blocks are read when they are called, from its files where these hold them as they are.

    transformers finds out what is where; what must be converted it writes to a folder.
    """
    from accelerate.hooks import remove_hook_from_submodules

    from oats_vision.models.on_disk import BlocksOnDisk, Place
    from oats_vision.models.record import Record, set_record, structure_of

    folder = tempfile.TemporaryDirectory(prefix="oats_vision_weights_")
    with _quiet():
        model, loaded = library(failed, load, device_map=places, offload_folder=folder.name)
    maps = [getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in model.modules()]
    index = next(found.dataset.index for found in maps if found is not None)
    remove_hook_from_submodules(model)
    for module in model.modules():
        vars(module).pop("forward", None)  # accelerate puts the class's own on the module
    files = {name: Place(Path(of["safetensors_file"]), of["weight_name"]) for name, of in index.items()}
    on_disk = BlocksOnDisk.of(model, structure_of(model), files)
    on_disk.folder = folder
    set_record(model, Record(on_disk=on_disk))
    return model, loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Without accelerate's remarks on weights that are on the disk, which were asked for."""
    remarks = logging.getLogger("accelerate.big_modeling")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        remarks.setLevel(level)


def _build(kind: Any, args: dict[str, Any]) -> nn.Module:
    model: nn.Module = kind(kind.config_class.from_dict(args))
    return model


def _mapped_class(config: Any) -> type | None:
    """The class of a known family that transformers would take for a configuration that names none."""
    import transformers

    found = transformers.MODEL_MAPPING.get(type(config), None)
    names = [kind.__name__ for kind in (found if isinstance(found, tuple) else (found,)) if kind is not None]
    return next(filter(None, map(model_class, names)), None)


def _transform(name: str) -> TransformConfig | None:
    """The model's image processor, as data; a model without one still loads."""
    import transformers

    from oats_vision.models.transforms import plain

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    return {"kind": "huggingface", **plain(processor.to_dict())}


def _args(model: nn.Module) -> dict[str, Any]:
    """A model's configuration, without what is not of its architecture."""
    from oats_vision.models.transforms import plain

    args: dict[str, Any] = _without_private(plain(model.config.to_dict()))  # type: ignore[operator, union-attr]
    return args


def _without_code(config: Any) -> None:
    """Forget where code for a configuration's model is, once a class of transformers' own was taken in its place."""
    vars(config).pop("auto_map", None)


def _check_closed(config: Any, failed: str) -> None:
    """See that a configuration leads neither to code nor to other files.

    Raises:
        ModelError: it does.
    """
    from oats_vision.models.transforms import plain

    for field in ("_attn_implementation", "_experts_implementation"):
        if "/" in str(getattr(config, field, None)):
            raise ModelError(
                f"{failed}: its {field[1:]} is code of a hub: give `trust_remote_code=True` if you trust it"
            )
    _closed(plain(config.to_dict()))
    if config.model_type in ("timm_wrapper", "timm_backbone"):  # their arguments reach timm whole
        raise ModelError(f"a {config.model_type} without its timm architecture: load it by its name in timm")


def _closed(args: Any) -> Any:
    """A configuration from a file, without private fields.

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
