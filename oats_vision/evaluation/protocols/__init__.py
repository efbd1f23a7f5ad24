"""The protocols of evaluation, one a file; each that is registered is a command of `oats-vision eval`."""

from importlib import import_module
from pkgutil import iter_modules

from oats_vision.evaluation.protocols.base import Given, Measurement, Protocol, find_protocol, protocol, protocols
from oats_vision.evaluation.protocols.settings import LabelledPictures, OneText, OnPictures, OnText, TrainAndVal

__all__ = [
    "Given",
    "LabelledPictures",
    "Measurement",
    "OnPictures",
    "OnText",
    "OneText",
    "Protocol",
    "TrainAndVal",
    "find_protocol",
    "protocol",
    "protocols",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
