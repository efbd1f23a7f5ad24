"""A protocol on the compressed and on the dense model, and what their difference is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oats_vision.display import Display
from oats_vision.errors import ConfigError
from oats_vision.evaluation.models import Models
from oats_vision.evaluation.protocols.base import Given, Measurement, Protocol, protocols
from oats_vision.evaluation.protocols.settings import Settings
from oats_vision.evaluation.results import Evaluation
from oats_vision.evaluation.tasks import task_of_unit

READ = {"pictures": "pictures", "sequences": "text"}  # by the unit in which it is counted


def measure_models(
    protocol: Protocol[Any], settings: Settings, models: Models, display: Display
) -> dict[str, Measurement]:
    """What the protocol finds of each of the models, `dense` first; data are opened before a model is loaded.

    Raises:
        OatsVisionError: data or a model cannot be read, or do not go together.
    """
    if settings.unit != models.unit:
        raise ConfigError(_of_another_kind(protocol, settings, models))
    reader = task_of_unit(settings.unit).reader(models.name, models.transform)
    data = settings.open(reader)
    return {
        which: protocol.function(load(), Given(settings, data, reader, which, display))
        for which, load in models.loaders.items()
    }


def _of_another_kind(protocol: Protocol[Any], settings: Settings, models: Models) -> str:
    """That the protocol is for models that read something else, and which ones fit."""
    *others, last = [one.name for one in protocols() if one.settings.unit == models.unit]
    return (
        f"{protocol.name} is for models that read {READ[settings.unit]}, and {models.name} reads {READ[models.unit]}: "
        f"take {', '.join(others)}{' or ' * bool(others)}{last}"
    )


def evaluation_of(
    protocol: Protocol[Any],
    settings: Settings,
    found: Mapping[str, Measurement],
    *,
    model: str = "",
    machine: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Evaluation:
    """What was found as it is written down, with the differences if it is of both models.

    Args:
        found: of `dense`, of `compressed`, or of both.
        model: directory of the compressed one.
        machine, dtype: that it was measured on and in.
    """
    dense, ours = found.get("dense"), found.get("compressed")
    differences = {}
    if dense and ours:
        both = [name for name in dense.compared if name in ours.compared]
        differences = {name: ours.compared[name].beside(dense.compared[name]) for name in both}
    return Evaluation(
        protocol=f"{settings.variant} {protocol.title}".strip(),
        data=settings.where.get("data"),
        train=settings.where.get("train"),
        val=settings.where.get("val"),
        settings=settings.model_dump(mode="json", exclude={*settings.where}),
        model=model,
        dense=dense.score() if dense else None,
        compressed=ours.score() if ours else None,
        difference=differences,
        machine=dict(machine or {}),
        dtype=dtype,
    )
