"""What was measured of a checkpoint, as its report.json says; the file is read as if anything could be in it."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError

from oats_vision.checkpoint import REPORT
from oats_vision.errors import CheckpointError
from oats_vision.evaluation.protocols import protocols
from oats_vision.evaluation.protocols.base import rank_of
from oats_vision.evaluation.results import (
    LINE,
    Cost,
    Count,
    Difference,
    Evaluation,
    Example,
    Line,
    Ratio,
    Score,
    Seconds,
)
from oats_vision.evaluation.searched import Searched
from oats_vision.evaluation.speed import Timing

log = logging.getLogger(__name__)

WHEN_COMPRESSED = ", when compressed"  # after a protocol that `compress` itself measured by


def _of_a_compressed_model(evaluation: Evaluation) -> Evaluation:
    if evaluation.compressed is None:
        raise ValueError("it is not of the compressed model")
    return evaluation


_OfACheckpoint = Annotated[Evaluation, AfterValidator(_of_a_compressed_model)]


class _Run(BaseModel):
    model: str
    eval_data: str | None = None


class _Both(BaseModel):
    """What `compress` measured, by versions that named neither the protocol nor the metric that changed."""

    dense: Score
    compressed: Score
    difference: Difference | None = None
    ratio: Ratio | None = None


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

    cost: without labels; one_shot: the same before a recovery. speed: in `dtype`, batch 1 first. examples: the pictures
    that changed most. run, machine: what was asked for and what it ran on, as far as it is plain. speed_machine: that
    the speed was measured on. seconds: of the whole run. peak_memory: bytes. search: for the rate.
    """

    evaluations: tuple[Evaluation, ...] = ()
    cost: Cost | None = None
    one_shot: Cost | None = None
    speed: tuple[Timing, ...] = ()
    advice: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()
    run: tuple[tuple[str, str], ...] = ()
    dtype: str = "float32"
    machine: tuple[tuple[str, str], ...] = ()
    speed_machine: tuple[tuple[str, str], ...] = ()
    seconds: float | None = None
    peak_memory: int | None = None
    search: Searched | None = None

    @property
    def labelled(self) -> Evaluation | None:
        """The evaluation that says most of what compression cost: of the best protocol the last one."""

        def place(evaluation: Evaluation) -> tuple[int, bool]:
            return rank_of(evaluation.protocol.removesuffix(WHEN_COMPRESSED))

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
        for name in sorted({protocol.name for protocol in protocols()} & content.keys()):
            if isinstance(content[name], dict) and "protocol" in content[name]:
                for found in one(_OfACheckpoint, content[name], name):
                    yield found.model_copy(update={"protocol": f"{found.protocol}{WHEN_COMPRESSED}"})
            elif content[name] is not None:
                for run in one(_Run, content.get("run"), name):
                    for both in one(_Both, content[name], name):
                        yield _of_an_earlier_version(name, run, both)

    times, before = known(dict, "seconds") or {}, known(dict, "one_shot") or {}
    return Measured(
        evaluations=(*when_compressed(), *each(_OfACheckpoint, "evaluations", "evaluation")),
        cost=known(Cost, "cost"),
        one_shot=next(one(Cost, before["cost"], "one_shot"), None) if "cost" in before else None,
        speed=tuple(Timing(**timing.model_dump()) for timing in each(_Timing, "speed", "speed")),
        advice=tuple(each(Line, "advice", "advice")),
        examples=tuple(each(Example, "examples", "example")),
        run=_plain(known(dict, "run")),
        dtype=str((known(dict, "run") or {}).get("dtype", "float32")),
        machine=_plain(known(dict, "machine")),
        speed_machine=_plain(known(dict, "speed_machine") or known(dict, "machine")),
        seconds=next(one(Seconds, times["command"], "seconds"), None) if "command" in times else None,
        peak_memory=known(Count, "peak_memory"),
        search=known(Searched, "search"),
    )


def _of_an_earlier_version(protocol: str, run: _Run, both: _Both) -> Evaluation:
    change = both.difference or both.ratio
    return Evaluation(
        protocol=f"{protocol}{WHEN_COMPRESSED}",
        data=run.eval_data or run.model,
        dense=both.dense,
        compressed=both.compressed,
        difference={both.compressed.names[0]: change} if change else {},
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
