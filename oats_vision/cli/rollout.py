"""`oats-vision rollout`: what the terms of a compressed model attend to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from oats_vision.cli.common import messages, need_directory, results
from oats_vision.cli.help import DATA, OUTPUT
from oats_vision.cli.options import Device, Directory, Trust, option
from oats_vision.display import Display
from oats_vision.errors import DataError
from oats_vision.files import at_home

EXAMPLES = """\
  oats-vision rollout dinov2_l_50 --images pictures/ --out rollouts"""


def rollout(
    directory: Directory,
    images: Annotated[
        list[Path], option(DATA, metavar="PATH", help="a picture or a folder of pictures; may be repeated")
    ],
    out: Annotated[Path, option(OUTPUT, metavar="FOLDER", help="folder to write one PNG per picture to")] = Path(
        "rollouts"
    ),
    limit: Annotated[int, option(DATA, min=1, metavar="N", help="pictures of a folder, at most")] = 16,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Show what the whole model, its sparse term alone and its low-rank term alone attend to.

    Attention rollout (Abnar & Zuidema, 2020): heads averaged, the lowest 40% dropped, all blocks multiplied. For models
    that were compressed by method oats.
    """
    need_directory(directory)
    for path in images:
        if not path.exists():
            raise DataError(f"--images {path} does not exist")
    from oats_vision.analysis.rollouts import draw_rollouts

    out = at_home(out)
    written = draw_rollouts(
        directory, images, out, Display(messages), limit=limit, device=device, trust_remote_code=trust_remote_code
    )
    results().print(f"{written} pictures written to {out}.", soft_wrap=True)
