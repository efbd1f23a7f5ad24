"""What was measured of a checkpoint, as its report.json says; the file is read as if anything could be in it."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError

from oats_vision.checkpoint import REPORT
from oats_vision.errors import CheckpointError
from oats_vision.evaluation import Difference, Ratio
from oats_vision.evaluation.results import Cost, Example
from oats_vision.evaluation.speed import Timing

log = logging.getLogger(__name__)

PROTOCOLS = ("top1", "perplexity", "linear probe", "quick linear probe", "k-NN")  # the one that says most first
LINE = 1_000  # characters of a line of advice at most

Line = Annotated[str, Field(max_length=LINE)]
Count = Annotated[int, Field(ge=1, lt=1 << 48)]
Seconds = Annotated[float, Field(gt=1e-9, lt=1e9)]


class Score(BaseModel):
    """One model's figures: top-1 in percent, alone or by k or task; or a perplexity."""

    top1: FiniteFloat | dict[str, FiniteFloat] | None = None
    perplexity: FiniteFloat | None = None
    pictures: Count | None = None
    val_pictures: Count | None = None
    tokens: Count | None = None

    @property
    def values(self) -> dict[str, float]:
        """Each figure, by the name that differences have too."""
        if self.perplexity is not None:
            return {"perplexity": self.perplexity}
        if isinstance(self.top1, dict):
            return {f"k = {k}" if k.isdecimal() else k: value for k, value in self.top1.items()}
        return {} if self.top1 is None else {"top-1": self.top1}

    @property
    def metrics(self) -> dict[str, str]:
        """`values` as they are shown."""
        return {
            name: f"{value:.3f}" if name == "perplexity" else f"{value:.2f}%" for name, value in self.values.items()
        }

    @property
    def count(self) -> str:
        """How much it was measured on, if the report says so."""
        pictures = self.pictures or self.val_pictures
        if pictures:
            return f"{pictures:,} pictures"
        return f"{self.tokens:,} tokens" if self.tokens else ""


class Evaluation(BaseModel):
    """One protocol on one set of data."""

    protocol: str
    data: str | None = None  # or
    train: str | None = None
    val: str | None = None
    dense: Score | None = None
    compressed: Score
    difference: dict[str, Difference | Ratio] = {}

    @property
    def where(self) -> str:
        """The data that it was measured on."""
        return self.data or f"{self.train} → {self.val}"

    @property
    def compared(self) -> str | None:
        """The first metric of which both values and their difference are known."""
        both = self.compressed.values.keys() & (self.dense.values.keys() if self.dense else set())
        return next((metric for metric in self.difference if metric in both), None)

    def rows(self) -> list[list[str]]:
        """Protocol, data, metric, dense, compressed and change, for each metric."""
        dense = self.dense.metrics if self.dense else {}
        return [
            [self.protocol, self.where, metric, dense.get(metric, ""), value, str(self.difference.get(metric, ""))]
            for metric, value in self.compressed.metrics.items()
        ]


class _Run(BaseModel):
    model: str
    eval_data: str | None = None


class _WhenCompressed(BaseModel):
    """What `compress` itself measured, before and after."""

    dense: Score
    compressed: Score
    difference: Difference | None = None
    ratio: Ratio | None = None

    def evaluation(self, protocol: str, run: _Run) -> Evaluation:
        metric, change = ("top-1", self.difference) if protocol == "top1" else ("perplexity", self.ratio)
        return Evaluation(
            protocol=f"{protocol}, when compressed",
            data=run.eval_data or run.model,
            dense=self.dense,
            compressed=self.compressed,
            difference={metric: change} if change else {},
        )


class _Timing(BaseModel):
    """A benchmark.Timing whose times are those of a machine."""

    what: Line
    units: Count
    unit: Line
    dense: Seconds
    compressed: Seconds
    low: Seconds | None = None  # of the speedup
    high: Seconds | None = None


@dataclass(frozen=True)
class Measured:
    """What report.json says; older ones lack most of it.

    cost: without labels. speed: in `dtype`, batch 1 first. examples: the pictures that changed most. run, machine: what
    was asked for and what it ran on, as far as it is plain. seconds: of the whole run. peak_memory: bytes.
    """

    evaluations: tuple[Evaluation, ...] = ()
    cost: Cost | None = None
    speed: tuple[Timing, ...] = ()
    advice: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    run: tuple[tuple[str, str], ...] = ()
    dtype: str = "float32"
    machine: tuple[tuple[str, str], ...] = ()
    seconds: float | None = None
    peak_memory: int | None = None

    @property
    def labelled(self) -> Evaluation | None:
        """The evaluation that says most of what compression cost: of the best protocol the last one."""

        def place(evaluation: Evaluation) -> int:
            protocol = evaluation.protocol.removesuffix(", when compressed")
            return PROTOCOLS.index(protocol) if protocol in PROTOCOLS else len(PROTOCOLS)

        return min((one for one in reversed(self.evaluations) if one.compared), key=place, default=None)


def read_report(directory: Path) -> Measured:
    """What `compress` measured, and then `eval`; nothing if there is no report. What is odd is left out, and said.

    Raises:
        CheckpointError: report.json cannot be read, or is not the file that it should be.
    """
    file = directory / REPORT
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Measured()
    except (OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"{file} is damaged: {problem}") from None
    if not isinstance(content, dict) or not isinstance(content.get("evaluations", []), list):
        raise CheckpointError(f"{file} is damaged: it must be an object, and its evaluations a list")

    def one(kind: Any, value: Any, what: str) -> Iterator[Any]:
        try:
            yield TypeAdapter(kind).validate_python(value)
        except ValidationError as problem:
            log.warning("%s: %s is left out: %s", file, what, _first(problem))

    def known(kind: Any, name: str) -> Any:
        value = content.get(name)
        return None if value is None else next(one(kind, value, name), None)

    def each(kind: Any, name: str, singular: str) -> Iterator[Any]:
        for i, value in enumerate(known(list, name) or [], 1):
            yield from one(kind, value, f"{singular} {i}")

    def when_compressed() -> Iterator[Evaluation]:
        for protocol in ("top1", "perplexity"):
            if content.get(protocol) is not None:
                for run in one(_Run, content.get("run"), protocol):
                    for scores in one(_WhenCompressed, content[protocol], protocol):
                        yield scores.evaluation(protocol, run)

    times = known(dict, "seconds") or {}
    return Measured(
        evaluations=(*when_compressed(), *each(Evaluation, "evaluations", "evaluation")),
        cost=known(Cost, "cost"),
        speed=tuple(Timing(**timing.model_dump()) for timing in each(_Timing, "speed", "speed")),
        advice=tuple(each(Line, "advice", "advice")),
        examples=tuple(each(Example, "examples", "example")),
        run=_plain(known(dict, "run")),
        dtype=str((known(dict, "run") or {}).get("dtype", "float32")),
        machine=_plain(known(dict, "speed_machine") or known(dict, "machine")),
        seconds=next(one(Seconds, times["command"], "seconds"), None) if "command" in times else None,
        peak_memory=known(Count, "peak_memory"),
    )


def _plain(fields: dict[Any, Any] | None) -> tuple[tuple[str, str], ...]:
    """The settings among a report's fields that have a plain value."""
    return tuple(
        (str(name), str(value)[:LINE])
        for name, value in (fields or {}).items()
        if isinstance(value, str | int | float) and value != ""
    )


def _first(problem: ValidationError) -> str:
    error = problem.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, error['loc'])) or 'it'}: {error['msg']}"
