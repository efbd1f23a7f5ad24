"""The settings of a whole run: from Python, from flags and from YAML files, each checked once."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, PrivateAttr, field_validator, model_validator

from oats_vision.compression import methods
from oats_vision.compression.settings import CompressionOptions, CompressionSettings, Dtype, no_recovery
from oats_vision.errors import ConfigError, DataError, did_you_mean, near, one_line
from oats_vision.evaluation.tasks.options import DataOptions
from oats_vision.fields import validated
from oats_vision.files import at_home
from oats_vision.runs.scale import BITS, FIRST_BITS, RATE, Scale

KNOWN_DATA = ("demo", "c4", "wikitext", "fineweb")
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
# all that PyTorch may have, or a plug-in bring
TORCH_DEVICES = (*DEVICES, "hpu", "ipu", "maia", "meta", "mtia", "npu", "privateuseone", "ve", "vulkan", "xla")
Drop = Literal["top1", "knn", "probe", "agreement", "cosine", "perplexity"]
T = TypeVar("T")


class RunConfig(DataOptions, CompressionOptions):
    """One run of `oats-vision compress`: what to compress, with what, where to."""

    max_drop: float | None = Field(
        None,
        gt=0,
        description="find the smallest model that loses less (points, %, or hundredths of cosine)",
    )
    drop_of: Drop | None = Field(None, description="what `max_drop` limits [default: as the data allow]")
    target_mb: float | None = Field(
        None, gt=0, description="find the most accurate model of this size; `bits` auto: more accurate"
    )
    pretrained: bool = Field(True, description="trained weights, or random ones (to try a run)")
    image_size: int | None = Field(None, ge=1, description="input size (timm models) [default: its own]")
    trust_remote_code: bool = Field(False, description="run model code from a hub (hub:, some hf: models)")
    device: str = Field("auto", description="auto (CUDA if available), cpu, cuda:1, ...")
    dtype: Dtype = Field("float32", description="precision of the arithmetic")
    activation_memory: float = Field(8.0, gt=0, description="memory for activations; the rest goes to disk")
    out: Path = Field(Path("oats_compressed"), description="folder to write")
    low_memory: bool | None = Field(
        None,
        description="leave weights in their files and read them block by block [default: if they need over half of the "
        "free memory]",
    )
    overwrite: bool = Field(False, description="replace the checkpoint in `out`")
    restart: bool = Field(False, description="start over where a stopped run would go on")
    merge: bool = Field(False, description="also write dense weights S + U V, to OUT/merged")
    report: bool = Field(True, description="write OUT/report.html")
    tensorboard: Path | None = Field(None, description="also write each layer's figures for TensorBoard")
    dry_run: bool = Field(False, description="say what would be done, and stop")
    recover: int = Field(
        0,
        ge=0,
        description="then train what was kept, no labels: steps of each block, then of all, e.g. 60",
    )
    _settings: CompressionSettings = PrivateAttr()

    @field_validator("out", "tensorboard")
    @classmethod
    def _of_this_user(cls, path: Path | None) -> Path | None:
        return path and at_home(path)

    @field_validator("device")
    @classmethod
    def _spelt_device(cls, device: str) -> str:
        kind = device.partition(":")[0]
        if kind not in TORCH_DEVICES and (hint := did_you_mean(kind, DEVICES)):
            raise ValueError(f"device {device!r} is not known.{hint}")
        return device

    @model_validator(mode="after")
    def _possible(self) -> "RunConfig":
        self._settings = self._first.resolved()
        if self.merge and not methods.find(self.method).keeps_shapes:
            raise ValueError(f"merge is for methods that keep the layers' shapes, and {self.method} makes them smaller")
        if self.recover and not methods.find(self.method).keeps_shapes:
            raise ValueError(f"recover is for methods that keep the layers' shapes, and {self.method} does not")
        if self.recover and (self._settings.values or self.bits):
            raise ValueError(no_recovery(self.method, self.values, self.bits))
        if self.low_memory and (why := self._needs_whole_model):
            raise ValueError(f"low_memory is given, and {why} needs the whole model: leave one of them out")
        self._check_search()
        if self.eval_data and not self.eval:
            raise ValueError("eval_data is given, and nothing is to be evaluated (`eval=False`): leave one of them out")
        return self

    def _check_search(self) -> None:
        """Raises ValueError if what is to be searched for does not fit the other settings."""
        wanted = self.searched_for
        if self.drop_of and not self.max_drop:
            raise ValueError("drop_of is for `max_drop`: give that too, or leave it out")
        if not wanted:
            return
        if self.max_drop and self.target_mb:
            raise ValueError("max_drop and `target_mb` are both given: each decides the rate, leave one of them out")
        if self.rate is not None:
            raise ValueError(f"rate is given, and {wanted} finds the rate: leave one of them out")
        if self.bits and self.bits != "auto":
            raise ValueError(
                f"bits {self.bits:g} and {wanted} are both given: leave one of them out, or give `bits` auto"
            )
        if self._settings.density is not None and self.bits is None:
            what = "`density`" if self.density else f"`method` {self.method}"
            raise ValueError(f"{wanted.strip('`')} finds the rate, and {what} has none: leave one of them out")
        if self.tensorboard:
            raise ValueError(f"tensorboard is for a run whose rate is given, and {wanted} finds the rate: leave it out")
        if self.recover:
            raise ValueError(
                f"recover and {wanted} are both given: search first, then recover at the rate that it finds"
            )
        if self.max_drop and not self.eval:
            raise ValueError("max_drop is given, and nothing is to be evaluated (`eval=False`): leave one of them out")
        if self.target_mb and self.rank_ratio == "auto":
            raise ValueError("target_mb needs sizes that are known before: give a number for `rank_ratio`, not auto")
        fixed = isinstance(self.rank_ratio, float) or methods.find(self.method).rank_ratio is not None
        if ":" in self._settings.pattern and fixed:
            raise ValueError(
                f"{wanted.strip('`')} finds the rate, which pattern {self._settings.pattern} and rank ratio "
                f"{self._settings.rank_ratio:g} fix at {self._settings.rate:g}: leave one of these out"
            )

    @property
    def _first(self) -> CompressionOptions:
        """The options of the run; where bits are searched for, of the first trial."""
        if self.bits != "auto":
            return self
        if not self.searched_for:
            raise ValueError("bits auto is searched for: give `max_drop` or `target_mb` too, or a number of bits")
        return CompressionOptions(**self.compression | {"bits": FIRST_BITS})

    @property
    def scale(self) -> Scale:
        """What a search goes along."""
        return BITS if self.bits == "auto" else RATE

    @property
    def _needs_whole_model(self) -> str:
        """What was asked for that needs the whole model in memory; empty if nothing does."""
        if not methods.find(self.method).keeps_shapes:
            return f"`method` {self.method}"
        wanted = {"`recover`": self.recover > 0, "`merge`": self.merge, self.searched_for: bool(self.searched_for)}
        return next((name for name, given in wanted.items() if given), "")

    @property
    def block_by_block(self) -> bool | None:
        """Whether to read weights when they are needed; None: if they are too large."""
        return False if self._needs_whole_model else self.low_memory

    @property
    def compression(self) -> dict[str, Any]:
        """The options that `compression.settings.resolve` takes."""
        return {name: getattr(self, name) for name in CompressionOptions.model_fields}

    @property
    def searched_for(self) -> str:
        """The setting that makes a search of the run; empty if its rate is given."""
        return "`max_drop`" if self.max_drop else "`target_mb`" if self.target_mb else ""

    def check_data(self) -> None:
        """See that there are calibration data, and that what is not a dataset's name is there: it takes no time.

        Raises:
            ConfigError: no data are given; a file of settings may leave that to a flag.
            DataError: a path does not exist.
        """
        if self.data is None and self.model != "demo":
            raise ConfigError(
                "`data` must be given for a model that is not the demo: a folder of pictures, a text or hf:name"
            )
        for name, given in (("data", self.data), ("eval_data", self.eval_data)):
            if given and given not in KNOWN_DATA and not given.startswith("hf:") and not Path(given).exists():
                close = near(given) or did_you_mean(given, KNOWN_DATA)
                raise DataError(
                    f"`{name}` {given} does not exist: give a folder of pictures, a text, hf:name or "
                    f"{', '.join(KNOWN_DATA)}.{close}"
                )

    def settings(self, storage_dtype: str | None = None) -> CompressionSettings:
        """The settings that decide the result, which were resolved when the run was.

        Args:
            storage_dtype: where none was given.
        """
        return self._settings.model_copy(update={"storage_dtype": self._settings.storage_dtype or storage_dtype})


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
        raise ConfigError(f"`config` {path}: {one_line(problem)}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"`config` {path}: must be a mapping of settings, got {type(fields).__name__}")
    odd = [name for name in fields if not isinstance(name, str)]
    if odd:
        raise ConfigError(f"`config` {path}: {odd[0]!r} is not a setting; known: {', '.join(RunConfig.model_fields)}")
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
        return build(fields | given, lambda name: name if name in fields.keys() - given else f"`{name}`")
    except ConfigError as wrong:
        raise ConfigError(f"`config` {path}: {wrong}" if path else str(wrong)) from None


def load_run_config(path: Path | None, flags: dict[str, Any]) -> RunConfig:
    """Read a YAML file of RunConfig's fields, if given, and let the flags that are not None override it.

    Raises:
        ConfigError: the file is missing, no YAML mapping, or a field is wrong.
    """
    return with_flags(path, flags, lambda fields, called: validated(RunConfig, fields, called))
