"""What a model reads, pictures or text, and all that depends on it in a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from oats_vision.evaluation.tasks.base import Task
from oats_vision.evaluation.tasks.pictures import Pictures
from oats_vision.evaluation.tasks.text import Text

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Task", "task_of", "task_of_unit"]

TASKS: dict[str, Task] = {task.unit: task for task in (Pictures(), Text())}


def task_of_unit(unit: str) -> Task:
    """The task whose calibration data are counted in this unit."""
    return TASKS[unit]


def task_of(model: nn.Module) -> Task:
    """The task of a model, by its family.

    Raises:
        ModelError: the model is of no known family.
    """
    from oats_vision.models.record import structure_of

    return task_of_unit(structure_of(model).family.unit)
