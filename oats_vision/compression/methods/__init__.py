"""The methods, one a file: each module here registers its own."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

from oats_vision.compression.methods.base import BlockMethod, LinearMethod, Method
from oats_vision.errors import ConfigError

__all__ = ["BlockMethod", "LinearMethod", "Method", "find", "known", "names", "register", "unregister"]

_methods: dict[str, Method] = {}
AnyMethod = TypeVar("AnyMethod", bound=type[Method])


def register(method: AnyMethod) -> AnyMethod:
    """Make a method known, by its name: a decorator of its class.

    Raises:
        ValueError: another method has the name.
    """
    taken = _methods.get(method.name)
    if taken is not None and type(taken).__qualname__ != method.__qualname__:
        raise ValueError(f"a method named {method.name!r} is registered already")
    _methods[method.name] = method()
    return method


def unregister(name: str) -> None:
    """Forget a method."""
    _methods.pop(name, None)


def known() -> list[Method]:
    """All registered methods: OATS first, then the others by name."""
    _import_shipped()
    return sorted(_methods.values(), key=lambda method: (method.name != "oats", method.name))


def names() -> list[str]:
    """Their names."""
    return [method.name for method in known()]


def find(name: str) -> Method:
    """The method of a name.

    Raises:
        ConfigError: there is none.
    """
    _import_shipped()
    if name not in _methods:
        raise ConfigError(f"method must be one of {', '.join(names())}, got {name!r}")
    return _methods[name]


@cache
def _import_shipped() -> None:
    """Import the modules of this package, each of which registers a method."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
