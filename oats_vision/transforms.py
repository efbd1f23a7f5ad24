"""A model's own input preprocessing, as data: stored in checkpoints, rebuilt without a network."""

from collections.abc import Callable, Mapping
from typing import Any

import timm.data
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Grayscale

# What a transform is made from: {"kind": "timm", input_size, interpolation, mean, std, crop_pct, crop_mode} or
# {"kind": "huggingface", ...fields of an image processor}
TransformConfig = dict[str, Any]
Transform = Callable[[Image.Image], Tensor]


class HuggingFaceTransform:
    """One picture through a Hugging Face image processor (a class, so that worker processes can have it)."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __repr__(self) -> str:
        return f"HuggingFaceTransform({self.processor.to_json_string()})"

    def __call__(self, picture: Image.Image) -> Tensor:
        if len(getattr(self.processor, "image_mean", None) or "RGB") == 1:  # a model of one channel
            picture = picture.convert("L")
        return self.processor(picture, return_tensors="pt")["pixel_values"][0]


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
        KeyError, ValueError or TypeError: the configuration is not one of ours.
    """
    fields = dict(config)
    kind = fields.pop("kind")
    if kind == "huggingface":
        import transformers

        return HuggingFaceTransform(getattr(transformers, fields["image_processor_type"])(**fields))
    if kind != "timm":
        raise ValueError(f"transform kind must be 'timm' or 'huggingface', got {kind!r}")
    fields["input_size"] = tuple(fields["input_size"])
    transform = timm.data.create_transform(**fields, is_training=False)
    return Compose([Grayscale(), transform]) if fields["input_size"][0] == 1 else transform


def as_seen(picture: Image.Image, transform: Transform) -> Image.Image:
    """The picture as the model sees it: resized and cropped, with its normalisation undone."""
    # whatever normalises does it per channel: what becomes of black and of white shows how
    values = transform(picture)
    black, white = (transform(Image.new("RGB", picture.size, colour)) for colour in ("black", "white"))
    whole = ((values - black) / (white - black) * 255).round().clamp(0, 255).byte()
    return Image.fromarray(whole.expand(3, -1, -1).permute(1, 2, 0).numpy())
