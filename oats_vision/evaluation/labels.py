"""Which output of a model's head a class of the data is."""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from oats_vision.errors import DataError

log = logging.getLogger(__name__)


def head_index(classes: Sequence[str] | None, head: int, names: Sequence[str] | None) -> Tensor:
    """The head's output for each label of the data, (classes,), int64.

    In this order: names that the head knows; WordNet ids, where the head is of the size of one of ImageNet's sets
    of classes, also when only some are there; numbers as the head's positions; as many classes as the head has, in
    their order, which is said. Labels without names are the head's positions.

    Args:
        classes: names of the data's classes by label; None if unknown.
        head: outputs of the head.
        names: of the head's classes, if known.

    Raises:
        DataError: the classes cannot be those of the head.
    """
    if classes is None:
        return torch.arange(head)
    found = _by_name(classes, names) if names is not None and len(names) == head else None
    if found is None and all(re.fullmatch(r"n\d{8}", name) for name in classes):
        found = _by_wordnet(classes, head)
    if found is None and all(name.isdecimal() for name in classes):
        found = _by_number(classes, head)
    return torch.tensor(_in_order(classes, head) if found is None else found)


def _by_name(classes: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """By the head's names, as they are written or else but for case and punctuation; None if it knows none."""
    exact, plain = _places(names), _places(map(_plain, names))
    found = [exact.get(name) or plain.get(_plain(name), []) for name in classes]  # more than one where names repeat
    if not any(found):
        return None
    if all(len(places) == 1 for places in found):
        return [place for (place,) in found]
    # names that are missing or repeat do no harm where all others show that both have the same order
    if len(classes) == len(names) and all(not places or i in places for i, places in enumerate(found)):
        for name, places in zip(classes, found, strict=True):
            if not places:
                log.warning("the head has no class %r: matched by its place, as all others are in order", name)
        return list(range(len(names)))
    name, places = next((name, places) for name, places in zip(classes, found, strict=True) if len(places) != 1)
    what = f"is none of the head's {len(names)}" if not places else f"is the name of {len(places)} of the head's"
    raise DataError(
        f"the data's class {name!r} {what}: name it as the head does, or name all classes by the head's positions, "
        f"0 to {len(names) - 1}"
    )


def _by_wordnet(classes: Sequence[str], head: int) -> list[int] | None:
    subset = infer_imagenet_subset({"num_classes": head})
    if subset is None:
        return None
    order = {name: i for i, name in enumerate(ImageNetInfo(subset).label_names())}
    strangers = [name for name in classes if name not in order]
    if strangers:
        raise DataError(f"{len(strangers)} classes are not among ImageNet's {head:,}, the first one {strangers[0]}")
    return [order[name] for name in classes]


def _by_number(classes: Sequence[str], head: int) -> list[int] | None:
    """As the head's positions if they are that, by their size if there are as many; None if neither."""
    numbers = [int(name) for name in classes]
    if max(numbers) < head:
        if len(numbers) == head and numbers != list(range(head)):
            log.warning("classes named by numbers are the head's positions, and not in alphabetical order")
        return numbers
    if len(set(numbers)) != head:
        return None
    log.warning("the classes' numbers are not the head's positions, 0 to %d: matched in their order", head - 1)
    return [sorted(numbers).index(number) for number in numbers]


def _in_order(classes: Sequence[str], head: int) -> list[int]:
    if len(classes) != head:
        raise DataError(f"the data has {len(classes)} classes and the model's head has {head}: labels cannot match")
    order = "alphabetical order" if list(classes) == sorted(classes) else "the data's order"
    log.warning("the head knows none of the classes by name: matched in %s, %r as the first", order, classes[0])
    return list(range(head))


def _places(names: Iterable[str]) -> Mapping[str, list[int]]:
    places = defaultdict(list)
    for i, name in enumerate(names):
        places[name].append(i)
    return dict(places)


def _plain(name: str) -> str:
    """Case and punctuation do not tell classes apart: "t-shirt/top" may be a folder "T-shirt_top"."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()
