"""Every setting with its range and its default, checked once; the CLI's flags and YAML fields are these names."""

import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from oats_vision.calibration import Scaling
from oats_vision.core.budget import Pattern, split_rate
from oats_vision.core.oats import Solver
from oats_vision.errors import ConfigError

Method = Literal["oats", "magnitude", "wanda", "sparsegpt", "dsnot", "svd", "slicegpt"]
# pattern and rank ratio of each method where the user gives none: those of its paper
METHOD_DEFAULTS: dict[Method, tuple[str, float | None]] = {
    "oats": ("row", None),
    "magnitude": ("layer", 0.0),
    "wanda": ("row", 0.0),
    "sparsegpt": ("layer", 0.0),
    "dsnot": ("row", 0.0),
    "svd": ("row", 1.0),
    "slicegpt": ("row", 0.0),
}
Dtype = Literal["float32", "float16", "bfloat16"]
Config = TypeVar("Config", bound=BaseModel)


class CompressionSettings(BaseModel):
    """How to compress: all that the result depends on, besides the model and the calibration data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = Field("oats", description="oats, or a baseline: magnitude, wanda, sparsegpt, dsnot, svd, slicegpt")
    rate: float | None = Field(None, description="share of the parameters removed, in (0, 1) [default: 0.5]")
    rank_ratio: float | Literal["auto"] | None = Field(
        None,
        description="share of what is kept that goes to the low-rank term, in [0, 1]; auto: for each layer the split "
        "that is fastest here [default: 0.2 for oats]",
    )
    error_tolerance: float = Field(
        0.05, ge=0, description="rank ratio auto may raise a layer's error by this share over the best split's"
    )
    latency_tokens: int | None = Field(
        None, ge=1, description="tokens that rank ratio auto times a layer with [default: of one picture; of text 1]"
    )
    pattern: str | None = Field(
        None,
        description="where S keeps its non-zeros: row, layer or N:M such as 2:4 "
        "[default: the method's own; row for oats]",
    )
    iterations: int = Field(80, ge=1, description="rounds of alternating thresholding at most")
    solver: Solver = Field("fast", description="fast: warm-started and extrapolated; exact: an SVD each round")
    tolerance: float = Field(
        1e-3, ge=0, lt=1, description="fast stops when ten rounds lower the error by less than this share; 0: never"
    )
    scaling: Scaling = Field("second_moment", description="statistic of the inputs that scales the columns")
    refit: bool | None = Field(
        None,
        description="after OATS, fit S's values, U and V to the inputs' full second moments by least squares "
        "[default: yes for oats with scaling second_moment]",
    )
    fused_qkv: Literal["split", "joint"] = Field("split", description="decompose a fused qkv as three matrices or one")
    storage_dtype: Dtype | None = Field(
        None, description="precision that the weights are rounded to and stored in [default: the checkpoint's own]"
    )
    skip: tuple[str, ...] = Field(
        (), description="linears or blocks to leave dense, by name, such as '*.mlp.fc2' or 'blocks.0'"
    )

    @field_validator("skip", mode="before")
    @classmethod
    def _one_or_more(cls, skip: Any) -> Any:
        if skip is not None and not isinstance(skip, (str, list, tuple)):
            raise ValueError("must be a name or a list of names")
        return (skip,) if isinstance(skip, str) else skip or ()

    @model_validator(mode="after")
    def _complete(self) -> "CompressionSettings":
        if self.skip and self.method == "slicegpt":
            raise ValueError("skip must be left out with method slicegpt: all blocks share the stream that it cuts")
        pattern, fixed = METHOD_DEFAULTS[self.method]
        if fixed is not None and self.rank_ratio not in (None, fixed):
            raise ValueError(f"rank_ratio must be {fixed:g} (or left out) with method {self.method}")
        if self.method in ("svd", "slicegpt") and self.pattern not in (None, pattern):
            raise ValueError(f"pattern must be left out with method {self.method}: it keeps no sparse matrix")
        if self.refit and (self.method != "oats" or self.scaling != "second_moment"):
            raise ValueError("refit is for method oats with scaling second_moment")
        if self.refit is None:
            object.__setattr__(self, "refit", self.method == "oats" and self.scaling == "second_moment")
        object.__setattr__(self, "pattern", self.pattern or pattern)
        parsed = Pattern.parse(str(self.pattern))
        if self.rank_ratio == "auto":
            if self.method != "oats" or parsed.kind == "n:m":
                raise ValueError("rank_ratio auto is for method oats with pattern row or layer")
            object.__setattr__(self, "rate", split_rate(self.rate, None, parsed)[0])
            return self
        rate, rank_ratio = split_rate(self.rate, self.rank_ratio if fixed is None else fixed, parsed)
        object.__setattr__(self, "rate", rate)
        object.__setattr__(self, "rank_ratio", rank_ratio)
        return self

    @property
    def terms(self) -> tuple[float, float, Pattern]:
        """Rate, rank ratio and pattern, complete; of rank ratio auto a first guess."""
        assert self.rate is not None
        assert self.rank_ratio is not None
        assert self.pattern is not None
        return self.rate, 0.2 if self.rank_ratio == "auto" else self.rank_ratio, Pattern.parse(self.pattern)

    @property
    def summary(self) -> str:
        """Method, rate, rank ratio and pattern in words."""
        rate, rank_ratio, pattern = self.terms
        share = "auto" if self.rank_ratio == "auto" else f"{rank_ratio:.3g}"
        skipped = f", without {' '.join(self.skip)}" if self.skip else ""
        return f"{self.method}{' + refit' * bool(self.refit)}, rate {rate:.3g}, rank ratio {share}, {pattern}{skipped}"


class RunConfig(CompressionSettings):
    """One run of `oats-vision compress`: what to compress, with what, where to."""

    model: str = Field(
        "demo", description="alias, timm name, hf:org/name, hub:entry, a local directory or a .gguf file"
    )
    pretrained: bool = Field(True, description="load the trained weights; without, random ones (to try a run)")
    image_size: int | None = Field(None, ge=1, description="input size, if not the model's own (timm models)")
    trust_remote_code: bool = Field(False, description="run model code from a hub (hub: and some hf: models need it)")
    data: str | None = Field(
        None,
        description="calibration pictures: a folder, hf:name[:config] or demo; for language models a .txt or .jsonl "
        "file, c4, wikitext, fineweb, hf:name[:config] or demo",
    )
    split: str = Field("train", description="split of a Hugging Face dataset for calibration")
    eval_data: str | None = Field(
        None, description="labelled pictures for top-1, or text for perplexity, before and after"
    )
    eval_split: str | None = Field(
        None, description="split of a Hugging Face dataset for the evaluation [default: validation, of text test]"
    )
    eval_samples: int | None = Field(
        None, ge=1, description="evaluate on that many pictures, or windows of text, only [default: all]"
    )
    streaming: bool = Field(False, description="stream Hugging Face datasets in place of downloading them")
    samples: int | None = Field(
        None, ge=1, description="calibration pictures, or sequences of text [default: 2048, 128]"
    )
    batch_size: int | None = Field(None, ge=1, description="pictures, or sequences, in a batch [default: 64, 4]")
    sequence_length: int = Field(2048, ge=2, description="tokens in a sequence (language models)")
    workers: int = Field(0, ge=0, description="processes that read pictures")
    seed: int = Field(42, description="of the choice of calibration data")
    device: str = Field("auto", description="auto (CUDA if it is there), cpu, cuda, cuda:1, ...")
    dtype: Dtype = Field("float32", description="precision that the model computes in")
    activation_memory: float = Field(8.0, gt=0, description="GB of activations kept in memory; the rest on disk")
    out: Path = Field(Path("oats_compressed"), description="directory to write")
    eval: bool = Field(True, description="measure what it cost")
    report: bool = Field(True, description="write OUT/report.html")
    dry_run: bool = Field(False, description="say what would be done, and stop")
    overwrite: bool = Field(False, description="replace an existing checkpoint in --out")
    merge: bool = Field(False, description="also write the dense S + U V as a plain checkpoint, in OUT/merged")

    def completed(self, unit: Literal["pictures", "sequences"]) -> "RunConfig":
        """With the defaults that depend on what the model reads."""
        samples, batch_size, split = (2048, 64, "validation") if unit == "pictures" else (128, 4, "test")
        changes = {
            "samples": self.samples or samples,
            "batch_size": self.batch_size or batch_size,
            "eval_split": self.eval_split or split,
        }
        return self.model_copy(update=changes)

    def settings(self) -> CompressionSettings:
        """The part that decides the result."""
        names = CompressionSettings.model_fields
        return CompressionSettings(**{name: getattr(self, name) for name in names})


def validated(kind: type[Config], fields: dict[str, Any]) -> Config:
    """Build a configuration.

    Raises:
        ConfigError: one line that names each field that is wrong, what it was and what is allowed.
    """
    try:
        return kind(**fields)
    except ValidationError as invalid:
        lines = []
        for error in invalid.errors():
            name, message = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
            if error["type"] == "extra_forbidden":
                message = f"is no setting; known: {', '.join(kind.model_fields)}"
            elif error["type"] == "string_type":
                message = f"must be text (in YAML in quotes), got {error['input']!r}"
            elif name:
                message = f"{message}, got {error['input']!r}"
            lines.append(f"{name}: {message}" if name else message)
        raise ConfigError("; ".join(lines)) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: 1.1 takes 2:4 for a number of base 60, `no` for a boolean, 2024-01-01 for a date."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _first, _pattern in (
    ("null", ["~", "n", "N", ""], r"~|null|Null|NULL|"),
    ("bool", list("tTfF"), r"true|True|TRUE|false|False|FALSE"),
    ("int", list("-+0123456789"), r"[-+]?(0|[1-9][0-9]*)"),
    ("float", list("-+.0123456789"), r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"({_pattern})$"), _first)


def read_fields(path: Path) -> dict[str, Any]:
    """The settings that a YAML file gives, by name; not checked yet.

    Raises:
        ConfigError: the file is missing, or no YAML mapping.
    """
    try:
        fields = yaml.load(path.read_text(), _Loader) or {}  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise ConfigError(f"--config {path}: {' '.join(str(problem).split())}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"--config {path}: must be a mapping of settings, got {type(fields).__name__}")
    odd = [name for name in fields if not isinstance(name, str)]
    if odd:
        raise ConfigError(f"--config {path}: {odd[0]!r} is no setting; known: {', '.join(RunConfig.model_fields)}")
    return fields


def load_run_config(path: Path | None, flags: dict[str, Any]) -> RunConfig:
    """Read a YAML file of RunConfig's fields, if given, and let the flags that are not None override it.

    Raises:
        ConfigError: the file is missing, no YAML mapping, or a field is wrong.
    """
    fields = read_fields(path) if path else {}
    fields |= {name: value for name, value in flags.items() if value is not None}
    try:
        return validated(RunConfig, fields)
    except ConfigError as wrong:
        raise ConfigError(f"--config {path}: {wrong}" if path else str(wrong)) from None
