"""Library messages name arguments in backticks, `train` or `merge=True`; on the command line these are flags."""

import re
from collections.abc import Collection, Sequence
from typing import Any

# arguments of the Python API that have another name on the command line
NAMES = {"path": "out"}


def flag(name: str) -> str:
    """The flag that sets a field."""
    return f"--{name.replace('_', '-')}"


def with_flags(message: str, known: Collection[str] | None = None) -> str:
    """The message with the flags of the arguments that it names.

    Args:
        known: names of the options of the command that says it; of any command if not given. Others stay as they are.

    >>> with_flags("give `trust_remote_code=True`, or another `out`; leave `mixed_precision` out, see `models`")
    'give --trust-remote-code, or another --out; leave --mixed-precision out, see `models`'
    >>> with_flags("try `pretrained=False` or `dtype=float32`")
    'try --no-pretrained or --dtype float32'
    """
    if "`" not in message:  # of most, in less time than it takes to list the options
        return message
    options = _options() if known is None else known

    def replaced(found: re.Match[str]) -> str:
        name, value = NAMES.get(found[1], found[1]), found[2]
        if name not in options:
            return found[0]
        if value in (None, "True"):
            return flag(name)
        return flag(f"no_{name}") if value == "False" else f"{flag(name)} {value}"

    return re.sub(r"`([a-z0-9_]+)(?:=([\w.:/-]+))?`", replaced, message)


def options_of(words: Sequence[str], group: Any) -> frozenset[str] | None:
    """The names of the options of the command that these words call; None if they call none.

    Args:
        words: the command line without the program's name.
        group: of commands, as click has it.
    """
    command = group
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
        if not hasattr(command, "commands"):
            names = [one.name for one in command.params if one.param_type_name == "option"]
            return frozenset([*names, *(name.removeprefix("no_") for name in names)])
    return None


def _options() -> frozenset[str]:
    """The names of all options."""
    from oats_vision.evaluation.protocols import protocols
    from oats_vision.runs.config import RunConfig

    fields: Any = [RunConfig.model_fields, *(protocol.settings.model_fields for protocol in protocols())]
    return frozenset(name for names in fields for name in names) | {
        "config",
        "dense",
        "html",
        "images",
        "log_file",
        "new_tokens",
        "no_dense",
        "prompt",
    }
