"""The model families that are known: those that ship with the package, and those that a user registers."""

from typing import TypeVar

from oats_vision.errors import CheckpointError
from oats_vision.models.families.base import Family

Kind = TypeVar("Kind", bound=type[Family])
_shipped: list[Family] = []
_registered: list[Family] = []


def register_family(kind: Kind) -> Kind:
    """Make a model family known, as a decorator on its class; one that is registered later is asked first.

    A class that is defined again, as by a notebook's cell that is run again, takes the place of the earlier one.

    Raises:
        TypeError: the class lacks something that a family must say.
        ValueError: another family has the name.
    """
    family = _checked(kind)
    _registered[:] = [family, *(known for known in _registered if known.name != family.name)]
    return kind


def shipped(kind: Kind) -> Kind:
    """Register a family of the package's own; these are asked in their order."""
    _shipped.append(_checked(kind))
    return kind


def families() -> list[Family]:
    """All known families, in the order in which they are asked."""
    return [*_registered, *_shipped]


def families_served() -> dict[str, str]:
    """The families' names, and the models that each is for, in words."""
    return {family.name: family.serves for family in families()}


def is_shipped(family: Family) -> bool:
    """Whether a family is one of the package's own."""
    return family in _shipped


def family_named(name: str, what: str) -> Family:
    """The family of that name, which `what` needs.

    Raises:
        CheckpointError: there is none.
    """
    for family in families():
        if family.name == name:
            return family
    raise CheckpointError(f"{what} needs the model family {name!r}: register it first")


def _checked(kind: type[Family]) -> Family:
    for field in ("name", "serves"):
        if not isinstance(getattr(kind, field, None), str):
            raise TypeError(f"{kind.__qualname__} must have a {field}, a string")
    family = kind()
    taken = next((known for known in families() if known.name == family.name), None)
    if taken and (is_shipped(taken) or _defined_in(type(taken)) != _defined_in(kind)):
        raise ValueError(f"a model family named {family.name!r} is registered already")
    return family


def _defined_in(kind: type[Family]) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__
