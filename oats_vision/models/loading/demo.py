"""The model that ships with the package."""

from oats_vision.models.loading.directory import Directory
from oats_vision.models.loading.provider import Loaded, Provider, Wanted
from oats_vision.models.loading.registry import provider


@provider
class Demo(Provider):
    def claims(self, name: str) -> bool:
        return name == "demo"

    def load(self, name: str, wanted: Wanted) -> Loaded:
        from oats_vision.demo import DIRECTORY

        return Directory().load(str(DIRECTORY), wanted)
