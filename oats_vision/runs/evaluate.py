"""`oats-vision eval`: a protocol on a compressed model and on its dense one, kept in the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oats_vision.display import Display
from oats_vision.evaluation.evaluate import evaluation_of, measure_models
from oats_vision.evaluation.models import Models, check_names
from oats_vision.evaluation.protocols.base import Measurement, Protocol
from oats_vision.evaluation.protocols.settings import Settings
from oats_vision.evaluation.results import Evaluation

log = logging.getLogger(__name__)
SILENT = Display()


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation, and of each model what was found.

    directory: of the checkpoint; None if the model is none.
    """

    evaluation: Evaluation
    found: Mapping[str, Measurement]
    directory: Path | None

    def rows(self) -> dict[str, list[str]]:
        """Each metric's values, and the other lines of the table, one a model."""
        lines: dict[str, list[str]] = {
            name: [one.figure for one in self.evaluation.figures(name) if one]
            for name in next(iter(self.evaluation.scores.values())).names
        }
        for measurement in self.found.values():
            for name, text in measurement.lines.items():
                lines.setdefault(name, []).append(text)
        return lines

    def keep(self, display: Display = SILENT) -> None:
        """Add the result to the checkpoint's report.json, and write its page anew if it has one.

        Raises:
            CheckpointError: report.json is damaged.
        """
        from oats_vision import checkpoint
        from oats_vision.analysis.html_report import renew_page

        if self.directory and checkpoint.add_evaluation(self.directory, self.evaluation.to_dict()):
            renew_page(self.directory, display)


def evaluate(
    protocol: Protocol[Any],
    settings: Settings,
    model: str,
    display: Display = SILENT,
    *,
    dense: str | None = None,
    no_dense: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = log.info,
) -> Evaluated:
    """Measure a compressed model and its dense one, or a dense model alone, as `oats-vision eval` does.

    Args:
        protocol: such as `find_protocol` gives. settings: its data and what else it needs.
        model: a checkpoint's directory, or what `load_model` takes.
        display: for progress; none if not given.
        dense, no_dense, say: see `Models`.

    Returns:
        `evaluation`, as it is written down; `keep()` adds it to the checkpoint's report.json.

    Raises:
        OatsVisionError: something that was given is wrong.
    """
    check_names(model, dense, no_dense)
    from oats_vision.machine import choose_device, machine, warn_if_slow

    on = choose_device(device)
    warn_if_slow(dtype, on, "use `dtype=float32`")
    warn_if_slow(getattr(settings, "mixed_precision", None), on, "leave `mixed_precision` out")
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    models = Models(model, dense, no_dense, **loading, say=say)
    found = measure_models(protocol, settings, models, display)
    directory = models.directory
    evaluation = evaluation_of(
        protocol, settings, found, model=str(directory or ""), machine=machine(models.device), dtype=dtype
    )
    return Evaluated(evaluation, found, directory)
