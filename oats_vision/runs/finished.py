"""A run that is finished: what it made and measured, and its report.json."""

import logging
from dataclasses import dataclass, field
from typing import Any

from oats_vision import checkpoint, ranks
from oats_vision.analysis.html_report import draw_page
from oats_vision.checkpoint.place import PAGE
from oats_vision.compression.settings import CompressionSettings
from oats_vision.display import Display
from oats_vision.evaluation.protocols import Protocol
from oats_vision.evaluation.results import Evaluation
from oats_vision.evaluation.searched import Searched
from oats_vision.evaluation.tasks import Task
from oats_vision.models.record import record_of
from oats_vision.runs.compress import Result, with_one_shot
from oats_vision.runs.config import RunConfig

log = logging.getLogger(__name__)


@dataclass
class FinishedRun:
    """What a run made and measured; `to_dict` is the checkpoint's report.json.

    task: what the model reads. evaluation: on labelled pictures or on text, if there were any; one_shot: before a
    recovery. files: bytes of each in the checkpoint's directory. peak_memory, planned_memory: bytes. searched: how the
    rate was found, if it was searched for.
    """

    config: RunConfig
    settings: CompressionSettings
    result: Result
    files: dict[str, int]
    skipped: int
    task: Task
    protocol: Protocol[Any]
    evaluation: Evaluation | None = None
    one_shot: Evaluation | None = None
    searched: Searched | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    planned_memory: int = 0
    machine: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        figures = self.result.to_dict()
        if self.one_shot:
            figures.setdefault("one_shot", {})[self.task.measured_by] = self.one_shot.to_dict()
        return {
            "run": self.config.model_dump(mode="json"),
            **figures,
            "settings": self.settings.model_dump(),
            "skipped_pictures": self.skipped,
            "bytes": figures["bytes"] | {"files": self.files},
            **({self.protocol.name: self.evaluation.to_dict()} if self.evaluation else {}),
            **({"search": self.searched.model_dump(mode="json")} if self.searched else {}),
            "seconds": {**figures["seconds"], "command": self.seconds},
            "peak_memory": self.peak_memory,
            **({"planned_memory": self.planned_memory} if self.planned_memory else {}),
            "machine": self.machine,
            "out": str(self.config.out),
        }

    def score_rows(self) -> list[list[str]]:
        """The evaluation as the table shows it, and what it was before a recovery."""
        after, before = (one.rows() if one else [] for one in (self.evaluation, self.one_shot))
        return with_one_shot(after, before)

    def write(self, display: Display) -> None:
        """Write report.json into the checkpoint's directory, and the page that shows it, if one is wanted."""
        if not ranks.is_main():
            return
        out, examples = self.config.out, self.result.examples if self.has_page else []
        content = self.to_dict() | {"examples": [example.model_dump() for example in examples]}
        checkpoint.write_json(out / checkpoint.REPORT, content)
        if self.has_page:
            draw_page(out, out / PAGE, display)
        elif self.config.report:
            log.warning("%s is not drawn: its spectra take all weights, which do not fit in memory", out / PAGE)

    @property
    def has_page(self) -> bool:
        """Whether report.html is drawn: if it is wanted, and the compressed model fits in memory."""
        return self.config.report and record_of(self.result.model).on_disk is None
