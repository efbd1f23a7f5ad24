"""What the protocols that learn from frozen features share: the features of both sets, kept in a cache."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from oats_vision.errors import ConfigError
from oats_vision.evaluation.protocols.settings import TrainAndVal

if TYPE_CHECKING:
    from torch import nn

    from oats_vision.evaluation.features import Features
    from oats_vision.evaluation.protocols.base import Given

CACHE = Path("~/.cache/oats_vision")

log = logging.getLogger(__name__)


class OnFeatures(TrainAndVal):
    """A protocol on the features of two sets of pictures."""

    seed: int = Field(42, ge=0, le=2**32 - 1, description="seed for choosing the pictures")  # as scikit-learn takes it
    cache: Path = Field(CACHE, description="folder of cached features, which are named by what they are computed from")
    no_cache: bool = Field(False, description="neither read nor write cached features")

    def folder(self) -> Path | None:
        """Where features are kept, made if need be; None, and a warning, if the usual place is not to be had.

        Raises:
            ConfigError: the folder was asked for, and cannot be made or written to.
        """
        if self.no_cache:
            return None
        try:
            folder = self.cache.expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} is not writable")
        except (OSError, RuntimeError) as problem:  # RuntimeError: no home
            if self.cache != CACHE:
                raise ConfigError(f"`cache` {self.cache} cannot be made or written to: {problem}") from None
            kept = "features are not kept, since %s cannot be used: %s (`cache` gives another folder)"
            log.warning(kept, self.cache, problem)
            return None
        return folder

    def open(self, reader: Any) -> dict[str, Any]:
        return {**super().open(reader), "folder": self.folder()}


def features_of(model: nn.Module, given: Given[Any]) -> tuple[Features, Features]:
    """The model's features of both sets; of a sliced model those of the last block alone."""
    from oats_vision.checkpoint import is_sliced
    from oats_vision.evaluation.features import cached_features

    found = []
    for name in ("train", "val"):
        batches, what = given.data[name], f"features of {name} data, {given.which}"
        with given.display.counting(what, "pictures", batches.total) as progress:
            found.append(
                cached_features(
                    model,
                    batches,
                    given.data["folder"],
                    blocks=1 if is_sliced(model) else 4,
                    mixed_precision=given.settings.autocast_dtype,
                    progress=progress,
                )
            )
    return found[0], found[1]


def details_of(features: tuple[Features, Features]) -> dict[str, Any]:
    """What is written down of the features."""
    train, val = features
    return {
        "train_pictures": len(train),
        "val_pictures": len(val),
        "skipped": train.skipped + val.skipped,
        "extraction_seconds": train.seconds + val.seconds,
    }


def lines_of(features: tuple[Features, Features]) -> dict[str, str]:
    """What a terminal shows of the features."""
    train, val = features
    seconds = train.seconds + val.seconds
    return {
        "pictures, train / val": f"{len(train)} / {len(val)}",
        "extraction": f"{seconds:.1f} s" if seconds else "cached",
    }
