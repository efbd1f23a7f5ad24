"""What a compression did to a model, layer by layer: kept with the model and in its checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from oats_vision.compression.settings import CompressionSettings
from oats_vision.errors import ModelError
from oats_vision.models.record import Record, record_of
from oats_vision.nn.sliced import SlicedBlock, Slicing
from oats_vision.nn.sparse_low_rank import LayerSpec, SparseLowRankLinear, compressed_layers
from oats_vision.progress import count, duration


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear.

    errors: of each part, |(W - S - U V) D| / |W D|. output_errors: of each part's output, |(W - S - U V) X| / |W X|, if
    the method knows it; with targets W is the weight that was aimed at. iterations: of alternating thresholding (and of
    joint rounds), of each part. tokens: that the linear saw.
    """

    name: str
    spec: LayerSpec
    errors: dict[str, float]
    output_errors: dict[str, float]
    iterations: dict[str, int]
    seconds: float
    tokens: int

    @property
    def error(self) -> float:
        """The largest relative error of a part: of its output if that is known, else weighted by D."""
        return max((self.output_errors or self.errors).values())

    def to_dict(self) -> dict[str, Any]:
        """As config.json holds it, where the iterations are `rounds`."""
        fields = {"rounds" if name == "iterations" else name: value for name, value in asdict(self).items()}
        return fields | {"error": self.error}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LayerReport":
        names = ("name", "errors", "output_errors", "seconds", "tokens")
        own = {name: fields[name] for name in names}
        return cls(**own, spec=LayerSpec.from_dict(fields["spec"]), iterations=fields["rounds"])


@dataclass(frozen=True)
class LayerException:
    """A linear that was treated otherwise than asked for, or is odd, and why.

    dense: whether it stays dense. parameters: of its weight, if it does.
    """

    name: str
    reason: str
    dense: bool = False
    parameters: int = 0


@dataclass(frozen=True)
class BlockRecovery:
    """How far a block's outputs were from the dense ones on held-out data, before and after it was trained.

    before, after: relative errors; both with the recovered blocks before it. step: whose weights were kept; 0: those
    from before. curve: steps and relative errors.
    """

    name: str
    before: float
    after: float
    step: int
    curve: list[tuple[int, float]]


@dataclass
class RecoveryReport:
    """What a recovery did to a compressed model.

    steps: of each block. samples: that it was trained on. held_out: that it was judged by. seconds: of all of it.
    before, after: relative errors of the final features there. kept: whether these gained by the blocks' own training;
    else all weights are those from before it. together: what training all blocks together did after that.
    """

    steps: int
    seed: int
    samples: int
    held_out: int
    blocks: list[BlockRecovery] = field(default_factory=list)
    seconds: float = 0.0
    before: float = 0.0
    after: float = 0.0
    kept: bool = True
    together: BlockRecovery | None = None

    @property
    def summary(self) -> str:
        """What was gained, in a sentence."""
        gained = sum(block.step > 0 for block in self.blocks)
        kept = "" if self.kept else ", and the features nothing by that"
        ended = ""
        if self.together:
            ended = ", then by all together" if self.together.step else "; training all together gained nothing"
        return (
            f"Recovered by {self.steps} steps a block on {self.samples:,} samples, judged by {self.held_out:,} others, "
            f"in {duration(self.seconds)}: {gained} of {count(len(self.blocks), 'block')} gained{kept}{ended}; "
            f"relative error of the features {self.before:.4f} -> {self.after:.4f}."
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RecoveryReport":
        """The inverse of `asdict`. Raises KeyError, TypeError or ValueError."""

        def of(block: Mapping[str, Any]) -> BlockRecovery:
            return BlockRecovery(**{**block, "curve": [(int(step), float(error)) for step, error in block["curve"]]})

        together = of(fields["together"]) if fields.get("together") else None
        return cls(**{**fields, "blocks": list(map(of, fields["blocks"])), "together": together})


@dataclass
class CompressionReport:
    """What was done to a model, layer by layer; the layers' errors are those from before a recovery."""

    family: str
    settings: CompressionSettings
    samples: int = 0
    unit: str = "pictures"  # that the samples are
    layers: list[LayerReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, and the total
    slicing: Slicing | None = None  # of method slicegpt, which has no compressed layers
    recovery: RecoveryReport | None = None
    exceptions: list[LayerException] = field(default_factory=list)

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
    def rate(self) -> float:
        """Share of the parameters removed, of all layers that were to be compressed; some may have stayed dense."""
        dense = sum(exception.parameters for exception in self.exceptions)
        return 1 - (self.parameters + dense) / max(self.dense_parameters + dense, 1)

    @property
    def exceptions_made(self) -> list[str]:
        """Which layers were treated otherwise than asked for, or are odd, in sentences."""
        lines = [f"{one.name}{' stays dense' * one.dense}: {one.reason}." for one in self.exceptions]
        if self.settings.density is not None:
            dense = sum(one.parameters for one in self.exceptions)
            lines += [f"{dense:,} weights stay dense and are not counted among the bits a weight."] if dense else []
        elif any(one.dense for one in self.exceptions):
            lines.append(f"The rate is {self.rate:.3f} and not the {self.settings.rate:.3g} asked for.")
        return lines

    @property
    def error_name(self) -> str:
        """What the layers' `error` is, in words."""
        known = any(layer.output_errors for layer in self.layers)
        return "relative error of a layer's output" if known else "relative error of a layer"

    def to_dict(self) -> dict[str, Any]:
        layers = [layer.to_dict() for layer in self.layers]
        fields = {name: value for name, value in asdict(self).items() if name != "family"}
        if self.recovery is None:
            del fields["recovery"]  # as in files of releases that had none
        if not self.exceptions:
            del fields["exceptions"]
        return {"adapter": self.family, **fields, "settings": self.settings.model_dump(), "layers": layers}

    def within(self, path: str) -> "CompressionReport":
        """The report of a model that has this one's at `path`."""
        within = replace(
            self,
            layers=[replace(layer, name=f"{path}.{layer.name}") for layer in self.layers],
            exceptions=[replace(one, name=f"{path}.{one.name}") for one in self.exceptions],
        )
        if self.recovery:
            blocks = [replace(block, name=f"{path}.{block.name}") for block in self.recovery.blocks]
            within.recovery = replace(self.recovery, blocks=blocks)
        return within

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "CompressionReport":
        """The inverse of `to_dict`; other fields are ignored. Raises KeyError, TypeError or ValueError."""
        return cls(
            family=fields["adapter"],
            settings=CompressionSettings(**fields["settings"]),
            samples=fields["samples"],
            unit=fields["unit"],
            layers=[LayerReport.from_dict(layer) for layer in fields["layers"]],
            seconds=dict(fields["seconds"]),
            slicing=Slicing.from_dict(fields["slicing"]) if fields["slicing"] else None,
            recovery=RecoveryReport.from_dict(fields["recovery"]) if fields.get("recovery") else None,
            exceptions=[LayerException(**one) for one in fields.get("exceptions", [])],
        )


@dataclass(frozen=True)
class CompressionRecord(Record):
    """A compressed model's record: also what was done to it."""

    report: CompressionReport = field(kw_only=True)

    def within(self, path: str, model: nn.Module) -> "CompressionRecord":
        """The record of a model of the user's own that has this one's at `path`."""
        return replace(super().within(path, model), report=self.report.within(path))


def record(model: nn.Module) -> CompressionRecord:
    """What was done to a compressed model, how its architecture is rebuilt, and what its family found in it.

    It is kept on the model as `model.oats_vision`, and copied and pickled with it. A model that wraps a compressed one
    has that one's, with the names that modules have in the wrapper.

    Raises:
        ModelError: the model is not compressed, or not any more, or wraps several compressed ones.
    """
    found = record_of(model)
    if isinstance(found, CompressionRecord):
        if changed := what_changed(model, found.report):
            raise ModelError(changed)
        return found
    if any(isinstance(module, SparseLowRankLinear | SlicedBlock) for module in model.modules()):
        raise ModelError(
            "the model has compressed layers and no record of them: it is a part of a compressed model, which is saved "
            "whole, or its compression was stopped in the middle"
        )
    raise ModelError("the model is not compressed: call oats_vision.compress first")


def what_changed(model: nn.Module, report: CompressionReport) -> str:
    """How a model's layers differ from those of its report, in words; empty if they do not."""
    layers = {name: layer.spec for name, layer in compressed_layers(model).items()}
    noted = {layer.name: layer.spec for layer in report.layers}
    sliced = any(isinstance(module, SlicedBlock) for module in model.modules())
    if layers == noted and sliced == bool(report.slicing):
        return ""
    if not layers and not sliced:
        return "the model was merged and is dense again: save it before the merge"
    differ = sorted(name for name in layers.keys() | noted.keys() if layers.get(name) != noted.get(name))
    return (
        f"the model's compressed layers are not those of its report (such as {differ[0] if differ else 'its blocks'}): "
        "a run was stopped in the middle, or layers were changed by hand; load the dense model and compress it again"
    )
