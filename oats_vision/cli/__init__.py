"""The command line: parse, call, print."""

import logging
import signal
import sys
from types import FrameType

import torch
import typer
from rich.logging import RichHandler

from oats_vision.cli import bench, compare, compress, evaluate, evaluate_text, show, sweep
from oats_vision.cli.common import notes
from oats_vision.errors import OatsVisionError

app = typer.Typer(
    help="Compress vision transformers and language models with OATS: each linear becomes sparse plus low-rank.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command()(compress.compress)
app.command()(bench.bench)
app.command()(show.inspect)
app.command()(sweep.sweep)
app.command()(compare.compare)
app.command()(show.rollout)
app.command()(show.models)
evaluations = typer.Typer(help="Measure what compression cost, dense against compressed.", no_args_is_help=True)
evaluations.command("top1")(evaluate.top1)
evaluations.command("linear-probe")(evaluate.linear_probe)
evaluations.command("knn")(evaluate.knn)
evaluations.command("perplexity")(evaluate_text.perplexity)
evaluations.command("lm")(evaluate_text.lm)
app.add_typer(evaluations, name="eval")


def main() -> None:
    """Run the command; an error of the user's is one line on standard error and exit status 1."""
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=notes, show_time=False, show_path=False)])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        app()
    except OatsVisionError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        typer.echo(f"error: out of memory: use a smaller --batch-size or another --device {reason}", err=True)
        sys.exit(1)


def _stop(number: int, frame: FrameType | None) -> None:
    """End as an error does, so that temporary files are removed: one line, and the status that shells give it."""
    signal.signal(number, signal.SIG_DFL)  # a second one is not waited for
    typer.echo(f"stopped by {signal.Signals(number).name}", err=True)
    raise SystemExit(128 + number)
