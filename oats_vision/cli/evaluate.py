"""`oats-vision eval`: one command for each protocol that is registered, with its settings as options."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oats_vision import logs, ranks
from oats_vision.cli.common import messages, results
from oats_vision.cli.fields import given_fields, with_fields
from oats_vision.cli.flags import flag, with_flags
from oats_vision.cli.help import DATA, MACHINE, MEASURE, MODELS, RARE
from oats_vision.cli.options import Device, Dtype, Json, LogFile, Trust, Verbose, option, suggest
from oats_vision.display import Display
from oats_vision.evaluation.protocols import Protocol
from oats_vision.fields import validated

if TYPE_CHECKING:
    from oats_vision.runs.evaluate import Evaluated

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a compressed model, or any that `compress` takes",
        rich_help_panel=MODELS,
        autocompletion=suggest("model"),
    ),
]
Dense = Annotated[
    str | None,
    option(
        MODELS,
        metavar="MODEL",
        help="the dense model to compare with",
        show_default="the one that was compressed",
        autocompletion=suggest("model"),
    ),
]
NoDense = Annotated[bool, option(MODELS, "--no-dense", help="evaluate the compressed model alone")]
# of settings that several protocols have; those of one alone say how it measures
PANELS = {
    DATA: "data split samples train val train_split val_split train_samples val_samples seed tasks limit task_folder",
    MACHINE: "batch_size mixed_precision workers",
    RARE: "streaming cache no_cache",
}


def evaluation_command(protocol: Protocol[Any]) -> Callable[..., None]:
    """The command of a protocol."""

    def command(
        model: Model,
        dense: Dense = None,
        no_dense: NoDense = False,
        device: Device = "auto",
        dtype: Dtype = "float32",
        trust_remote_code: Trust = False,
        as_json: Json = False,
        verbose: Verbose = False,
        log_file: LogFile = None,
        **given: Any,
    ) -> None:
        logs.set_up(verbose, log_file)
        settings = validated(protocol.settings, given_fields(given), flag)
        from oats_vision.runs.evaluate import evaluate

        display = Display(messages)
        with ranks.joined(device):
            messages.quiet = not ranks.is_main()
            done = evaluate(
                protocol,
                settings,
                model,
                display,
                dense=dense,
                no_dense=no_dense,
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                say=lambda line: messages.print(with_flags(line), soft_wrap=True),
            )
            if ranks.is_main():
                _show(done, model, as_json)
                done.keep(display)  # last: a damaged report must not lose what was measured

    command.__doc__ = with_flags(protocol.words)
    command.__name__ = protocol.name
    return with_fields(protocol.settings, _panels(protocol))(command)


def _panels(protocol: Protocol[Any]) -> dict[str, str]:
    """The fields of the protocol's settings, by panel."""
    fields = protocol.settings.model_fields
    shared = {panel: [name for name in names.split() if name in fields] for panel, names in PANELS.items()}
    own = [name for name in fields if not any(name in names for names in shared.values())]
    return {panel: " ".join(names) for panel, names in {**shared, MEASURE: own}.items()}


def _show(done: Evaluated, model: str, as_json: bool) -> None:
    """The scores and their differences, as a table or as JSON."""
    if as_json:
        typer.echo(json.dumps(done.evaluation.to_dict()))
        return
    from oats_vision.analysis.tables import models_table

    evaluation = done.evaluation
    changes = {metric: str(change) for metric, change in evaluation.difference.items()}
    title = f"{evaluation.protocol} of {model} on {evaluation.where}"
    results().print(models_table(title, list(evaluation.scores), done.rows(), changes))
