"""Options that are made of the fields of settings; pydantic parses and checks their values."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, get_origin

from pydantic import BaseModel

from oats_vision.cli.flags import flag, with_flags
from oats_vision.cli.help import Facts
from oats_vision.cli.options import Command, keyword_only, option, suggest_words, with_parameters
from oats_vision.fields import allowed, choices, kinds
from oats_vision.runs.config import KNOWN_DATA

# what stands for a value, where neither the field's name nor its type says it
METAVARS = {"data": "DATA", "train": "DATA", "val": "DATA", "tasks": "TASK"}
OF_TYPE = {"integer": "N", "number": "X", "path": "FOLDER"}


def field_option(kind: type[BaseModel], name: str, panel: str) -> inspect.Parameter:
    """A command's parameter for a field: text that is not parsed yet, None if it is not given; or a switch."""
    field = kind.model_fields[name]
    words, _, default = str(field.description or "").partition(" [default: ")
    if field.annotation is bool:
        annotation: Any = Annotated[bool | None, option(panel, flag(name), metavar=flag(name), help=with_flags(words))]
    else:
        shown = with_flags(default.rstrip("]")) or _shown(field.default)
        several = get_origin(field.annotation) is tuple
        required = field.is_required()
        known = list(KNOWN_DATA) if METAVARS.get(name) == "DATA" else choices(kind, name)
        details: dict[str, Any] = {
            "metavar": _metavar(kind, name),
            "help": with_flags(words),
            "show_default": Facts(partial(_facts, kind, name, shown)),
            "autocompletion": suggest_words(known),
        }
        text: Any = list[str] if several else str
        annotation = Annotated[text if required else text | None, option(panel, flag(name), **details)]
    empty = inspect.Parameter.empty if field.is_required() else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=empty, annotation=annotation)


def with_fields(kind: type[BaseModel], panels: Mapping[str, str]) -> Callable[[Command], Command]:
    """Give a command, after its argument, an option for each of these fields; it finds them in its `**given`.

    Args:
        panels: names of fields, apart by spaces, by the panel of the help.
    """
    options = [field_option(kind, name, panel) for panel, names in panels.items() for name in names.split()]

    def add(command: Command) -> Command:
        first, *others, _ = inspect.signature(command, eval_str=True).parameters.values()
        return with_parameters(command, [first, *options, *map(keyword_only, others)])

    return add


def _facts(kind: type[BaseModel], name: str, default: str) -> str:
    """The values that a field takes, and its default; or that it must be given."""
    required = kind.model_fields[name].is_required()
    facts = ["required"] if required else [allowed(kind, name), f"default: {default}" * bool(default)]
    return "; ".join(filter(None, facts))


def given_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """What was given of a command's options."""
    return {name: value for name, value in options.items() if value is not None and value != []}


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    if default is None or not isinstance(default, int | float):
        return "" if default is None or callable(default) else str(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _metavar(kind: type[BaseModel], name: str) -> str:
    """`N`, `X`, `DTYPE`, `FOLDER`, ...: by the name, by the type, or the last word of the name."""
    if name in METAVARS:
        return METAVARS[name]
    first = kinds(kind, name)[0]
    first = next(iter(first.get("prefixItems", [])), first)
    if choices(kind, name) and name.endswith("precision"):
        return "DTYPE"
    found = OF_TYPE.get(first.get("format", first.get("type", "")))
    return found or name.rpartition("_")[2].upper()
