"""A model's own input preprocessing, as data: stored in checkpoints, rebuilt without a network."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import timm.data
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor
from torchvision.transforms import Compose, Grayscale

from oats_vision.errors import ModelError, one_line

# What a transform is made from: {"kind": "timm", input_size, interpolation, mean, std, crop_pct, crop_mode} or
# {"kind": "huggingface", ...fields of an image processor}
TransformConfig = dict[str, Any]
Transform = Callable[[Image.Image], Tensor]
LARGEST = 1 << 12  # pixels of a side, beyond which no model reads
RESIZED = 2 * LARGEST  # of the shorter side before the middle is cut out
# of the model families that are known; others may read files, or run programs that read text
_PROCESSORS = re.compile(r"(ViT|DeiT|Beit|Bit|ConvNext|CLIP|Siglip|Siglip2|DINOv3ViT)ImageProcessor(Fast|Pil)?")

_Pixels = Annotated[int, Field(ge=1, le=LARGEST)]
_Channel = Annotated[float, Field(allow_inf_nan=False)]
_Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Timm(BaseModel):
    """What `timm.data.create_transform` is called with."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["timm"]
    input_size: tuple[Literal[1, 3], _Pixels, _Pixels] = (3, 224, 224)
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming", "random"] = "bilinear"
    mean: Annotated[tuple[_Channel, ...], Field(min_length=1, max_length=3)] = (0.5, 0.5, 0.5)
    std: Annotated[tuple[_Spread, ...], Field(min_length=1, max_length=3)] = (0.5, 0.5, 0.5)
    crop_pct: Annotated[float, Field(gt=0, le=4)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None

    @model_validator(mode="after")
    def _bounded(self) -> "_Timm":
        if max(self.input_size[1:]) > RESIZED * (1.0 if self.crop_pct is None else self.crop_pct):
            raise ValueError(f"crop_pct {self.crop_pct:g} asks for pictures of more than {RESIZED} pixels a side")
        return self


class HuggingFaceTransform:
    """One picture through a Hugging Face image processor (a class, so that worker processes can have it)."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __repr__(self) -> str:
        return f"HuggingFaceTransform({self.processor.to_json_string()})"

    def __call__(self, picture: Image.Image) -> Tensor:
        if len(getattr(self.processor, "image_mean", None) or "RGB") == 1:  # a model of one channel
            picture = picture.convert("L")
        values: Tensor = self.processor(picture, return_tensors="pt")["pixel_values"][0]
        return values


def timm_transform_config(fields: Mapping[str, Any]) -> TransformConfig:
    """What `timm.data.create_transform` needs, from a resolved timm data configuration."""
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return {"kind": "timm"} | {
        name: list(fields[name]) if isinstance(fields[name], tuple) else fields[name]
        for name in names
        if name in fields
    }


def build_transform(config: TransformConfig) -> Transform:
    """PIL picture (RGB) -> float32 tensor (channels, height, width), as the configuration says.

    Raises:
        ModelError: the configuration is not one of ours.
    """
    kind = config.get("kind")
    if kind == "timm":
        try:
            fields = _Timm.model_validate(config).model_dump(exclude={"kind"}, exclude_unset=True)
        except ValidationError as invalid:
            error = invalid.errors()[0]
            raise ModelError(f"transform: {'.'.join(map(str, error['loc']))}: {error['msg']}") from None
        transform = timm.data.create_transform(**fields, is_training=False)
        found: Transform = Compose([Grayscale(), transform]) if fields.get("input_size", (3,))[0] == 1 else transform
        return found
    if kind == "huggingface":
        return HuggingFaceTransform(_image_processor(config))
    raise ModelError(f"transform: kind must be 'timm' or 'huggingface', got {kind!r}")


def plain(value: Any) -> Any:
    """The same through JSON: tuples become lists, enumerations their values, dtypes their names."""
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", str(other))))


def _image_processor(config: TransformConfig) -> Any:
    """An image processor of transformers' own, made of numbers and words.

    Raises:
        ModelError: another class, or a field that leads to code or asks for a picture that is too large.
    """
    import transformers
    from transformers.image_processing_base import ImageProcessingMixin

    name = config.get("image_processor_type")
    found = getattr(transformers, name, None) if isinstance(name, str) and _PROCESSORS.fullmatch(name) else None
    if not (isinstance(found, type) and issubclass(found, ImageProcessingMixin)):
        raise ModelError(f"transform: {name!r} is not an image processor of a known model family")
    processor: Any = found
    fields = {name: value for name, value in config.items() if name != "kind" and not name.startswith("_")}
    leading = {"auto_map", "trust_remote_code", "custom_pipelines"} & fields.keys()
    if leading:
        raise ModelError(f"transform: {min(leading)} leads to code: it is not followed")
    _check_pixels(fields)
    try:
        return processor(**fields)
    except Exception as problem:  # each class has checks of its own
        raise ModelError(f"transform: {name}: {one_line(problem, 300)}") from problem


def _check_pixels(fields: Mapping[str, Any]) -> None:
    """Raises ModelError if an image processor of these fields asks for a picture that is too large."""
    size, patch, patches = (_numbers(fields.get(name)) for name in ("size", "patch_size", "max_num_patches"))
    crop = max(_numbers(fields.get("crop_pct")), default=1.0)
    too_large = (
        not all(number <= LARGEST for number in _numbers(fields))
        or max(size, default=1) > RESIZED * crop
        or max(patches, default=1) * max(patch, default=1) ** 2 > LARGEST**2
    )
    if too_large:
        raise ModelError(f"transform: a picture has at most {LARGEST} pixels a side")


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in _numbers(item)]
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


def as_seen(picture: Image.Image, transform: Transform) -> Image.Image:
    """The picture as the model sees it: resized and cropped, with its normalisation undone."""
    # whatever normalises does it per channel: what becomes of black and of white shows how
    values = transform(picture)
    black, white = (transform(Image.new("RGB", picture.size, colour)) for colour in ("black", "white"))
    whole = ((values - black) / (white - black) * 255).round().clamp(0, 255).byte()
    return Image.fromarray(whole.expand(3, -1, -1).permute(1, 2, 0).numpy())
