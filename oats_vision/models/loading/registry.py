"""The providers that are known, by the names that they claim and by the kinds of source that they rebuild."""

from typing import TypeVar

from oats_vision.models.aliases import unknown_model
from oats_vision.models.loading.provider import Provider

Kind = TypeVar("Kind", bound=type[Provider])
_providers: list[Provider] = []


def provider(kind: Kind) -> Kind:
    """Make a provider known, as a decorator on its class; they are asked in the order of their registration."""
    _providers.append(kind())
    return kind


def providers() -> list[Provider]:
    return list(_providers)


def provider_of(name: str) -> Provider:
    """The provider of the model of that name.

    Raises:
        ModelError: it is not a model's, as far as can be said in milliseconds.
    """
    for found in _providers:
        if found.claims(name):
            return found
    raise unknown_model(name)


def provider_for(kind: str) -> Provider:
    """The provider that rebuilds sources of a kind."""
    return next(found for found in _providers if found.kind == kind)
