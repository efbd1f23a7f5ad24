"""What a search judges a compressed model by: its loss against the dense model, on inputs that are for that alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from oats_vision.data.pictures import Batches
from oats_vision.data.text import Sequences
from oats_vision.display import Display
from oats_vision.errors import ConfigError, DataError
from oats_vision.evaluation.protocols import Given, LabelledPictures, find_protocol
from oats_vision.evaluation.protocols.perplexity import PerplexitySettings
from oats_vision.evaluation.protocols.settings import Settings
from oats_vision.evaluation.reference import Reference
from oats_vision.evaluation.results import Cost, Difference, Evaluation, Ratio
from oats_vision.evaluation.searched import Loss
from oats_vision.models.head import class_logits, has_head
from oats_vision.runs.config import RunConfig
from oats_vision.runs.kept import halves
from oats_vision.runs.run import PreparedRun

FEWEST = 8  # inputs that a loss is measured on
MOST_HELD_OUT = 4096
TEXT_HELD_OUT = 256  # windows, of which half are for the search
K = 20  # neighbours that vote


@dataclass(frozen=True)
class Kind:
    """A loss that `drop_of` names. words: of what is lost. labelled: it needs labels, or a text of its own."""

    words: str
    unit: str = "points"
    labelled: bool = False
    protocol: str = ""


KINDS = {
    "top1": Kind("top-1 accuracy lost", labelled=True, protocol="top1"),
    "knn": Kind("k-NN accuracy lost", labelled=True, protocol="knn"),
    "probe": Kind("accuracy of a quick linear probe lost", labelled=True, protocol="linear-probe"),
    "agreement": Kind("pictures in another class than the dense model's", "%"),
    "cosine": Kind("cosine to the dense model's features lost", "hundredths"),
    "perplexity": Kind("perplexity gained", "%", protocol="perplexity"),
    "error": Kind("relative error of the features", "%"),
}


@dataclass(frozen=True)
class Judged:
    """How a model of a search is judged.

    judge: measures the loss of a model. samples: inputs that it looks at. of: what they are.
    prepared: the run with the test data that are left; held_out: the inputs that are left of those without labels.
    """

    name: str
    judge: Callable[[nn.Module], Loss]
    samples: int
    of: str
    prepared: PreparedRun
    held_out: Batches | Sequences | None

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def final(self, evaluation: Evaluation | None, cost: Cost | None) -> tuple[Loss | None, int]:
        """The same loss as the run measured it afterwards, on inputs that the search did not see, and on how many."""
        if self.prepared.asked is not None and self.kind.protocol and evaluation and evaluation.compared:
            score = evaluation.compressed
            samples = (score and score.samples) or 0
            return of_change(evaluation.difference[evaluation.compared], samples), samples
        if cost is not None and not (self.kind.labelled):
            return of_cost(self.name, cost), cost.samples
        return None, 0


def judged_by(config: RunConfig, model: nn.Module, prepared: PreparedRun, settings: int) -> str | None:
    """The name of the loss that trials are judged by; None if there is nothing to choose from.

    Args:
        settings: how many reach a size.
    """
    if config.max_drop:
        return choose(config.drop_of, model, prepared)
    if settings < 2:
        return None
    usual = choose(None, model, prepared)
    return usual if usual in ("knn", "perplexity") else "error"  # finer than classes that change


def choose(name: str | None, model: nn.Module, prepared: PreparedRun) -> str:
    """The loss that is measured, given or by what there is: labels and a head, one of them, or none; or text.

    Raises:
        ConfigError: the one that is given needs what is not there.
    """
    labelled = prepared.asked is not None
    if prepared.task.unit == "sequences":
        possible = ["perplexity"]
    else:
        head = _has_head(model, prepared)
        with_labels = ["top1", "knn", "probe"] if head else ["knn", "probe"]
        possible = with_labels * labelled + ["agreement" if head else "cosine"]
    if name is not None and name not in possible:
        missing = " without `eval_data`" * (KINDS[name].labelled and not labelled)
        *others, last = possible
        raise ConfigError(
            f"`drop_of` {name} cannot be measured of {prepared.config.model}{missing}: "
            f"give {', '.join(others)}{' or ' * bool(others)}{last}"
        )
    return name or possible[0]


def _has_head(model: nn.Module, prepared: PreparedRun) -> bool:
    with torch.no_grad():
        output = model(prepared.task.example(model, prepared.config, prepared.reader))
    return has_head(model, output) and class_logits(model, output) is not None


def needed(name: str, limit: float) -> int | None:
    """How many inputs to hold out, half of them for the search; None for the usual number.

    For the share of pictures in another class it is as many as can show that the limit is kept if a few changed.
    """
    if name == "agreement":
        return max(2 * fewest(limit), min(4 * fewest(limit), MOST_HELD_OUT), 2 * FEWEST)
    if name == "perplexity":
        return TEXT_HELD_OUT
    return None if KINDS[name].labelled else 512


def floor(count: int) -> float:
    """The largest share, in percent, that may be lost unseen when none of so many inputs was: at 95%, of two sides.

    >>> f"{floor(1000):.2f}", fewest(0.5)
    ('0.37', 736)
    """
    return 100 * (1 - 0.025 ** (1 / count)) if count else 100.0


def fewest(limit: float) -> int:
    """The inputs that it takes for `floor` to be below a limit, in percent."""
    return 1 if limit >= 100 else math.floor(math.log(0.025) / math.log1p(-limit / 100)) + 1


def of_change(change: Difference | Ratio, samples: int) -> Loss:
    """The loss that a change of accuracy or of perplexity is.

    The paired bootstrap gives no width where nothing changed: then the interval still reaches up to `floor`.
    """
    if isinstance(change, Ratio):
        return Loss(value=100 * (change.value - 1), low=100 * (change.low - 1), high=100 * (change.high - 1))
    return Loss(value=-change.points, low=-change.high, high=max(-change.low, floor(samples)))


def of_cost(name: str, cost: Cost) -> Loss:
    """The loss without labels that a comparison with the dense model shows."""
    beginning = {
        "agreement": "same class",
        "cosine": "cosine of",
        "perplexity": "perplexity",
        "error": "relative error",
    }
    metric = next(one for one in cost.metrics if one.name.startswith(beginning[name]))
    if name == "error":
        return Loss(value=100 * metric.value, low=100 * metric.low, high=100 * metric.high)
    if name == "perplexity":
        return Loss(value=100 * (metric.value - 1), low=100 * (metric.low - 1), high=100 * (metric.high - 1))
    whole, scale = (100, 1) if name == "agreement" else (1, 100)
    value, low, high = (scale * (whole - end) for end in (metric.value, metric.high, metric.low))
    return Loss(value=value, low=low, high=high)


def judged(
    name: str, model: nn.Module, prepared: PreparedRun, held_out: Batches | Sequences | None, display: Display
) -> Judged:
    """Set inputs apart for the search, and ask the dense model about them.

    Args:
        held_out: of the calibration data; used if there are no others for this loss.

    Raises:
        DataError: there are too few of them, or too few to show that `max_drop` is kept.
    """
    if prepared.asked is not None and KINDS[name].protocol:
        return _by_protocol(name, model, prepared, held_out, display)
    if held_out is None:
        raise DataError(f"nothing is held out of {prepared.config.data or 'demo'}: give more data")
    mine, others = halves(held_out)
    return _by_reference(name, model, prepared, mine, others, display)


def _by_reference(
    name: str,
    model: nn.Module,
    prepared: PreparedRun,
    mine: Batches | Sequences,
    others: Batches | Sequences,
    display: Display,
) -> Judged:
    limit, unit = prepared.config.max_drop, prepared.task.unit
    _see_enough(name, limit, mine.total, unit)
    with display.counting("dense model, for the search", unit, mine.total) as progress:
        reference: Reference = prepared.task.reference(model, mine, prepared.transform, progress)

    def judge(compressed: nn.Module) -> Loss:
        with display.counting("compressed model, for the search", unit, reference.count) as tell:
            return of_cost(name, reference.compare(compressed, tell)[0])

    _see_enough(name, limit, reference.count, unit)  # some may not have been readable
    return Judged(name, judge, reference.count, unit, prepared, others)


def _by_protocol(
    name: str, model: nn.Module, prepared: PreparedRun, held_out: Batches | Sequences | None, display: Display
) -> Judged:
    protocol = find_protocol(KINDS[name].protocol)
    asked, mine, others = _parts(name, prepared)

    def measured(one: nn.Module, which: str) -> Any:
        return protocol.function(one, Given(asked, mine, prepared.reader, f"{which}, for the search", display))

    dense = measured(model, "dense")
    metric = next(iter(dense.compared))

    def judge(compressed: nn.Module) -> Loss:
        found = measured(compressed, "compressed")
        return of_change(found.compared[metric].beside(dense.compared[metric]), dense.samples)

    _see_enough(name, prepared.config.max_drop, dense.samples, dense.unit)
    left = replace(prepared, protocol=protocol, asked=asked, test=others)
    return Judged(name, judge, dense.samples, dense.unit, left, held_out)


Parts = tuple[Settings, Mapping[str, Any], Mapping[str, Any]]


def _parts(name: str, prepared: PreparedRun) -> Parts:
    """What the protocol is asked for, the test data of the search, and those that it does not see."""
    asked = prepared.asked
    if isinstance(asked, PerplexitySettings):
        one, other = _windows(prepared.test["data"], asked, prepared.config.seed)
        return asked.model_copy(update={"samples": None}), {"data": one}, {"data": other}
    assert isinstance(asked, LabelledPictures)
    total = prepared.test["data"].total
    if total is None:
        raise ConfigError("`eval_samples` must be given for a search on labelled pictures that are streamed")
    if total < 4 * FEWEST:
        raise DataError(f"{asked.data} has {total} labelled pictures, too few for a search: give {4 * FEWEST} or more")
    half = total // 2
    first = asked.labelled(asked.data, asked.split, half, prepared.reader, held_out=total - half)
    assert first.held_out is not None
    mine, others = (first, first.held_out) if name == "top1" else halves(first.held_out)
    _see_enough(name, prepared.config.max_drop, mine.total, "pictures")
    if name == "top1":
        return asked, {"data": mine}, {"data": others}
    features = {"train": asked.data, "val": asked.data, "train_split": asked.split, "val_split": asked.split}
    shared = {"batch_size": asked.batch_size, "seed": asked.seed % 2**32, "no_cache": True}
    own = {"quick": True} if name == "probe" else {"k": (min(K, half),)}
    settings = find_protocol(KINDS[name].protocol).settings.model_validate(features | shared | own)
    return settings, *({"train": first, "val": part, "folder": None} for part in (mine, others))


def _windows(ids: torch.Tensor, asked: PerplexitySettings, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the windows of a text, drawn by the seed, and the others; windows that do not overlap are independent."""
    length = asked.sequence_length
    windows = ids[: len(ids) // length * length].view(-1, length)[: asked.samples]
    if len(windows) < 2 * FEWEST:
        raise DataError(
            f"{asked.data} has {len(windows)} windows of {length} tokens, too few for a search: "
            f"give {2 * FEWEST}, or a smaller `sequence_length`"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    mine, others = (windows[part.sort().values].flatten() for part in order.tensor_split(2))
    return mine, others


def _see_enough(name: str, limit: float | None, count: int | None, unit: str) -> None:
    """Raises DataError where so few inputs are looked at that no loss could be shown to be below the limit.

    Args:
        count: None where it is not known before all are read.
    """
    if count is None:
        return
    if count < FEWEST:
        raise DataError(f"the search has {count} {unit} to judge by, and needs {FEWEST}: give more data")
    if limit is None or name in ("cosine", "perplexity") or floor(count) < limit:
        return
    raise DataError(
        f"`max_drop` {limit:g} cannot be shown on {count} pictures, where even no change may be one of "
        f"{floor(count):.2g}: it takes {fewest(limit)}. Give more data (half of what is held "
        "out or labelled is for the search, a quarter with k-NN and probes), fewer `samples`, or a larger `max_drop`"
    )
