"""What a protocol of evaluation is, and the registry of all of them; light, since the command line reads it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from typing import Protocol as Interface

from oats_vision.display import Display
from oats_vision.errors import ConfigError
from oats_vision.evaluation.protocols.settings import Settings
from oats_vision.evaluation.results import Difference, Figure, Ratio, Score

if TYPE_CHECKING:
    from torch import Tensor, nn

# of every command of `oats-vision eval`, besides those of its protocol's settings
OPTIONS = {"model", "dense", "no_dense", "device", "dtype", "trust_remote_code", "verbose", "log_file", "help"}
OPTIONS |= {"json", "as_json"}  # the option, and what Python calls it
S = TypeVar("S", bound=Settings)


class Comparable(Interface):
    """What one model reached on each sample, such as an `Accuracy` or a `Perplexity`."""

    def figure(self, name: str) -> Figure:
        """The value of the whole, under a metric's name."""

    def beside(self, dense: Any) -> Difference | Ratio:
        """The change from what the dense model reached on the same samples."""


@dataclass(frozen=True)
class Given(Generic[S]):
    """What a protocol is given beside the model.

    data: what the settings opened, by the name of each source. reader: the model's transform of pictures, or its
    tokenizer. which: of the two models it is, in words. display: for progress. On labelled pictures, `classified` runs
    the model as `eval top1` does.
    """

    settings: S
    data: Mapping[str, Any]
    reader: Any = None
    which: str = "model"
    display: Display = field(default_factory=Display)

    def classified(self, model: nn.Module, source: str = "data") -> Iterator[tuple[Tensor, Tensor]]:
        """What a classifier says of labelled pictures, with progress; in any dtype, on any device.

        Args:
            source: name of the pictures in `data`.

        Yields:
            For each batch the logits (batch, classes), float32, and which of the classes is right (batch,), int64: the
            head's, with which the data's are matched by name. Both on the CPU.

        Raises:
            ModelError: the model has no classification head, or its logits are not finite.
            DataError: the labels are not those of the head, or no picture could be read.
        """
        from oats_vision.evaluation.top1 import classified

        batches = self.data[source]
        precision = getattr(self.settings, "autocast_dtype", None)
        with self.display.counting(f"pictures, {self.which}", "pictures", batches.total) as progress:
            for logits, labels in classified(model, batches, progress, mixed_precision=precision):
                yield logits.cpu(), labels.cpu()


@dataclass(frozen=True)
class Measurement:
    """What a protocol found of one model.

    compared: by metric, the one that says most first; the difference of two models is told from these. figures: others.
    samples: that it was measured on, in `unit`. details: fields of the JSON beside the metrics. lines: of the table in
    a terminal, beside the metrics.
    """

    compared: Mapping[str, Comparable]
    samples: int
    unit: str = "pictures"
    figures: Sequence[Figure] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, str] = field(default_factory=dict)

    def score(self) -> Score:
        """As it is written down."""
        metrics = [one.figure(name) for name, one in self.compared.items()]
        return Score(metrics=[*metrics, *self.figures], samples=self.samples, unit=self.unit, **self.details)


@dataclass(frozen=True)
class Protocol(Generic[S]):
    """A way to measure a model.

    name: of the command. title: in tables, pages and JSON. settings: what it needs, with defaults and ranges, and
    which data. rank: among those of the same task, 1 for the one that says most of what compression cost.
    """

    name: str
    title: str
    settings: type[S]
    function: Callable[[nn.Module, Given[S]], Measurement]
    rank: int
    examples: str

    @property
    def words(self) -> str:
        """What it is, for its help."""
        return inspect.getdoc(self.function) or self.title


_protocols: dict[str, Protocol[Any]] = {}


def protocol(
    name: str, settings: type[S], *, title: str = "", rank: int = 100, examples: str = ""
) -> Callable[[Callable[[nn.Module, Given[S]], Measurement]], Callable[[nn.Module, Given[S]], Measurement]]:
    """Register a function (model, given) -> measurement as a protocol; its docstring is the help of its command.

    Args:
        name: of the command.
        settings: a subclass of `LabelledPictures`, `TrainAndVal`, `OneText`, `OnPictures` or `OnText`; its fields are
            the command's options, and what it inherits says which data are opened.
        title: in tables, pages and JSON; the name if not given.
        rank: 1 if no other says more of what compression cost.
        examples: commands, for the help.

    A function that is defined again, as by a notebook's cell that is run again, takes the place of the earlier one.

    Raises:
        ValueError: another protocol has the name, or every command has an option named as one of the settings.
    """
    if taken := OPTIONS & settings.model_fields.keys():
        raise ValueError(
            f"{settings.__qualname__}.{min(taken)} is an option of every command: give the setting another name"
        )

    def register(function: Callable[[nn.Module, Given[S]], Measurement]) -> Callable[..., Measurement]:
        if name in _protocols and _defined_in(_protocols[name].function) != _defined_in(function):
            raise ValueError(f"a protocol named {name!r} is registered already")
        _protocols[name] = Protocol(name, title or name, settings, function, rank, examples)
        return function

    return register


def _defined_in(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def protocols() -> list[Protocol[Any]]:
    """All registered protocols, those that say most first."""
    return sorted(_protocols.values(), key=lambda one: one.rank)


def find_protocol(name: str) -> Protocol[Any]:
    """The protocol of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _protocols:
        known = ", ".join(one.name for one in protocols())
        raise ConfigError(f"protocol must be one of {known}, got {name!r}")
    return _protocols[name]


def rank_of(title: str) -> tuple[int, bool]:
    """How early a protocol comes, by its title as it is written down; a variant such as `quick ...` comes after it."""
    ranks = {one.title: one.rank for one in protocols()}
    if title in ranks:
        return ranks[title], False
    return ranks.get(title.partition(" ")[2], 1000), True
