"""What was measured of a checkpoint, as its report.json says; the file is read as if anything could be in it."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError

from oats_vision.checkpoint import REPORT
from oats_vision.errors import CheckpointError
from oats_vision.evaluation import Difference, Ratio

log = logging.getLogger(__name__)


class Score(BaseModel):
    """One model's figures: top-1 in percent, alone or by k or task; or a perplexity."""

    top1: FiniteFloat | dict[str, FiniteFloat] | None = None
    perplexity: FiniteFloat | None = None

    @property
    def metrics(self) -> dict[str, str]:
        """Each figure as it is shown, by the name that differences have too."""
        if self.perplexity is not None:
            return {"perplexity": f"{self.perplexity:.3f}"}
        if isinstance(self.top1, dict):
            return {f"k = {k}" if k.isdecimal() else k: f"{value:.2f}%" for k, value in self.top1.items()}
        return {} if self.top1 is None else {"top-1": f"{self.top1:.2f}%"}


class Evaluation(BaseModel):
    """One protocol on one set of data."""

    protocol: str
    data: str | None = None  # or
    train: str | None = None
    val: str | None = None
    dense: Score | None = None
    compressed: Score
    difference: dict[str, Difference | Ratio] = {}

    def rows(self) -> list[list[str]]:
        """Protocol, data, metric, dense, compressed and change, for each metric."""
        dense = self.dense.metrics if self.dense else {}
        data = self.data or f"{self.train} → {self.val}"
        return [
            [self.protocol, data, metric, dense.get(metric, ""), value, str(self.difference.get(metric, ""))]
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


def read_evaluations(directory: Path) -> list[Evaluation]:
    """What `compress` measured, and then `eval`; nothing if there is no report. One that is odd is left out, and said.

    Raises:
        CheckpointError: report.json cannot be read, or is not the file that it should be.
    """
    file = directory / REPORT
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"{file} is damaged: {problem}") from None
    if not isinstance(content, dict) or not isinstance(content.get("evaluations", []), list):
        raise CheckpointError(f"{file} is damaged: it must be an object, and its evaluations a list")
    return list(_readable(content, file))


def _readable(content: dict[str, Any], file: Path) -> Iterator[Evaluation]:
    for protocol in ("top1", "perplexity"):
        if content.get(protocol) is not None:
            try:
                run = _Run.model_validate(content.get("run"))
                yield _WhenCompressed.model_validate(content[protocol]).evaluation(protocol, run)
            except ValidationError as problem:
                log.warning("%s: %s is left out: %s", file, protocol, _first(problem))
    for i, fields in enumerate(content.get("evaluations", [])):
        try:
            yield Evaluation.model_validate(fields)
        except ValidationError as problem:
            log.warning("%s: evaluation %d is left out: %s", file, i + 1, _first(problem))


def _first(problem: ValidationError) -> str:
    error = problem.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, error['loc'])) or 'it'}: {error['msg']}"
