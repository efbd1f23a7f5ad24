"""The options of the commands: those of RunConfig's fields, and those that several commands share."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from oats_vision.cli.flags import flag, with_flags
from oats_vision.cli.help import (
    CALIBRATION,
    EVALUATION,
    EXPERTS,
    GRID,
    HOW_MUCH,
    MACHINE,
    MODELS,
    OUTPUT,
    RARE,
    WHAT,
    Facts,
)
from oats_vision.compression.settings import PATTERNS
from oats_vision.fields import allowed, choices, validated
from oats_vision.models.aliases import known_models
from oats_vision.runs.config import DEVICES, KNOWN_DATA, RunConfig

Command = Callable[..., None]

# RunConfig's fields by panel, in the order of the help, and what stands for a value
SETTINGS = {
    WHAT: {"model": "MODEL", "skip": "NAME", "image_size": "PIXELS", "pretrained": ""},
    HOW_MUCH: {
        "rate": "X",
        "max_drop": "POINTS",
        "target_mb": "MB",
        "rank_ratio": "X",
        "budget": "NAME",
        "method": "METHOD",
        "pattern": "PATTERN",
        "quality": "QUALITY",
        "bits": "X",
        "values": "FORMAT",
        "density": "X",
        "targets": "",
        "recover": "STEPS",
    },
    CALIBRATION: {"data": "DATA", "samples": "N", "sequence_length": "N", "split": "SPLIT", "seed": "N"},
    EVALUATION: {"eval": "", "eval_data": "DATA", "eval_split": "SPLIT", "eval_samples": "N", "drop_of": "WHAT"},
    OUTPUT: {
        "out": "FOLDER",
        "overwrite": "",
        "restart": "",
        "storage_dtype": "DTYPE",
        "merge": "",
        "report": "",
        "tensorboard": "FOLDER",
        "dry_run": "",
    },
    MACHINE: {
        "device": "DEVICE",
        "dtype": "DTYPE",
        "batch_size": "N",
        "workers": "N",
        "activation_memory": "GB",
        "low_memory": "",
    },
    EXPERTS: {
        "refit": "",
        "joint": "",
        "sensitivity": "",
        "scaling": "NAME",
        "solver": "NAME",
        "iterations": "N",
        "tolerance": "X",
        "fused_qkv": "NAME",
        "group_size": "N",
        "symmetric": "",
        "act_order": "",
        "factors": "NAME",
        "error_tolerance": "X",
        "latency_tokens": "N",
        "on_bad_layer": "WHAT",
    },
    RARE: {"streaming": "", "trust_remote_code": ""},
}
# and of them those of a sweep; the grid's may be given several times
SWEEP = {
    WHAT: SETTINGS[WHAT],
    GRID: {name: SETTINGS[HOW_MUCH][name] for name in ("rate", "bits", "rank_ratio", "method", "pattern")},
    HOW_MUCH: {name: SETTINGS[HOW_MUCH][name] for name in ("values", "density", "budget", "quality", "targets")},
    CALIBRATION: SETTINGS[CALIBRATION],
    EVALUATION: {name: metavar for name, metavar in SETTINGS[EVALUATION].items() if name != "drop_of"},
    OUTPUT: {"storage_dtype": "DTYPE", "dry_run": ""},
    MACHINE: {name: metavar for name, metavar in SETTINGS[MACHINE].items() if name != "low_memory"},
    EXPERTS: SETTINGS[EXPERTS],
    RARE: SETTINGS[RARE],
}
# what flags do that switch off what is on
WITHOUT = {
    "eval": "do not measure what it cost",
    "report": "do not write report.html",
    "pretrained": "random weights, to try a run",
    "symmetric": "with values: a zero of its own for each group, for a byte more",
}
SUGGESTIONS: dict[str, Callable[[], list[str]]] = {
    "model": known_models,
    "data": lambda: list(KNOWN_DATA),
    "eval_data": lambda: list(KNOWN_DATA),
    "pattern": lambda: list(PATTERNS),
    "device": lambda: list(DEVICES),
}


def suggest(name: str) -> Callable[[str], list[str]]:
    """What a shell completes the beginning of a field's value to."""

    def complete(incomplete: str) -> list[str]:
        known = SUGGESTIONS.get(name, lambda: choices(RunConfig, name))()
        return [word for word in known if word.startswith(incomplete)]

    return complete


def suggest_words(known: list[str]) -> Callable[[str], list[str]]:
    """What a shell completes the beginning of one of these words to."""
    return lambda incomplete: [word for word in known if word.startswith(incomplete)]


def setting(name: str, panel: str, metavar: str) -> Any:
    """The type and the option of a field of RunConfig in a command; RunConfig parses and checks the value."""
    field = RunConfig.model_fields[name]
    words, default = _words_of(name)
    if not metavar:
        shown = flag(name) if field.default is False else flag(f"no_{name}") if field.default else flag(f"[no_]{name}")
        facts = Facts(lambda: f"default: {default}" if field.default is None else "")
        flags = f"{flag(name)}/{flag(f'no_{name}')}"
        return Annotated[
            bool | None, option(panel, flags, metavar=shown, help=WITHOUT.get(name, words), show_default=facts)
        ]
    facts = Facts(lambda: "; ".join(filter(None, [allowed(RunConfig, name), f"default: {default}" * bool(default)])))
    details = {"metavar": metavar, "help": words, "show_default": facts, "autocompletion": suggest(name)}
    several = panel == GRID or field.annotation == tuple[str, ...]
    return Annotated[list[str] | None if several else str | None, option(panel, flag(name), **details)]


def _words_of(name: str) -> tuple[str, str]:
    """A field's description, and its default: what the description says, if that depends on something."""
    field = RunConfig.model_fields[name]
    words, _, default = with_flags(str(field.description)).partition(" [default: ")
    if default or field.default in (None, ()):
        return words, default.rstrip("]")
    return words, f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def with_settings(panels: Mapping[str, Mapping[str, str]] = SETTINGS) -> Callable[[Command], Command]:
    """Give a command an option for these fields of RunConfig; it finds them in its `**settings`, None if not given."""

    def add(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters
        settings = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for panel, fields in panels.items()
            for name, metavar in fields.items()
            for annotation in [setting(name, panel, metavar)]
        ]
        *kept, _ = map(keyword_only, own.values())
        return with_parameters(command, [*settings, *kept])

    return add


def keyword_only(parameter: inspect.Parameter) -> inspect.Parameter:
    """The parameter, given by name alone."""
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


def with_parameters(command: Command, parameters: Sequence[inspect.Parameter]) -> Command:
    """Let a command have these parameters in the eyes of typer, which makes its options of them."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def checked(name: str, panel: str, metavar: str, words: str) -> Any:
    """An option that takes what a field of RunConfig takes, under any flag and with any default."""

    def check(option: typer.CallbackParam, value: str | None) -> Any:
        if value is None:
            return None
        return getattr(validated(RunConfig, {name: value}, lambda _: str(option.opts[0])), name)

    known = f": {allowed(RunConfig, name)}" * bool(choices(RunConfig, name))
    return typer.Option(
        help=f"{words}{known}", metavar=metavar, rich_help_panel=panel, callback=check, autocompletion=suggest(name)
    )


def option(panel: str, *flags: str, **details: Any) -> Any:
    """An option in a panel."""
    return typer.Option(*flags, rich_help_panel=panel, **details)


Directory = Annotated[Path, typer.Argument(metavar="DIRECTORY", help="a compressed model", rich_help_panel=MODELS)]
Device = Annotated[str, checked("device", MACHINE, "DEVICE", "auto (CUDA if available), cpu, cuda:1, ...")]
Dtype = Annotated[str, checked("dtype", MACHINE, "DTYPE", "precision of weights and arithmetic")]
Trust = Annotated[bool, option(RARE, "--trust-remote-code", help="run model code from a hub")]
Json = Annotated[bool, option(OUTPUT, "--json", help="print one JSON object to standard output, nothing else")]
Verbose = Annotated[bool, option(OUTPUT, "--verbose", "-v", help="say more, and show the warnings of other libraries")]
LogFile = Annotated[Path | None, option(OUTPUT, metavar="FILE", help="write all messages to this file")]
