"""What a compression did to a model, layer by layer: kept with the model and in its checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from oats_vision.compression.settings import CompressionSettings
from oats_vision.nn.sliced import Slicing
from oats_vision.nn.sparse_low_rank import LayerSpec


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear.

    errors: of each part, |(W - S - U V) D| / |W D|. output_errors: of each part's output, |(W - S - U V) X| / |W X|, if
    the method knows it. rounds: of each part. tokens: that the linear saw.
    """

    name: str
    spec: LayerSpec
    errors: dict[str, float]
    output_errors: dict[str, float]
    rounds: dict[str, int]
    seconds: float
    tokens: int

    @property
    def error(self) -> float:
        """The largest relative error of a part: of its output if that is known, else weighted by D."""
        return max((self.output_errors or self.errors).values())


@dataclass
class CompressionReport:
    """What was done to a model, layer by layer."""

    adapter: str
    settings: CompressionSettings
    samples: int = 0
    unit: str = "pictures"  # that the samples are
    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, and the total
    slicing: Slicing | None = None  # of method slicegpt, which has no compressed layers

    @property
    def parameters(self) -> int:
        """Parameters of the compressed layers: non-zeros, U and V (or the linears of sliced blocks)."""
        if self.slicing:
            return self.slicing.parameters
        return sum(layer.spec.parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Parameters that these layers had."""
        if self.slicing:
            return self.slicing.dense_parameters
        return sum(layer.spec.dense_parameters for layer in self.layers)

    @property
    def error_name(self) -> str:
        """What the layers' `error` is, in words."""
        known = any(layer.output_errors for layer in self.layers)
        return "relative error of a layer's output" if known else "relative error of a layer"

    def to_dict(self) -> dict[str, Any]:
        layers = [{**asdict(layer), "error": layer.error} for layer in self.layers]
        return {**asdict(self), "settings": self.settings.model_dump(), "layers": layers}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "CompressionReport":
        """The inverse of `to_dict`; other fields are ignored. Raises KeyError, TypeError or ValueError."""
        names = ("name", "errors", "output_errors", "rounds", "seconds", "tokens")
        return cls(
            adapter=fields["adapter"],
            settings=CompressionSettings(**fields["settings"]),
            samples=fields["samples"],
            unit=fields["unit"],
            layers=[
                LayerReport(spec=LayerSpec.from_dict(layer["spec"]), **{name: layer[name] for name in names})
                for layer in fields["layers"]
            ],
            seconds=dict(fields["seconds"]),
            slicing=Slicing.from_dict(fields["slicing"]) if fields["slicing"] else None,
        )
