"""Picture files: which there are below a folder, and how one is decoded, whatever it comes from."""

import logging
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

log = logging.getLogger(__name__)

UNREADABLE = (OSError, ValueError)  # what `open_picture` raises
ORIENTATION = 0x0112  # EXIF tag


def open_picture(source: Any) -> Image.Image:
    """Decode a picture completely, as an 8-bit RGB one that stands upright.

    EXIF orientation is applied; more than 8 bits are scaled to 8; transparency is dropped, and CMYK converted,
    as torchvision's folders do.

    Args:
        source: a path or address, the bytes of a file, `{"bytes", "path"}` as in a dataset's rows, or a PIL picture.

    Raises:
        OSError or ValueError: no picture, one that is cut short, or whose values have no known range.
    """
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if isinstance(source, Image.Image):
        return _upright_rgb(source)
    if isinstance(source, bytes):
        source = BytesIO(source)
    elif not isinstance(source, (str, Path)):
        raise ValueError(f"not a picture: {type(source).__name__}")
    try:
        if isinstance(source, str) and "://" in source:  # of a stream: the library of datasets knows its networks
            import datasets

            return _upright_rgb(datasets.Image().decode_example({"path": source, "bytes": None}))
        with Image.open(source) as picture:
            picture.load()
            return _upright_rgb(picture)
    except UNREADABLE:
        raise
    except Exception as problem:  # decoders raise whatever a broken file makes them stumble over
        raise OSError(f"cannot be decoded: {problem}") from problem


def picture_files(folder: Path) -> list[Path]:
    """All picture files below a folder, see `picture_names`."""
    return [Path(name) for name in picture_names(str(folder))]


def picture_names(folder: str) -> list[str]:
    """Paths of all picture files below a folder, sorted; plain text, as a million of Path objects fills a gigabyte.

    Links to folders are followed, and each folder is read once, under its own name rather than a link's, so that
    links never loop. Hidden files and folders are left out.
    """
    found: list[str] = []
    seen: set[str] = set()
    folders, links = [folder], list[str]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)  # links wait until all real folders were read
        if (place := os.path.realpath(here)) in seen:
            continue
        seen.add(place)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as problem:
            log.warning("%s cannot be read and is left out: %s", here, problem.strerror)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                inside = entry.is_dir()
            except OSError as problem:  # a link to itself, or to where one may not look
                log.warning("%s cannot be read and is left out: %s", entry.path, problem.strerror)
                continue
            if inside:
                (links if entry.is_symlink() else folders).append(entry.path)
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                found.append(entry.path)
    return sorted(found)


def _upright_rgb(picture: Image.Image) -> Image.Image:
    sixteen = picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM")  # whose mode I means 16 bits
    picture = _upright(picture)
    if picture.mode.startswith(("I", "F")):
        picture = Image.fromarray(_eight_bits(np.asarray(picture), sixteen))
    elif picture.mode == "P":
        picture = picture.convert("RGBA")  # PIL warns where transparent colours go straight to RGB
    return picture.convert("RGB")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turned = picture.getexif().get(ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(picture) if turned else picture
    except Exception:  # EXIF can be broken in any way, and the picture is there all the same
        return picture


def _eight_bits(values: np.ndarray, sixteen: bool) -> np.ndarray:
    """Grey values of more than 8 bits as 8 bits; 16 bits keep their upper 8, as PIL's decoders do for colour.

    The range of 32 bits is not known: [0, 1], 8 or 16 bits, by the largest value.

    Raises:
        ValueError: the values are in none of these ranges, or not finite.
    """
    low, high = float(values.min()), float(values.max())  # NaN if any value is
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"grey values from {low:g} to {high:g}: give 8 or 16 bits, or floats from 0 to 1")
    if values.dtype.kind == "f" and high <= 1:
        levels: np.ndarray = (values * 255).round().astype(np.uint8)
        return levels
    return (values // 256 if sixteen or high > 255 else values).astype(np.uint8)
