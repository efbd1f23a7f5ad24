"""Every setting with its range and its default, checked once; the CLI's flags and YAML fields are these names."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from oats_vision.core import Solver
from oats_vision.core.budget import Pattern, split_rate
from oats_vision.errors import ConfigError, DataError, did_you_mean, near

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
Scaling = Literal["second_moment", "median", "none"]
Dtype = Literal["float32", "float16", "bfloat16"]
KNOWN_DATA = ("demo", "c4", "wikitext", "fineweb")
PATTERNS = ("row", "layer", "2:4", "2:8")  # N:M may be any
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
# all that PyTorch may have, or a plug-in bring
TORCH_DEVICES = (*DEVICES, "hpu", "ipu", "maia", "meta", "mtia", "npu", "privateuseone", "ve", "vulkan", "xla")
Config = TypeVar("Config", bound=BaseModel)
T = TypeVar("T")


class CompressionSettings(BaseModel):
    """How to compress: all that the result depends on, besides the model and the calibration data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method = Field("oats", description="oats, or a baseline to compare it with")
    rate: float | None = Field(None, gt=0, lt=1, description="share of parameters removed [default: 0.5]")
    rank_ratio: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] | None = Field(
        None,
        description="low-rank share of what is kept; auto: the fastest split of each layer "
        "[default: 0.2; baselines: their own]",
    )
    error_tolerance: float = Field(0.05, ge=0, description="of rank ratio auto: error above the best split's")
    latency_tokens: int | None = Field(
        None, ge=1, description="of rank ratio auto: tokens to time a layer with [default: of a picture; 1 for text]"
    )
    pattern: str | None = Field(
        None,
        description="non-zeros by row, by layer or N:M, such as 2:4 [default: row; baselines: their own]",
    )
    iterations: int = Field(80, ge=1, description="rounds of thresholding at most")
    solver: Solver = Field("fast", description="fast: warm-started and extrapolated; exact: SVDs")
    tolerance: float = Field(1e-3, ge=0, lt=1, description="fast stops when ten rounds gain less; 0: never")
    scaling: Scaling = Field("second_moment", description="statistic of the inputs that scales the columns")
    refit: bool | None = Field(
        None,
        description="least-squares fit of S, U, V to the outputs after OATS [default: yes with scaling second_moment]",
    )
    fused_qkv: Literal["split", "joint"] = Field("split", description="decompose a fused qkv as three matrices or one")
    storage_dtype: Dtype | None = Field(None, description="precision of the stored weights [default: the model's own]")
    skip: tuple[str, ...] = Field(
        (), description="linears or blocks to leave dense, such as '*.mlp.fc2'; may be repeated"
    )

    @field_validator("skip", mode="before")
    @classmethod
    def _one_or_more(cls, skip: Any) -> Any:
        if skip is not None and not isinstance(skip, (str, list, tuple)):
            raise ValueError(f"skip must be a name or a list of names, got {skip!r}")
        return (skip,) if isinstance(skip, str) else skip or ()

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            return str(Pattern.parse(pattern))
        except ValueError as wrong:
            raise ValueError(f"{wrong}{'.' * bool(hint := did_you_mean(pattern, PATTERNS))}{hint}") from None

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

    model: str = Field("demo", description="alias, timm name, hf:org/name, hub:entry, a folder or a .gguf file")
    pretrained: bool = Field(True, description="trained weights, or random ones (to try a run)")
    image_size: int | None = Field(None, ge=1, description="input size (timm models) [default: its own]")
    trust_remote_code: bool = Field(False, description="run model code from a hub (hub:, some hf: models)")
    data: str | None = Field(
        None,
        description="folder of pictures, .txt, .jsonl, hf:name[:config], c4, wikitext, fineweb, demo "
        "[default: demo for the model demo]",
    )
    split: str = Field("train", description="split of a Hugging Face dataset")
    eval: bool = Field(True, description="measure what it cost")
    eval_data: str | None = Field(
        None, description="labelled pictures for top-1, or text for perplexity, before and after"
    )
    eval_split: str | None = Field(
        None, description="split of a Hugging Face dataset [default: validation; test for text]"
    )
    eval_samples: int | None = Field(None, ge=1, description="pictures, or windows of text [default: all]")
    streaming: bool = Field(False, description="stream Hugging Face datasets: no download")
    samples: int | None = Field(None, ge=1, description="pictures, or sequences of text [default: 2048; 128 for text]")
    batch_size: int | None = Field(None, ge=1, description="pictures or sequences at a time [default: 64; 4 for text]")
    sequence_length: int = Field(2048, ge=2, description="tokens in a sequence (text)")
    workers: int = Field(0, ge=0, description="processes that read pictures")
    seed: int = Field(42, description="of the choice of calibration data")
    device: str = Field("auto", description="auto (CUDA if there), cpu, cuda:1, ...")
    dtype: Dtype = Field("float32", description="precision of the arithmetic")
    activation_memory: float = Field(8.0, gt=0, description="for activations, the rest on disk")
    out: Path = Field(Path("oats_compressed"), description="folder to write")
    overwrite: bool = Field(False, description="replace the checkpoint in --out")
    merge: bool = Field(False, description="also write dense weights S + U V, to OUT/merged")
    report: bool = Field(True, description="write OUT/report.html")
    dry_run: bool = Field(False, description="say what would be done, and stop")

    @field_validator("device")
    @classmethod
    def _spelt_device(cls, device: str) -> str:
        kind = device.partition(":")[0]
        if kind not in TORCH_DEVICES and (hint := did_you_mean(kind, DEVICES)):
            raise ValueError(f"device {device!r} is not known.{hint}")
        return device

    @model_validator(mode="after")
    def _possible(self) -> "RunConfig":
        if self.merge and self.method == "slicegpt":
            raise ValueError("merge is for methods that keep the layers' shapes, and slicegpt makes them smaller")
        if self.eval_data and not self.eval:
            raise ValueError("eval_data is given, and nothing is to be evaluated (--no-eval): leave one of them out")
        return self

    def check_data(self) -> None:
        """See that there are calibration data, and that what is no dataset's name is there: it takes no time.

        Raises:
            ConfigError: no data are given; a file of settings may leave that to a flag.
            DataError: a path does not exist.
        """
        if self.data is None and self.model != "demo":
            raise ConfigError(
                "--data must be given for a model that is not the demo: a folder of pictures, a text or hf:name"
            )
        for name, given in (("data", self.data), ("eval_data", self.eval_data)):
            if given and given not in KNOWN_DATA and not given.startswith("hf:") and not Path(given).exists():
                close = near(given) or did_you_mean(given, KNOWN_DATA)
                raise DataError(
                    f"{flag(name)} {given} does not exist: give a folder of pictures, a text, hf:name or "
                    f"{', '.join(KNOWN_DATA)}.{close}"
                )

    def settings(self) -> CompressionSettings:
        """The part that decides the result."""
        names = CompressionSettings.model_fields
        return CompressionSettings(**{name: getattr(self, name) for name in names})


def flag(name: str) -> str:
    """The flag that sets a field."""
    return f"--{name.replace('_', '-')}"


def validated(kind: type[Config], fields: dict[str, Any], called: Callable[[str], str] = str) -> Config:
    """Build a configuration.

    Args:
        called: what an error calls a field: its own name, or its `flag`.

    Raises:
        ConfigError: one line that names each field that is wrong, what it was and what is allowed.
    """
    try:
        return kind(**fields)
    except ValidationError as invalid:
        # one for each field: of a union there is an error for each of its types
        messages = {error["loc"][:1]: _message(kind, error, called) for error in reversed(invalid.errors())}
        raise ConfigError("; ".join(reversed(messages.values()))) from None


def _message(kind: type[BaseModel], error: Any, called: Callable[[str], str]) -> str:
    """What is wrong with one field, as `NAME must be WHAT IS ALLOWED, got VALUE`."""
    message, given = error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"] == "value_error":  # of ours: begins with the name
        name, _, rest = message.partition(" ")
        return f"{called(name) if name in kind.model_fields else name} {rest}"
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"{name} is no setting" + (
            f".{hint}"
            if (hint := did_you_mean(name, kind.model_fields))
            else f"; known: {', '.join(kind.model_fields)}"
        )
    if error["type"] == "string_type":
        return f"{called(name)} must be text (in YAML in quotes), got {given!r}"
    hint = did_you_mean(given, choices(kind, name)) if isinstance(given, str) else ""
    whole = ["a whole number"] * error["type"].startswith("int_")
    shown = f"{given}" if error["type"].startswith(("greater", "less")) else repr(given)
    right = ", ".join([*whole, *filter(None, [allowed(kind, name)])]) or message
    return f"{called(name)} must be {right}, got {shown}{'.' * bool(hint)}{hint}"


@cache
def _schemas(kind: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The JSON schemas of the fields: what pydantic itself makes of their types and ranges."""
    return kind.model_json_schema()["properties"]


def _kinds(kind: type[BaseModel], name: str) -> list[dict[str, Any]]:
    """The schemas of the values that a field may have, or a list in it, besides None."""
    schema = _schemas(kind)[name]
    return [one.get("items", one) for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]


def choices(kind: type[BaseModel], name: str) -> list[str]:
    """The words that a field takes, if it takes only certain ones."""
    return [word for one in _kinds(kind, name) for word in one.get("enum", [one["const"]] if "const" in one else [])]


def allowed(kind: type[BaseModel], name: str) -> str:
    """The values that a field takes, in words: `in (0, 1)`, `at least 1`, `split or joint`; or none."""
    *others, last = [*filter(None, map(_range, _kinds(kind, name))), *choices(kind, name)] or [""]
    return f"{', '.join(others)}{' or ' * bool(others)}{last}"


def _range(schema: dict[str, Any]) -> str:
    if schema.get("type") == "boolean":
        return "true or false"
    if schema.get("type") not in ("number", "integer"):
        return ""
    above, least = schema.get("exclusiveMinimum"), schema.get("minimum")
    below, most = schema.get("exclusiveMaximum"), schema.get("maximum")
    low, high = above if least is None else least, below if most is None else most
    if low is not None and high is not None:
        return f"in {'(' if least is None else '['}{low:.12g}, {high:.12g}{')' if most is None else ']'}"
    if low is not None:
        return f"above {low:g}" if least is None else f"at least {low:g}"
    return ""


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


def read_fields(path: Path | None) -> dict[str, Any]:
    """The settings that a YAML file gives, by name and not checked yet; none without a file.

    Raises:
        ConfigError: the file is missing, or no YAML mapping.
    """
    if path is None:
        return {}
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


def with_flags(
    path: Path | None, flags: dict[str, Any], build: Callable[[dict[str, Any], Callable[[str], str]], T]
) -> T:
    """Build a configuration from a YAML file, if given, and the flags that are not None, which override it.

    Args:
        build: from the fields, and what an error calls each of them.

    Raises:
        ConfigError: the file is missing, no YAML mapping, or a field is wrong.
    """
    fields, given = read_fields(path), {name: value for name, value in flags.items() if value is not None}
    try:
        return build(fields | given, lambda name: name if name in fields.keys() - given else flag(name))
    except ConfigError as wrong:
        raise ConfigError(f"--config {path}: {wrong}" if path else str(wrong)) from None


def load_run_config(path: Path | None, flags: dict[str, Any]) -> RunConfig:
    """Read a YAML file of RunConfig's fields, if given, and let the flags that are not None override it.

    Raises:
        ConfigError: the file is missing, no YAML mapping, or a field is wrong.
    """
    return with_flags(path, flags, lambda fields, called: validated(RunConfig, fields, called))
