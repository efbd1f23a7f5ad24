"""The command line: parse, call, print."""

import signal
import sys
from types import FrameType
from typing import Any

from oats_vision.errors import OatsVisionError, did_you_mean


def main() -> None:
    """Run the command; an error of the user's is one line on standard error and exit status 1, or 2 of its flags."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    import typer  # from here on a signal is one line

    from oats_vision import logs
    from oats_vision.cli.commands import app

    UsageError: Any = typer.BadParameter.__base__  # of the click that typer brings
    logs.set_up()
    try:
        sys.exit(app(standalone_mode=False))
    except OatsVisionError as error:
        _fail(str(error))
    except UsageError as error:
        _fail(_usage(error), status=2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or _out_of_gpu_memory(error):
            _fail(f"out of memory: use a smaller --batch-size or another --device {' '.join(str(error).split())[:200]}")
        raise


def _fail(message: str, status: int = 1) -> None:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(status)


def _usage(error: Any) -> str:
    """What is wrong with the command's words, and where help is."""
    message = error.format_message().rstrip(".")
    if possible := getattr(error, "possibilities", None):
        message = f"No such option: {error.option_name}.{did_you_mean(error.option_name, possible)}"
    command = error.ctx.command_path if error.ctx else "oats-vision"
    return f"{message[:1].lower()}{message[1:]}{'.' * (not message.endswith('?'))} See {command} --help"


def _out_of_gpu_memory(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # what did not import it cannot fail so
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _stop(number: int, frame: FrameType | None) -> None:
    """End as an error does, so that temporary files are removed: one line, and the status that shells give it."""
    signal.signal(number, signal.SIG_DFL)  # a second one is not waited for
    sys.stderr.write(f"stopped by {signal.Signals(number).name}\n")
    raise SystemExit(128 + number)
