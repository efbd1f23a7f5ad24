"""Modules of the user's own: nobody else can build them."""

from typing import NoReturn

from oats_vision.errors import ModelError
from oats_vision.models.loading.provider import Provider
from oats_vision.models.loading.registry import provider
from oats_vision.models.source import ModelSource


@provider
class Module(Provider):
    kind = "module"

    def builder(self, source: ModelSource, trust_remote_code: bool) -> NoReturn:
        raise ModelError(f"the checkpoint is of {source.name}: pass a module of that class as load(..., model=)")
