"""The command line: parse, call, print."""

from oats_vision.cli.interrupt import guarded


def main() -> None:
    """Run the command, and exit with its status; from here on a signal is one line."""
    guarded(_run)


def _run() -> None:
    from oats_vision.cli import ending
    from oats_vision.cli.commands import app

    ending.run(lambda: app(standalone_mode=False))
