"""All commands of `oats-vision`, with their help."""

from collections.abc import Callable
from importlib.metadata import version
from platform import python_version
from typing import Annotated, Any

import typer

from oats_vision.cli import bench, compare, compress, doctor, evaluate, evaluate_text, show, sweep
from oats_vision.cli.help import Command, Commands


def _group(words: str, **options: Any) -> typer.Typer:
    """Commands that show their help if none of them is given."""
    return typer.Typer(cls=Commands, help=words, invoke_without_command=True, pretty_exceptions_enable=False, **options)


def _add(
    group: typer.Typer, command: Callable[..., None], name: str | None = None, examples: str | None = None
) -> None:
    group.command(name, cls=Command, epilog=examples)(command)


def _versions(wanted: bool) -> None:
    if wanted:
        typer.echo(f"oats-vision {version('oats_vision')}, Python {python_version()}, PyTorch {version('torch')}")
        raise typer.Exit


def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app = _group(
    "Compress vision transformers and language models with OATS: each linear becomes sparse plus low-rank.",
    epilog=compress.EXAMPLES,
)
evaluations = _group("Measure what compression cost: top-1, linear probe, k-NN, perplexity, tasks of language.")
evaluations.callback()(_help_without_command)
_add(app, compress.compress, examples=compress.EXAMPLES)
app.add_typer(evaluations, name="eval")
_add(evaluations, evaluate.top1, examples=evaluate.TOP1_EXAMPLES)
_add(evaluations, evaluate.linear_probe, "linear-probe", evaluate.PROBE_EXAMPLES)
_add(evaluations, evaluate.knn, examples=evaluate.KNN_EXAMPLES)
_add(evaluations, evaluate_text.perplexity, examples=evaluate_text.PERPLEXITY_EXAMPLES)
_add(evaluations, evaluate_text.lm, examples=evaluate_text.LM_EXAMPLES)
_add(app, bench.bench, examples=bench.EXAMPLES)
_add(app, show.inspect, examples=show.INSPECT_EXAMPLES)
_add(app, sweep.sweep, examples=sweep.EXAMPLES)
_add(app, compare.compare, examples=compare.EXAMPLES)
_add(app, show.rollout, examples=show.ROLLOUT_EXAMPLES)
_add(app, show.models, examples=show.MODELS_EXAMPLES)
_add(app, doctor.doctor, examples=doctor.EXAMPLES)


@app.callback()
def start(
    context: typer.Context,
    versions: Annotated[
        bool, typer.Option("--version", callback=_versions, is_eager=True, help="show the versions that matter")
    ] = False,
) -> None:
    _help_without_command(context)
