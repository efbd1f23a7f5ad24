"""`oats-vision eval lm`: tasks of the LM evaluation harness."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from oats_vision import ranks
from oats_vision.evaluation.protocols.base import Given, Measurement, protocol
from oats_vision.evaluation.protocols.settings import OnText
from oats_vision.evaluation.results import Figure

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = """\
  oats-vision eval lm smollm2_50 --tasks piqa --tasks arc_easy
MMLU as in the paper
  oats-vision eval lm smollm2_50 --tasks mmlu --shots 5"""
# the zero-shot tasks of the OATS paper
ZERO_SHOT = ("piqa", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "rte", "openbookqa", "boolq")


class TaskSettings(OnText):
    """Of the harness."""

    batch_size: int = Field(8, ge=1, description="documents in a batch")
    tasks: tuple[str, ...] = Field(
        ZERO_SHOT,
        min_length=1,
        description="task of the LM evaluation harness; may be repeated [default: the eight of the OATS paper]",
    )
    limit: int | None = Field(None, ge=1, description="documents of each task at most [default: all]")
    task_folder: Path | None = Field(None, description="task definitions of your own")
    shots: int | None = Field(None, ge=0, description="examples in the prompt [default: the task's own]")

    @property
    def where(self) -> Mapping[str, str]:
        return {"data": " ".join(self.tasks)}


@protocol("lm", TaskSettings, title="lm-eval", rank=2, examples=EXAMPLES)
def lm(model: nn.Module, given: Given[TaskSettings]) -> Measurement:
    """Accuracy on tasks of the LM evaluation harness (needs the extra `llm`)."""
    from oats_vision.evaluation.harness import run_tasks

    settings = given.settings
    with given.display.status(f"tasks, {given.which}"):
        found = ranks.on_main(
            lambda: run_tasks(
                model,
                given.reader,
                settings.tasks,
                shots=settings.shots,
                limit=settings.limit,
                batch_size=settings.batch_size,
                task_folder=settings.task_folder,
            )
        )
    accuracy = {task: score.percent for task, score in found.items()}
    mean = sum(accuracy.values()) / len(accuracy)
    return Measurement(
        compared=found,
        figures=[Figure(name="mean of the tasks", kind="percent", value=mean)],
        samples=sum(len(score.correct) for score in found.values()),
        unit="documents",
        details={"top1": accuracy, "mean": mean},
    )
