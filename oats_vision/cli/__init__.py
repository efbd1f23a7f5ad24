"""The command line: parse, call, print."""

import logging
import sys

import typer
from rich.logging import RichHandler

from oats_vision.cli import bench, compress, evaluate, evaluate_text, show
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
    try:
        app()
    except OatsVisionError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
