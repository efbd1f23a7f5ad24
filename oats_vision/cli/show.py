"""`oats-vision inspect`, `models` and `rollout`: look at checkpoints and at what can be compressed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from oats_vision.analysis import tables as report
from oats_vision.cli.common import need_directory, need_transform, notes, results
from oats_vision.cli.help import DATA, OUTPUT
from oats_vision.cli.options import Device, Directory, Json, Trust, option
from oats_vision.cli.pages import see_writable
from oats_vision.compression import methods
from oats_vision.display import Display
from oats_vision.errors import ConfigError, DataError
from oats_vision.models.adapters import families_served
from oats_vision.models.aliases import ALIASES, timm_models
from oats_vision.progress import shares

if TYPE_CHECKING:
    from torch import nn

    from oats_vision.models.transforms import Transform

INSPECT_EXAMPLES = """\
  oats-vision inspect dinov2_l_50
  oats-vision inspect dinov2_l_50 --html page.html"""
ROLLOUT_EXAMPLES = """\
  oats-vision rollout dinov2_l_50 --images pictures/ --out rollouts"""
MODELS_EXAMPLES = """\
  oats-vision models
  oats-vision models --search dinov2"""


def inspect(
    directory: Directory,
    html: Annotated[
        Path | None, option(OUTPUT, metavar="FILE", help="also write a self-contained page, such as page.html")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint: its settings, sizes, and each layer's budget and error.

    With --html one page that works offline: accuracy as far as it was evaluated, errors by block, the budget, the
    spectrum of each layer, and a table of layers that sorts.
    """
    need_directory(directory)
    if html:
        see_writable(html, [directory])
    from oats_vision import checkpoint
    from oats_vision.analysis.html_report import spectra_of, write_html

    config = checkpoint.read_config(directory)
    tensors = checkpoint.read_weights(directory, config)
    done = config.report
    sizes = checkpoint.measure(tensors.values(), done, config.storage_dtype)
    if html:
        with Display(notes).counting("spectra", "layers", len(spectra_of(done))) as progress:
            write_html(directory, html, progress)
    if as_json:
        typer.echo(
            json.dumps(config.content | {"bytes": dataclasses.asdict(sizes) | {"layer_ratio": sizes.layer_ratio}})
        )
        return
    rows = {
        "model": f"{config.source.kind} {config.source.name} (family {done.family})",
        **{name: value for name, value in done.settings.model_dump().items() if value is not None},
        "calibration": f"{done.samples} {done.unit}",
        "time": shares(done.seconds),
        **(
            {"residual stream": f"{done.slicing.sliced_width} of {done.slicing.width} dimensions"}
            if done.slicing
            else {}
        ),
        "parameters of the layers": f"{done.parameters:,} of {done.dense_parameters:,} "
        f"({done.parameters / done.dense_parameters:.1%})",
        "bytes of the layers": f"{report.megabytes(sizes.layers)} of {report.megabytes(sizes.dense_layers)} "
        f"({sizes.layer_ratio:.3f}), positions of S {report.megabytes(sizes.positions)}",
        "bytes of the model": f"{report.megabytes(sizes.total)} of {report.megabytes(sizes.dense_total)}",
    }
    console = results()
    console.print(report.key_values(str(directory), rows))
    if done.layers:
        console.print(report.layer_table(done))
    if html:
        console.print(f"Written to {html}.", soft_wrap=True)


def rollout(
    directory: Directory,
    images: Annotated[
        list[Path], option(DATA, metavar="PATH", help="a picture or a folder of pictures; may be repeated")
    ],
    out: Annotated[Path, option(OUTPUT, metavar="FOLDER", help="to write one PNG a picture to")] = Path("rollouts"),
    limit: Annotated[int, option(DATA, min=1, metavar="N", help="pictures of a folder at most")] = 16,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Show what the whole model, its sparse term alone and its low-rank term alone look at.

    Attention rollout (Abnar & Zuidema, 2020): heads averaged, the lowest 40% dropped, all blocks multiplied. For models
    that were compressed by method oats.
    """
    need_directory(directory)
    for path in images:
        if not path.exists():
            raise DataError(f"--images {path} does not exist")
    from oats_vision import checkpoint
    from oats_vision.analysis.rollout import views
    from oats_vision.machine import choose_device

    targets = _targets(_pictures(images, limit), out)
    transform = need_transform(checkpoint.load_transform(directory), str(directory))
    model = checkpoint.load(directory, device=choose_device(device), trust_remote_code=trust_remote_code)
    seen = views(model)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(f"--out {out} cannot be made: {problem}") from None
    written = 0
    with Display(notes).counting("rollout", "pictures", len(targets)) as progress:
        for done, (path, target) in enumerate(targets.items(), 1):
            written += _draw_rollout(path, target, seen, transform)
            progress(done)
    if not written:
        raise DataError(f"--images: none of {len(targets)} files could be read as a picture")
    results().print(f"{written} pictures written to {out}.", soft_wrap=True)


def _draw_rollout(path: Path, target: Path, seen: dict[str, nn.Module], transform: Transform) -> bool:
    """Draw one picture's rollouts; whether it could be read."""
    from oats_vision.analysis.rollout import draw, rollout_map
    from oats_vision.data.pictures import UNREADABLE, open_picture
    from oats_vision.models.transforms import as_seen

    try:
        picture = open_picture(path)
    except UNREADABLE as problem:
        notes.print(f"{path} is no picture and is skipped: {problem}", soft_wrap=True)
        return False
    maps = {view: rollout_map(one, transform(picture)[None])[0] for view, one in seen.items()}
    try:
        draw(as_seen(picture, transform), maps, target)
    except OSError as problem:
        raise ConfigError(f"--out: {target} cannot be written: {problem}") from None
    return True


def _pictures(images: list[Path], limit: int) -> list[Path]:
    """The files that are meant, each once."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from oats_vision.data.pictures import picture_files

    found: list[Path] = []
    for path in images:
        if path.is_dir():
            inside = picture_files(path)
            if not inside:
                raise DataError(f"--images {path} has no picture (looked for {', '.join(IMG_EXTENSIONS)})")
            found += inside[:limit]
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _targets(pictures: list[Path], out: Path) -> dict[Path, Path]:
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
            raise ConfigError(f"--out {out} would overwrite the picture {target}: give another folder")
        targets[path] = target
    return targets


def models(
    search: Annotated[
        str | None, option(DATA, metavar="WORD", help="list timm models whose name contains this")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the supported model families and the aliases."""
    found = [name for name in timm_models() if search and search in name]
    if as_json:
        typer.echo(
            json.dumps({"families": families_served(), "methods": _citations(), "aliases": ALIASES, "found": found})
        )
        return
    console = results()
    if search:
        console.print("\n".join(found) or f"no timm model with pretrained weights has {search!r} in its name")
        return
    console.print(report.key_values("families", families_served()))
    console.print(report.key_values("methods", _citations()))
    console.print(report.key_values("aliases", ALIASES | {"demo": "a ViT for Fashion-MNIST, inside the package"}))
    console.print(
        "Any timm name of these families works too (--search NAME lists them), hf:org/name, hub:entry, a path."
    )


def _citations() -> dict[str, str]:
    """The methods, and the papers that they are from."""
    return {method.name: method.citation for method in methods.known()}
