"""What TensorBoard shows of a run: each linear's figures, and the errors of a recovery."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oats_vision.compression.record import RecoveryReport
from oats_vision.errors import ConfigError

SHOWN = ("error", "rank", "density", "bits", "seconds")


class Board:
    """A folder that TensorBoard reads.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("`tensorboard` needs a package that is not there: pip install tensorboard") from None
        self._writer: Any = SummaryWriter(str(folder))

    def layer(self, number: int, figures: Mapping[str, Any]) -> None:
        """The figures of a linear, by its number in the model."""
        for name in SHOWN:
            self._writer.add_scalar(f"layers/{name}", figures[name], number)
        self._writer.flush()

    def recovery(self, report: RecoveryReport) -> None:
        """The error of each block's outputs on held-out data, by step."""
        for block in report.blocks:
            for step, error in block.curve:
                self._writer.add_scalar(f"recovery/{block.name}", error, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
