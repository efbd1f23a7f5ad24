"""Small pictures for a page: what a model saw, and what its patch features look like."""

import base64
import io
import math

import torch
from PIL import Image
from torch import Tensor

from oats_vision.models.transforms import Transform

SIDE = 112  # pixels


def thumbnail(picture: Tensor, transform: Transform | None = None) -> str:
    """A preprocessed picture (channels, height, width) as the `data:` address of a small JPEG.

    Its normalisation is undone as far as the transform is known; else its values are spread from black to white.
    """
    values = picture.detach().float().cpu()
    black, white = values.amin(), values.amax()
    if transform is not None:
        black, white = (_constant(transform, colour) for colour in ("black", "white"))
    whole = ((values - black) / (white - black).clamp_min(1e-6) * 255).round().clamp(0, 255).byte()
    channels = whole[:1].expand(3, -1, -1) if len(whole) < 3 else whole[:3]
    image = Image.fromarray(channels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((SIDE, SIDE))
    return _address(image, "jpeg")


def _constant(transform: Transform, colour: str) -> Tensor:
    """What becomes of a colour, (channels, 1, 1): normalisation goes by channel."""
    return torch.as_tensor(transform(Image.new("RGB", (256, 256), colour))).float().mean((1, 2), keepdim=True)


def patch_maps(dense: Tensor, compressed: Tensor) -> list[str]:
    """Patch features of both models, (patches, width), by the dense one's first three principal components.

    Returns:
        The `data:` addresses of two pictures in the same colours; none if the patches make no square of 4 x 4 or more.
    """
    side = math.isqrt(len(dense))
    if side < 4 or side * side != len(dense) or dense.shape[1] < 3:
        return []
    centre = dense.mean(0)
    basis = torch.linalg.svd(dense - centre, full_matrices=False).Vh[:3].T  # (width, 3)
    maps = [(patches - centre) @ basis for patches in (dense, compressed)]
    low, high = maps[0].amin(0), maps[0].amax(0)
    return [_address(_map(one, low, high, side), "png") for one in maps]


def _map(values: Tensor, low: Tensor, high: Tensor, side: int) -> Image.Image:
    colours = ((values - low) / (high - low).clamp_min(1e-6) * 255).clamp(0, 255).byte()
    return Image.fromarray(colours.view(side, side, 3).numpy())


def _address(image: Image.Image, kind: str) -> str:
    stream = io.BytesIO()
    image.save(stream, kind, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
