"""What a checkpoint is: its settings, its sizes and its layers."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from oats_vision import checkpoint
from oats_vision.analysis.tables import megabytes
from oats_vision.checkpoint.config import Config
from oats_vision.compression.record import CompressionReport
from oats_vision.progress import shares


@dataclass(frozen=True)
class Inspection:
    """config: the checkpoint's config.json. report: what it says of each layer. sizes: in bytes, as stored."""

    config: Config
    report: CompressionReport
    sizes: checkpoint.Sizes

    def to_dict(self) -> dict[str, Any]:
        """All that is known, for JSON."""
        return self.config.content | {"bytes": asdict(self.sizes) | {"layer_ratio": self.sizes.layer_ratio}}

    def rows(self) -> dict[str, Any]:
        """Name and value of what a terminal shows."""
        config, done, sizes = self.config, self.report, self.sizes
        stream = {}
        if done.slicing:
            stream = {"residual stream": f"{done.slicing.sliced_width} of {done.slicing.width} dimensions"}
        return {
            "model": f"{config.source.kind} {config.source.name} (family {done.family})",
            **done.settings.named,
            "calibration": f"{done.samples} {done.unit}",
            "time": shares(done.seconds),
            **({"recovery": done.recovery.summary} if done.recovery else {}),
            **({"exceptions": "\n".join(done.exceptions_made)} if done.exceptions else {}),
            **stream,
            "parameters of the layers": f"{done.parameters:,} of {done.dense_parameters:,} "
            f"({done.parameters / done.dense_parameters:.1%})",
            "bytes of the layers": f"{megabytes(sizes.layers)} of {megabytes(sizes.dense_layers)} "
            f"({sizes.layer_ratio:.3f}){self._besides_values()}",
            "bits a weight": f"{sizes.bits:.2f}",
            "bytes of the model": f"{megabytes(sizes.total)} of {megabytes(sizes.dense_total)}",
        }

    def _besides_values(self) -> str:
        """What bytes of the layers are not numbers of the weight itself."""
        shares = {"the bitmask of S": self.sizes.positions, "scales": self.sizes.scales}
        parts = [f"{name} {megabytes(size)}" for name, size in shares.items() if size]
        return f", of which {', '.join(parts)}" if parts else ""


def inspect(directory: Path) -> Inspection:
    """Read a checkpoint, its weights too, so that what is shown is what is there.

    Raises:
        CheckpointError: it is none, or is damaged.
    """
    config = checkpoint.read_config(directory)
    tensors = checkpoint.read_weights(directory, config)
    sizes = checkpoint.measure(tensors.values(), config.report, config.storage_dtype)
    return Inspection(config, config.report, sizes)
