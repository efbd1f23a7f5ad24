"""Where the pages of the commands may be written."""

from collections.abc import Iterable
from pathlib import Path

from oats_vision.errors import ConfigError


def see_writable(html: Path, directories: Iterable[Path]) -> None:
    """See that --html can be written, before anything is made.

    Args:
        directories: checkpoints whose files must stay.

    Raises:
        ConfigError: it is a folder or a device, lies in no folder, or is a file of a checkpoint.
    """
    if html.is_dir():
        raise ConfigError(f"--html {html} is a folder: give a file, such as {html / 'report.html'}")
    if html.exists() and not html.is_file():
        raise ConfigError(f"--html {html} is not a regular file: give another one")
    if not html.resolve().parent.is_dir():
        raise ConfigError(f"--html {html}: the folder {html.resolve().parent} does not exist")
    from oats_vision.checkpoint import CONFIG, REPORT, WEIGHTS

    for directory in directories:
        if html.resolve() in {(directory / name).resolve() for name in (CONFIG, WEIGHTS, REPORT)}:
            raise ConfigError(f"--html {html} is a file of the checkpoint: give another one")
