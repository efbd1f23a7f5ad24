"""A checkpoint's config.json: what each field may hold, and a digest of them all."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from oats_vision.compression.record import CompressionReport
from oats_vision.errors import CheckpointError, ConfigError
from oats_vision.models.source import ModelSource
from oats_vision.nn.sparse_low_rank import LayerSpec

CONFIG = "config.json"
FORMAT = "oats_vision"
VERSIONS = (1, 2)  # that are read; 2 has values of few bits, all else is written as 1
DIGEST = "config_sha256"

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=0, lt=1 << 48)]
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Dtype = Literal["float64", "float32", "float16", "bfloat16"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Closed(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Part(_Closed):
    name: Name
    out_features: Size
    rank: Count
    nonzeros: Count


class _Grid(_Closed):
    bits: Literal[2, 3, 4, 5, 6, 8]
    group_size: Annotated[int, Field(ge=0, lt=1 << 31, multiple_of=16)]
    symmetric: bool
    normal: bool = False


class _Spec(_Closed):
    in_features: Size
    out_features: Size
    bias: bool
    parts: Annotated[list[_Part], Field(min_length=1)]
    grid: _Grid | None = None
    int8_factors: bool = False


class _Layer(_Fields):
    name: Name
    spec: _Spec
    errors: Annotated[dict[str, Number], Field(min_length=1)]
    output_errors: dict[str, Number]
    rounds: dict[str, Count]
    seconds: Number
    tokens: Count


class _Exception(_Closed):
    name: Name
    reason: str
    dense: bool
    parameters: Count


class _Slicing(_Closed):
    width: Size
    sliced_width: Size
    parameters: Count
    dense_parameters: Count
    kept: list[Number]


class _Origin(_Closed):
    name: Name
    image_size: Size | None = None


class _Source(_Closed):
    kind: Literal["timm", "huggingface", "torch_hub", "module"]
    name: Name
    args: dict[str, Any]
    transform: dict[str, Any] | None = None
    dtype: Dtype = "float32"
    label_names: list[str] | None = None
    origin: _Origin | None = None
    dense_sha256: Sha256 | None = None


class _BlockRecovery(_Closed):
    name: Name
    before: Number
    after: Number
    step: Count
    curve: list[Annotated[list[Number], Field(min_length=2, max_length=2)]]


class _Recovery(_Closed):
    steps: Count
    seed: int
    samples: Count
    held_out: Count
    blocks: list[_BlockRecovery]
    seconds: Number
    before: Number
    after: Number
    kept: bool
    together: _BlockRecovery | None = None


class _Content(_Fields):
    """The fields that reading relies on; others are for people."""

    format: Literal["oats_vision"]
    format_version: Literal[1, 2]
    written_by: str
    source: _Source
    adapter: Name
    dtype: Dtype
    storage_dtype: Dtype
    tied: dict[str, Name]
    settings: dict[str, Any]
    samples: Count
    unit: str
    seconds: dict[str, Number]
    layers: list[_Layer]
    slicing: _Slicing | None
    recovery: _Recovery | None = None
    exceptions: list[_Exception] = []
    generation_config: dict[str, Any] | None = None
    weights_sha256: Sha256

    @model_validator(mode="after")
    def _names(self) -> "_Content":
        if len({layer.name for layer in self.layers}) < len(self.layers):
            raise ValueError("two layers have one name")
        if not self.layers and self.slicing is None:
            raise ValueError("there is neither a compressed layer nor a sliced block")
        return self


@dataclass(frozen=True)
class Config:
    """What a config.json says.

    dtype, storage_dtype: that the model computes in, and that its weights are stored in. tied: names of tensors that
    are others', and those names. content: all of the file, as it is.
    """

    source: ModelSource
    report: CompressionReport
    dtype: torch.dtype
    storage_dtype: torch.dtype
    tied: dict[str, str]
    generation: dict[str, Any] | None
    weights_sha256: str
    written_by: str
    content: dict[str, Any]

    @property
    def specs(self) -> dict[str, LayerSpec]:
        """Shapes of the compressed layers, by their names."""
        return {layer.name: layer.spec for layer in self.report.layers}


def read_config(path: Path) -> Config:
    """A checkpoint's config.json, checked for format, version, digest and each field's type and range.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is of another or a later format.
    """
    file = path / CONFIG
    if not file.is_file():
        raise CheckpointError(f"{path} is not a compressed model: there is no {CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"{file} is damaged: {problem}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a config of oats_vision")
    if config.get("format_version") not in VERSIONS:
        raise CheckpointError(
            f"{file} has format version {config.get('format_version')!r} and this release reads {VERSIONS[0]} to "
            f"{VERSIONS[-1]}: update oats_vision"
        )
    if DIGEST in config and config[DIGEST] != config_digest(config):
        raise CheckpointError(f"{file} is damaged: its {DIGEST} is not that of its other fields")
    try:
        _Content.model_validate(config)
        report = CompressionReport.from_dict(config)
    except ValidationError as invalid:
        error = invalid.errors()[0]
        place = ".".join(map(str, error["loc"])) or "settings"
        raise CheckpointError(f"{file} is damaged: {place}: {error['msg']}") from None
    except (KeyError, TypeError, ValueError, ConfigError) as problem:
        raise CheckpointError(f"{file} is damaged: {problem}") from None
    return Config(
        source=ModelSource(**config["source"]),
        report=report,
        dtype=getattr(torch, config["dtype"]),
        storage_dtype=getattr(torch, config["storage_dtype"]),
        tied=config["tied"],
        generation=config.get("generation_config"),
        weights_sha256=config["weights_sha256"],
        written_by=config["written_by"],
        content=config,
    )


def config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of all fields but the digest's own, as JSON with sorted keys and without spaces."""
    content = {name: value for name, value in config.items() if name != DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def schema() -> dict[str, Any]:
    """The JSON schema of the fields that reading relies on."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | _Content.model_json_schema()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
