"""Library messages name arguments in backticks, `train` or `merge=True`; on the command line these are flags."""

import re
from typing import Any

# arguments of the Python API that have another name on the command line
NAMES = {"path": "out"}


def flag(name: str) -> str:
    """The flag that sets a field."""
    return f"--{name.replace('_', '-')}"


def with_flags(message: str) -> str:
    """The message with the flags of the arguments that it names.

    >>> with_flags("give `trust_remote_code=True`, or another `out`; leave `mixed_precision` out, see `models`")
    'give --trust-remote-code, or another --out; leave --mixed-precision out, see `models`'
    >>> with_flags("try `pretrained=False` or `dtype=float32`")
    'try --no-pretrained or --dtype float32'
    """
    return re.sub(r"`([a-z0-9_]+)(?:=([\w.:/-]+))?`", _flag, message)


def _flag(found: re.Match[str]) -> str:
    name, value = NAMES.get(found[1], found[1]), found[2]
    if name not in _options():
        return found[0]
    if value in (None, "True"):
        return flag(name)
    return flag(f"no_{name}") if value == "False" else f"{flag(name)} {value}"


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
