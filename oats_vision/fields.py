"""What the fields of a settings model take, in words: for errors, help and completion."""

import math
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from oats_vision.errors import ConfigError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)


class OneOf:
    """Marks a field that takes one of some words, which may grow: the names of a registry.

    >>> from typing import Annotated
    >>> class Settings(BaseModel):
    ...     colour: Annotated[str, OneOf(lambda: ["red", "green"])] = "red"
    >>> allowed(Settings, "colour")
    'red or green'
    """

    def __init__(self, words: Callable[[], Iterable[str]]) -> None:
        self.words = words

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def _known(self, word: str) -> str:
        if word not in self.words():
            raise PydanticCustomError("one_of", "no such word")
        return word


def validated(kind: type[Model], fields: dict[str, Any], called: Callable[[str], str] = str) -> Model:
    """Build a settings model.

    Args:
        called: what an error calls a field: its own name, or its flag.

    Raises:
        ConfigError: one line that names each field that is wrong, what it was and what is allowed.
    """
    try:
        return kind(**fields)
    except ValidationError as invalid:
        raise ConfigError(what_is_wrong(kind, invalid, called)) from None


def what_is_wrong(kind: type[BaseModel], invalid: ValidationError, called: Callable[[str], str] = str) -> str:
    """One line that names each wrong field of a settings model."""
    # one for each field: of a union there is an error for each of its types
    messages = {error["loc"][:1]: _message(kind, error, called) for error in reversed(invalid.errors())}
    return "; ".join(reversed(messages.values()))


def _message(kind: type[BaseModel], error: Any, called: Callable[[str], str]) -> str:
    """What is wrong with one field, as `NAME must be WHAT IS ALLOWED, got VALUE`."""
    message, given = error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"] == "value_error":  # of ours: begins with the name
        name, _, rest = message.partition(" ")
        return f"{called(name) if name in kind.model_fields else name} {rest}"
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"{name} is not a setting" + (
            f".{hint}"
            if (hint := did_you_mean(name, kind.model_fields))
            else f"; known: {', '.join(kind.model_fields)}"
        )
    if error["type"] == "string_type":
        return f"{called(name)} must be text (in YAML in quotes), got {given!r}"
    if error["type"] == "string_unicode":
        return f"{called(name)} must be in UTF-8, got {given!r}: rename it"
    hint = did_you_mean(given, choices(kind, name)) if isinstance(given, str) else ""
    whole = ["a whole number"] * error["type"].startswith("int_")
    shown = f"{given}" if error["type"].startswith(("greater", "less")) else repr(given)
    whole += ["a finite number"] * (error["type"] == "finite_number")
    whole += ["a name that is not empty"] * (error["type"] == "string_too_short")
    right = ", ".join([*whole, *filter(None, [allowed(kind, name)])]) or message
    return f"{called(name)} must be {right}, got {shown}{'.' * bool(hint)}{hint}"


def choices(kind: type[BaseModel], name: str) -> list[str]:
    """The words that a field takes, if it takes only certain ones."""
    for mark in kind.model_fields[name].metadata:
        if isinstance(mark, OneOf):
            return list(mark.words())
    return [word for one in kinds(kind, name) for word in one.get("enum", [one["const"]] if "const" in one else [])]


def allowed(kind: type[BaseModel], name: str) -> str:
    """The values that a field takes, in words: `in (0, 1)`, `at least 1`, `split or joint`; or none."""
    *others, last = [*filter(None, map(_range, kinds(kind, name))), *choices(kind, name)] or [""]
    return f"{', '.join(others)}{' or ' * bool(others)}{last}"


@cache
def _schemas(kind: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The JSON schemas of the fields: what pydantic itself makes of their types and ranges."""
    schemas: dict[str, dict[str, Any]] = kind.model_json_schema()["properties"]
    return schemas


def kinds(kind: type[BaseModel], name: str) -> list[dict[str, Any]]:
    """The schemas of the values that a field may have, or a list in it, besides None."""
    schema = _schemas(kind)[name]
    return [one.get("items", one) for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]


def _range(schema: dict[str, Any]) -> str:
    if schema.get("type") == "boolean":
        return "true or false"
    if schema.get("type") not in ("number", "integer"):
        return ""
    above, least = schema.get("exclusiveMinimum"), schema.get("minimum")
    below, most = schema.get("exclusiveMaximum"), schema.get("maximum")
    low, high = above if least is None else least, below if most is None else most
    if low is not None and high is not None:
        return f"in {'(' if least is None else '['}{low:.12g}, {_number(high)}{')' if most is None else ']'}"
    if low is not None:
        return f"above {low:g}" if least is None else f"at least {low:g}"
    return ""


def _number(value: float) -> str:
    """A bound, exactly: the largest ones are powers of two."""
    return f"{value:.12g}" if value < 1e12 else f"2^{math.log2(value):g}"
