"""Rollouts of many pictures, drawn into a folder."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from oats_vision import checkpoint
from oats_vision.analysis.rollout import draw, rollout_map, views
from oats_vision.data.pictures import UNREADABLE, open_picture, picture_files
from oats_vision.display import Display
from oats_vision.errors import ConfigError, DataError, ModelError
from oats_vision.evaluation.evaluate import READ
from oats_vision.evaluation.tasks import task_of_unit
from oats_vision.machine import choose_device
from oats_vision.models.families.registry import family_named
from oats_vision.models.transforms import Transform, as_seen

log = logging.getLogger(__name__)


def draw_rollouts(
    directory: Path,
    images: Sequence[Path],
    out: Path,
    display: Display,
    *,
    limit: int = 16,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> int:
    """Draw what the whole model, its sparse and its low-rank term attend to: one PNG per picture that can be read.

    Args:
        directory: a checkpoint whose layers have both terms.
        images: pictures, and folders of pictures.
        out: folder to write to, made if need be.
        limit: pictures of a folder at most.

    Returns:
        How many were drawn.

    Raises:
        OatsVisionError: the checkpoint cannot be used, there is no picture, or the folder cannot be written.
    """
    if (unit := family_named(checkpoint.read_config(directory).report.family, str(directory)).unit) != "pictures":
        raise ModelError(f"rollouts are of models that read pictures, and {directory} reads {READ[unit]}")
    targets = _targets(_pictures(images, limit), out)
    transform = task_of_unit("pictures").reader(str(directory), checkpoint.load_transform(directory))
    model = checkpoint.load(directory, device=choose_device(device), trust_remote_code=trust_remote_code)
    seen = views(model)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"`out` {out} cannot be made: {problem}") from None
    written = 0
    with display.counting("rollout", "pictures", len(targets)) as progress:
        for done, (path, target) in enumerate(targets.items(), 1):
            written += _draw(path, target, seen, transform)
            progress(done)
    if not written:
        raise DataError(f"`images`: none of {len(targets)} files could be read as a picture")
    return written


def _draw(path: Path, target: Path, seen: dict[str, nn.Module], transform: Transform) -> bool:
    """Draw one picture's rollouts; whether it could be read."""
    try:
        picture = open_picture(path)
    except UNREADABLE as problem:
        log.warning("%s is not a picture and is skipped: %s", path, problem)
        return False
    maps = {view: rollout_map(one, transform(picture)[None])[0] for view, one in seen.items()}
    try:
        draw(as_seen(picture, transform), maps, target)
    except OSError as problem:
        raise ConfigError(f"`out`: {target} cannot be written: {problem}") from None
    return True


def _pictures(images: Sequence[Path], limit: int) -> list[Path]:
    """The files that are meant, each once."""
    found: list[Path] = []
    for path in images:
        if path.is_dir():
            inside = picture_files(path)
            if not inside:
                raise DataError(f"`images` {path} has no picture (looked for {', '.join(IMG_EXTENSIONS)})")
            found += inside[:limit]
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _targets(pictures: Sequence[Path], out: Path) -> dict[Path, Path]:
    """The PNG to write for each picture, no two alike.

    Raises:
        ConfigError: one would take the place of a picture that is read.
    """
    targets: dict[Path, Path] = {}
    sources = {path.resolve() for path in pictures}
    for i, path in enumerate(pictures, 1):
        target = out / f"{path.stem}.png"
        if target in targets.values():  # of another folder
            target = out / f"{path.resolve().parent.name}_{path.stem}_{i}.png"
        if target.resolve() in sources:
            raise ConfigError(f"`out` {out} would overwrite the picture {target}: give another folder")
        targets[path] = target
    return targets
