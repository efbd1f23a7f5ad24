"""A compressed model beside the dense one that it came from, of which one is in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oats_vision.errors import ConfigError, ModelError
from oats_vision.models.loading import provider_of

if TYPE_CHECKING:
    from torch import nn

    from oats_vision.models.source import ModelSource
    from oats_vision.models.transforms import Transform

log = logging.getLogger(__name__)


def check_names(model: str, dense: str | None, no_dense: bool) -> None:
    """See that names may be models', in milliseconds.

    Raises:
        ConfigError: they contradict each other.
        ModelError: one is not a model's.
    """
    if dense and no_dense:
        raise ConfigError("give either `dense` or `no_dense`")
    for given in filter(None, (model, dense)):
        provider_of(given)


class Models:
    """What is evaluated: `compressed` and `dense`, of a checkpoint; `dense` alone, of any other model.

    device: of both. directory: of the checkpoint; None if there is none. unit: of what they read, `pictures` or
    `sequences`. transform: of pictures, if it is known.
    """

    def __init__(
        self,
        model: str,
        dense: str | None = None,
        no_dense: bool = False,
        *,
        device: str = "auto",
        dtype: str = "float32",
        trust_remote_code: bool = False,
        say: Callable[[str], None] = log.info,
    ) -> None:
        """Load a dense model; of a checkpoint look at what it says.

        Args:
            model: a checkpoint's directory, or what `load_model` takes.
            dense: to compare a checkpoint with; that which it says it came from if not given.
            no_dense: compare with none.
            say: told which dense model a checkpoint says that it came from.

        Raises:
            OatsVisionError: the names contradict each other, or one is not a model's.
        """
        check_names(model, dense, no_dense)
        from oats_vision import checkpoint
        from oats_vision.machine import choose_device, dtype_of
        from oats_vision.models.families.registry import family_named
        from oats_vision.models.loading.load import load_model
        from oats_vision.models.record import structure_of

        self.name, self.device, self._say = model, choose_device(device), say
        self.options: dict[str, Any] = {
            "dtype": dtype_of(dtype),
            "device": self.device,
            "trust_remote_code": trust_remote_code,
        }
        self.directory = Path(model) if checkpoint.is_checkpoint(Path(model)) else None
        self.loaders: dict[str, Callable[[], nn.Module]] = {}
        self.transform: Transform | None
        if self.directory is None:
            if dense:
                raise ConfigError(f"`dense` is for a compressed checkpoint, and {model} is not one")
            module, self.transform = load_model(model, **self.options)
            self.unit = structure_of(module).family.unit
            self.loaders["dense"] = lambda: module
        else:
            config = checkpoint.read_config(self.directory)
            source, self.unit = config.source, family_named(config.report.family, model).unit
            self.transform = checkpoint.load_transform(self.directory)
            if not no_dense:
                self.loaders["dense"] = lambda: self._dense(source, dense)
            self.loaders["compressed"] = lambda: checkpoint.load(Path(model), **self.options)

    def _dense(self, source: ModelSource, name: str | None) -> nn.Module:
        """The dense model of a name, or the one that the checkpoint came from.

        Raises:
            OatsVisionError: it cannot be loaded, is of another architecture, or has other weights than it had.
        """
        from oats_vision.models.loading.load import load_model, source_of

        given, origin = name is not None, source.origin or {}
        if name is None:
            name = _origin(source, self.directory)
            origin_words = f"the dense model that {self.directory} was made from: {name}"
            self._say(f"{origin_words} (`dense` gives another, `no_dense` none)")
        try:
            module, _ = load_model(name, image_size=origin.get("image_size"), **self.options)
        except ModelError as problem:
            raise ModelError(f"the dense model: {problem} (give `dense`, or `no_dense`)") from None
        found = source_of(module)
        if not found.is_architecture_of(source):
            raise ConfigError(f"`dense` {name} is not a {source.name} as in {self.directory}")
        if source.dense_sha256 and found.dense_sha256 != source.dense_sha256:
            changed = f"the weights of {name} differ from those that {self.directory} was compressed from"
            if not given:
                raise ModelError(f"{changed}: they have changed since. Give `dense` the original, or `no_dense`")
            log.warning(changed)
        return module


def _origin(source: ModelSource, directory: Path | None) -> str:
    """Where a checkpoint says that its dense model is: a name, or a directory in a plain format.

    Raises:
        ConfigError: it does not say, or says a place whose code would run.
    """
    name = (source.origin or {}).get("name")
    if name is None:
        raise ConfigError(f"{directory} does not say where its dense model is: give `dense` or `no_dense`")
    if name.startswith("hub:") and Path(name[4:].rpartition(":")[0]).exists():
        raise ConfigError(f"{directory} names code in a folder as its dense model, {name}: give `dense` or `no_dense`")
    return str(name)
