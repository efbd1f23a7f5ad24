"""The grid of a sweep: every compression that it is made of, checked before any work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from oats_vision.compression import methods
from oats_vision.compression.settings import CompressionOptions, CompressionSettings, resolve
from oats_vision.core.budget import Pattern
from oats_vision.errors import ConfigError
from oats_vision.fields import validated
from oats_vision.runs.config import RunConfig, with_flags

OUT = Path("oats_sweep")
AXES = ("method", "rate", "bits", "rank_ratio", "pattern")
OF_QUALITY = ("quality", "refit", "joint", "sensitivity")  # settings of methods that have a quality
# settings that mean nothing here
FOR_ONE_RUN = (
    "overwrite",
    "restart",
    "merge",
    "recover",
    "max_drop",
    "drop_of",
    "target_mb",
    "tensorboard",
    "low_memory",
)


class Extent(BaseModel):
    """What a sweep has besides the settings of its runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seeds: int = Field(1, ge=1, description="draws of calibration data for each cell")
    keep: bool = Field(False, description="keep each cell's checkpoint, in OUT/NAME")


@dataclass(frozen=True)
class Grid:
    """The cells, in the order in which they are done; those that cannot be, and why; and what else is to be said."""

    cells: tuple[CompressionSettings, ...]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SweepConfig:
    """One sweep.

    base: what all cells share. seeds: of the calibration data of each cell. keep: the cells' checkpoints.
    """

    base: RunConfig
    grid: Grid
    seeds: tuple[int, ...]
    out: Path
    keep: bool


def load_sweep_config(path: Path | None, flags: dict[str, Any]) -> SweepConfig:
    """Read a YAML file of a sweep's settings, if given, and let the flags that are not None override it.

    Raises:
        ConfigError: the file is missing, no YAML mapping, or a setting is wrong.
    """
    return with_flags(path, flags, _build)


def sweep_config(**fields: Any) -> SweepConfig:
    """A sweep over the grid of `method`, `rate` and `bits`, `rank_ratio` and `pattern`, each one value or several.

    Args:
        fields: these, `seeds` (how many draws of the calibration data), `keep` (the cells' checkpoints), and the
            settings of `RunConfig` that all cells share.

    Raises:
        ConfigError: a setting is unknown or out of range, or no cell of the grid can be.
    """
    return _build(fields, str)


def _build(fields: dict[str, Any], called: Callable[[str], str]) -> SweepConfig:
    if alone := [name for name in FOR_ONE_RUN if fields.get(name)]:
        raise ConfigError(f"{called(alone[0])} is not a setting of a sweep: leave it out")
    own = {name: fields[name] for name in Extent.model_fields if name in fields}
    extent = validated(Extent, own, called)
    shared = {name: value for name, value in ({"out": OUT} | fields).items() if name not in {*own, *AXES}}
    base = validated(RunConfig, shared, called)
    settings = base.model_fields_set & CompressionOptions.model_fields.keys()
    axes = {name: _values(name, fields.get(name), called) for name in AXES}
    if "auto" in axes["bits"]:
        raise ConfigError(f"{called('bits')} auto is not for a sweep: give a number")
    grid = expand({name: getattr(base, name) for name in settings}, **axes)
    seeds = tuple(range(base.seed, base.seed + extent.seeds))
    return SweepConfig(base, grid, seeds, base.out, extent.keep)


def _values(name: str, given: Any, called: Callable[[str], str]) -> list[Any]:
    """What is given of an axis, one value or several. Raises ConfigError for one that is wrong by itself."""
    values = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return [getattr(validated(CompressionOptions, {name: value}, called), name) for value in values]


def expand(
    shared: dict[str, Any],
    method: Sequence[Any] = (),
    rate: Sequence[Any] = (),
    bits: Sequence[Any] = (),
    rank_ratio: Sequence[Any] = (),
    pattern: Sequence[Any] = (),
) -> Grid:
    """Every combination that can be, once.

    Rates and bits are sizes, one after the other. Bits choose rank and positions, so they are done once for all rank
    ratios and patterns; a method without a choice of one of these (of bits) is done once for all of them; and N:M,
    where the rank ratio is given, once for all rates, since its rate follows from it.

    Args:
        shared: settings of all cells.
        method, rate, bits, rank_ratio, pattern: values that are right by themselves; none: the default.

    Raises:
        ConfigError: no combination can be.
    """
    cells: dict[str, CompressionSettings] = {}
    skipped: dict[str, None] = {}
    notes: dict[str, None] = {}
    sizes = [{"rate": one} for one in rate] + [{"bits": one} for one in bits] or [{}]
    for name, shape, size, ratio in product(method or ["oats"], pattern or [None], sizes, rank_ratio or [None]):
        cell = {"method": name, "pattern": shape, "rate": None, "bits": None, **size, "rank_ratio": ratio}
        asked = cell["rate"]
        notes |= dict.fromkeys(_fit(cell))
        own = () if methods.find(cell["method"]).has_quality else OF_QUALITY
        others = {name: value for name, value in shared.items() if name not in own}
        try:
            settings = resolve(**others | cell)
        except ConfigError as wrong:
            given = [f"{name.replace('_', ' ')} {value}" for name, value in cell.items() if value is not None]
            skipped[f"{', '.join(given).removeprefix('method ')}: {wrong}"] = None
        else:
            if asked not in (None, settings.rate) and settings.density is None:
                notes[f"{cell_words(settings)}: the rate follows from the pattern and the rank ratio"] = None
            cells.setdefault(cell_name(settings), settings)
    if not cells:
        raise ConfigError(f"no cell of the grid is possible: {'; '.join(skipped)}")
    return Grid(tuple(cells.values()), tuple(skipped), tuple(notes))


def _fit(cell: dict[str, Any]) -> list[str]:
    """Leave out of a cell what its method or its pattern decides.

    Returns:
        What is to be said of it.
    """
    method, notes = methods.find(cell["method"]), list[str]()
    if cell["bits"] and method.density is not None:
        notes.append(f"{method.name} has a format of its own: it runs once for all bits of the grid")
        cell["bits"] = None
    if cell["bits"] and method.rank_ratio is None:
        if (cell["rank_ratio"], cell["pattern"]) != (None, None):
            notes.append("bits have neither rank ratio nor pattern: they run once for all of the grid's")
        cell["rank_ratio"] = cell["pattern"] = None
    if method.rank_ratio is not None:
        if cell["rank_ratio"] not in (None, method.rank_ratio):
            notes.append(
                f"{method.name} has its own rank ratio, {method.rank_ratio:g}: it runs once for all of the grid's"
            )
        cell["rank_ratio"] = None
    if method.density is not None:
        if cell["rate"] is not None:
            notes.append(f"{method.name} has no rate: it runs once for all of the grid's")
        cell["rate"] = None
    if not method.keeps_sparse:
        if cell["pattern"] not in (None, method.pattern):
            notes.append(f"{method.name} keeps no sparse matrix: it runs once for all patterns of the grid")
        cell["pattern"] = None
    fixed = cell["pattern"] and Pattern.parse(cell["pattern"]).kind == "n:m"
    if fixed and cell["rate"] is not None and (method.rank_ratio is not None or isinstance(cell["rank_ratio"], float)):
        cell["rate"] = None
    return notes


def cell_name(settings: CompressionSettings) -> str:
    """What tells a cell from the others of its sweep, fit for the name of a file."""
    method = methods.find(settings.method)
    ratio = [] if method.rank_ratio is not None else [_short(settings.rank_ratio)]
    pattern = [settings.pattern.replace(":", "of")] if method.keeps_sparse else []
    if settings.bits:
        return f"{settings.method}-{settings.bits:g}bits"
    size = [_short(settings.rate)] if settings.density is None else []
    rounded = [settings.grid.short.replace("/", "x") + "z" * (not settings.symmetric)] if settings.grid else []
    whole = settings.density == 1 and not settings.rank_ratio
    factors = ["floating"] * (settings.factors == "floating")
    return "-".join([settings.method, *size, *([] if whole else ratio), *pattern, *rounded, *factors])


def cell_words(settings: CompressionSettings) -> str:
    """The same for people."""
    method = methods.find(settings.method)
    ratio = "" if method.rank_ratio is not None else f", rank ratio {_short(settings.rank_ratio)}"
    pattern = "" if settings.pattern == method.pattern else f", {settings.pattern}"
    if settings.density is not None or settings.grid:
        return f"{settings.method}, {settings.size}{ratio * bool(settings.rank_ratio)}{pattern}"
    return f"{settings.method}, rate {_short(settings.rate)}{ratio}{pattern}"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
