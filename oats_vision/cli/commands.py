"""All commands of `oats-vision`, with their help."""

from collections.abc import Callable
from importlib.metadata import version
from platform import python_version
from typing import Annotated, Any

import typer

from oats_vision.cli import bench, compare, compress, doctor, inspect, models, rollout, sweep
from oats_vision.cli.evaluate import evaluation_command
from oats_vision.cli.help import Command, Commands
from oats_vision.evaluation.protocols import protocols


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


def build() -> typer.Typer:
    """`oats-vision`, with an evaluation for each protocol that is registered by now."""
    app = _group(
        "Compress vision transformers and language models with OATS: each linear becomes sparse plus low-rank.",
        epilog=compress.EXAMPLES,
    )
    app.callback()(_start)
    _add(app, compress.compress, examples=compress.EXAMPLES)
    evaluations = _group("Measure what compression cost: top-1, linear probe, k-NN, perplexity, language tasks.")
    evaluations.callback()(_help_without_command)
    for protocol in sorted(protocols(), key=lambda one: one.settings.unit):  # pictures before sequences of text
        _add(evaluations, evaluation_command(protocol), protocol.name, protocol.examples or None)
    app.add_typer(evaluations, name="eval")
    _add(app, bench.bench, examples=bench.EXAMPLES)
    _add(app, inspect.inspect, examples=inspect.EXAMPLES)
    _add(app, sweep.sweep, examples=sweep.EXAMPLES)
    _add(app, compare.compare, examples=compare.EXAMPLES)
    _add(app, rollout.rollout, examples=rollout.EXAMPLES)
    _add(app, models.models, examples=models.EXAMPLES)
    _add(app, doctor.doctor, examples=doctor.EXAMPLES)
    return app


def _start(
    context: typer.Context,
    versions: Annotated[
        bool, typer.Option("--version", callback=_versions, is_eager=True, help="show the versions that matter")
    ] = False,
) -> None:
    _help_without_command(context)


app = build()
