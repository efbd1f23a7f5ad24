"""What the log shows of a run of the command line."""

import logging
from pathlib import Path

from rich.logging import RichHandler


def set_up(verbose: bool = False, log_file: Path | None = None) -> None:
    """Send log messages to standard error, warnings alone or all of them, and all to a file if one is given."""
    from oats_vision.cli.common import notes  # the console that progress is drawn on

    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, RichHandler)]:
        root.removeHandler(handler)
    shown = RichHandler(console=notes, show_time=False, show_path=False)
    shown.setFormatter(logging.Formatter("%(message)s"))
    shown.setLevel(logging.DEBUG if verbose else logging.WARNING)
    root.addHandler(shown)
    if log_file is not None:
        root.addHandler(logging.FileHandler(log_file))
    logging.getLogger("oats_vision").setLevel(logging.DEBUG if verbose or log_file else logging.WARNING)
