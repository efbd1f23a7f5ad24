"""Which output of a model's head a class of the data is."""

import logging
import re
from collections.abc import Sequence

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from oats_vision.errors import DataError

log = logging.getLogger(__name__)


def head_index(classes: Sequence[str] | None, head: int, names: Sequence[str] | None) -> Tensor:
    """The head's output for each label of the data, (classes,), int64.

    Folders named by WordNet ids are matched with the 1,000 ImageNet classes of a head of that size, also when
    only some are there; else names are matched with the head's own, if these are known; else labels count as
    the head's positions, which needs as many classes.

    Args:
        classes: names of the data's classes by label; None if unknown.
        head: outputs of the head.
        names: of the head's classes, if known.

    Raises:
        DataError: the classes cannot be those of the head.
    """
    if classes is None:
        return torch.arange(head)
    if head == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes):
        order = {name: i for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
        strangers = [name for name in classes if name not in order]
        if strangers:
            raise DataError(f"{len(strangers)} classes are not among ImageNet's 1,000, the first one {strangers[0]}")
        return torch.tensor([order[name] for name in classes])
    if names is not None and len(names) == head:
        known = {_plain(name): i for i, name in enumerate(names)}
        if len(known) == head and all(_plain(name) in known for name in classes):
            return torch.tensor([known[_plain(name)] for name in classes])
    if len(classes) != head:
        raise DataError(f"the data has {len(classes)} classes and the model's head has {head}: labels cannot match")
    if names is not None:
        log.warning(
            "the data's classes have other names than the head's (first %r and %r): matched in order",
            classes[0],
            names[0],
        )
    return torch.arange(head)


def _plain(name: str) -> str:
    """Case and punctuation do not tell classes apart: "t-shirt/top" may be a folder "T-shirt_top"."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()
