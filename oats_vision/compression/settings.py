"""How to compress: what a user may give, and the settings that follow from it, each with its range and default."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from oats_vision.compression import methods
from oats_vision.core.budget import Allocation, Pattern
from oats_vision.errors import ConfigError, did_you_mean
from oats_vision.fields import OneOf, what_is_wrong

if TYPE_CHECKING:
    from oats_vision.core.grid import Grid

Scaling = Literal["second_moment", "median", "none"]
Dtype = Literal["float32", "float16", "bfloat16"]
Solver = Literal["fast", "exact"]
Quality = Literal["best", "fast", "plain"]
Budgets = Literal["uniform", "measured", "owl", "alphapruning"]
OnBadLayer = Literal["stop", "dense"]
Values = Literal["int8", "int6", "int5", "int4", "int3", "int2", "nf4", "nf3", "nf2"]
FactorValues = Literal["int8", "floating"]
Ratio = Annotated[float, Field(ge=0, le=1)]
# of a weight, with the 16 bits of each scale: the smallest format there is, 2 bits in groups of 128, and more than the
# largest, 8 bits in groups of 128, since groups at the ends of rows are shorter
LEAST_BITS, MOST_BITS = 2.125, 8.25
Bits = Annotated[float, Field(ge=LEAST_BITS, le=MOST_BITS)]
LEVERS = ("joint", "refit", "targets", "sensitivity")
# by what is used of these, and how budgets are shared out
QUALITIES: dict[tuple[tuple[str, ...], Budgets], Quality] = {
    (LEVERS, "measured"): "best",
    (("refit",), "uniform"): "fast",
    ((), "uniform"): "plain",
}
PATTERNS = ("row", "layer", "2:4", "2:8")  # N:M may be any
FIRST_GUESS = 0.2  # of rank ratio auto, before any layer is timed


class _Shared(BaseModel):
    """Both kinds' fields in their order; the first few are narrower in one kind than in the other."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str
    rate: float | None
    rank_ratio: Ratio | Literal["auto"] | None
    pattern: str | None
    refit: bool | None
    joint: bool | None
    targets: bool | None
    sensitivity: bool | None
    budget: Budgets | None
    values: Values | None = Field(None, description="bits of the values of S [default: floating; rtn, gptq: int4]")
    factors: FactorValues | None = Field(None, description="with values: int8 or floating U and V [default: int8]")
    density: float | None = Field(
        None,
        gt=0,
        le=1,
        description="in place of a rate: share of the weights that S keeps; 1: all",
    )
    bits: Bits | Literal["auto"] | None
    group_size: int = Field(64, ge=0, description="with values: columns that share a scale, a multiple of 16; 0: a row")
    symmetric: bool = Field(True, description="with values: levels symmetric about 0; else each group has its own zero")
    act_order: bool = Field(False, description="method gptq: columns of the largest inputs first")
    error_tolerance: float = Field(
        0.05, ge=0, description="with rank ratio auto: share by which a layer's error may exceed the lowest"
    )
    latency_tokens: int | None = Field(
        None,
        ge=1,
        description="with rank ratio auto: tokens to time a layer with [default: those of a picture; 1 for text]",
    )
    iterations: int = Field(80, ge=1, description="of alternating thresholding, at most; 20 before joint rounds")
    solver: Solver = Field("fast", description="fast: warm-started and extrapolated; exact: SVDs")
    tolerance: float = Field(1e-3, ge=0, lt=1, description="fast stops when ten iterations gain less; 0: never")
    scaling: Scaling = Field("second_moment", description="statistic of the inputs that scales the columns")
    fused_qkv: Literal["split", "joint"] = Field("split", description="decompose a fused qkv as three matrices or one")
    storage_dtype: Dtype | None = Field(
        None, description="precision of the stored weights [default: the model's own; few bits: float16]"
    )
    on_bad_layer: OnBadLayer = Field(
        "stop", description="a layer that cannot be decomposed or stored: stop, or leave it dense"
    )
    skip: tuple[str, ...] = Field(
        (), description="linears or blocks to leave dense, such as '*.mlp.fc2'; may be repeated"
    )

    @field_validator("group_size")
    @classmethod
    def _whole_words(cls, group_size: int) -> int:
        if group_size % 16:
            raise ValueError(f"group_size must be 0 or a multiple of 16, got {group_size}")
        return group_size

    @field_validator("skip", mode="before")
    @classmethod
    def _one_or_more(cls, skip: Any) -> Any:
        if skip is not None and not isinstance(skip, (str, list, tuple)):
            raise ValueError(f"skip must be a name or a list of names, got {skip!r}")
        return (skip,) if isinstance(skip, str) else skip or ()


class CompressionSettings(_Shared):
    """Settings that are complete: all that the result depends on, besides the model and the calibration data.

    They are made once, by `resolve`, and read from checkpoints; `rank_ratio` is the method's own where it has one.
    """

    method: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]  # of a checkpoint perhaps one that is not registered here
    rate: float
    rank_ratio: Ratio | Literal["auto"]
    pattern: str
    refit: bool
    joint: bool = False  # which checkpoints of earlier versions do not name
    targets: bool = False
    sensitivity: bool = False
    budget: Budgets = "uniform"
    bits: Bits | None = None

    @property
    def follows_calls(self) -> bool:
        """Whether something is measured of one call of each linear in a pass: targets, or gradients."""
        return bool(self.targets or self.sensitivity or self.bits) or self.budget == "measured"

    @property
    def allocation(self) -> Allocation:
        """How each layer's parameters are shared out; of rank ratio auto a first guess."""
        ratio = FIRST_GUESS if self.rank_ratio == "auto" else self.rank_ratio
        return Allocation(self.rate, ratio, Pattern.parse(self.pattern), self.grid, self.factors == "int8")

    @property
    def grid(self) -> "Grid | None":
        """That the values of S are rounded to, if they have few bits."""
        if not (self.values or self.bits):
            return None
        from oats_vision.core.grid import Grid

        if self.bits:  # before formats are chosen: the largest that fits
            return Grid(max(bits for bits in (2, 3, 4, 5, 6, 8) if bits + 0.125 <= self.bits), 128)
        return Grid.parse(str(self.values), self.group_size, self.symmetric)

    @property
    def quality(self) -> Quality | None:
        """The one that its levers and its budget are those of; None of others."""
        used = tuple(lever for lever in LEVERS if getattr(self, lever))
        return QUALITIES.get((used, self.budget)) if self.method == "oats" else None

    @property
    def size(self) -> str:
        """What it is asked to come to, in words: a rate, a number of bits, or a format."""
        if self.bits:
            return f"{self.bits:g} bits a weight"
        if self.density is None:
            return f"rate {self.rate:.3g}" + f", {self.grid}" * bool(self.grid)
        return f"density {self.density:.3g}, {self.grid}" if self.density < 1 else str(self.grid)

    @property
    def named(self) -> dict[str, Any]:
        """By name, without what is not set, and what has no say beside the others."""
        idle = {"act_order"} if self.method != "gptq" else set[str]()
        if self.bits:  # chooses the format of each linear
            idle |= {"rate", "rank_ratio", "pattern", "density", "group_size", "symmetric"}
        elif not self.grid:
            idle |= {"group_size", "symmetric"}
        if self.density is not None:
            idle |= {"rate", "pattern"} if self.density == 1 else {"rate"}
        if self.rank_ratio != "auto":
            idle |= {"error_tolerance", "latency_tokens"}
        fields = self.model_dump().items()
        return {name: value for name, value in fields if value not in (None, ()) and name not in idle}

    @property
    def summary(self) -> str:
        """Method, quality, rate, rank ratio and pattern in words."""
        used = f" {self.quality}" if self.quality else "".join(f" + {name}" for name in LEVERS if getattr(self, name))
        skipped = f", without {' '.join(self.skip)}" if self.skip else ""
        if self.bits:
            return f"{self.method}{used}, {self.bits:g} bits a weight{skipped}"
        parts = [f"{self.method}{used}"]
        if self.density is None:
            parts.append(f"rate {self.rate:.3g}")
        elif self.density < 1:
            parts.append(f"density {self.density:.3g}")
        if self.values:
            parts.append(f"{self.grid}{', act order' * self.act_order}")
        if self.density != 1 or self.rank_ratio:
            share = self.rank_ratio if self.rank_ratio == "auto" else f"{self.rank_ratio:.3g}"
            parts += [f"rank ratio {share}{f', {self.factors} U and V' * bool(self.factors)}", self.pattern]
        if not self.quality and self.budget != "uniform":
            parts.append(f"{self.budget} budgets")
        return ", ".join(parts) + skipped


class CompressionOptions(_Shared):
    """What a user gives: anything left out is the method's own, or follows from the rest."""

    method: Annotated[str, OneOf(methods.names)] = Field("oats", description="oats, or a baseline to compare it with")
    rate: float | None = Field(None, gt=0, lt=1, description="share of parameters removed [default: 0.5]")
    rank_ratio: Ratio | Literal["auto"] | None = Field(
        None,
        description="low-rank share of what is kept; auto: the fastest for each layer "
        "[default: 0.2; baselines: their own]",
    )
    pattern: str | None = Field(
        None,
        description="non-zeros by row, by layer or N:M, such as 2:4 [default: row; baselines: their own]",
    )
    bits: Bits | Literal["auto"] | None = Field(
        None, description="bits a weight in place of a rate; auto: a search finds them (compress alone)"
    )
    budget: Budgets | None = Field(
        None,
        description="how the rate is shared out over the layers "
        "[default: measured with sensitivity; uniform without, and for N:M, a density and rank ratio auto]",
    )
    quality: Quality | None = Field(
        None,
        description="plain: the paper's OATS; fast: + refit; best: + joint, targets, sensitivity [default: best]",
    )
    refit: bool | None = Field(
        None,
        description="least-squares fit of S, U, V to the outputs [default: by quality]",
    )
    joint: bool | None = Field(None, description="choose positions by the inputs' correlations [default: by quality]")
    targets: bool | None = Field(
        None,
        description="aim at the dense model's outputs [default: by quality; baselines: no]",
    )
    sensitivity: bool | None = Field(
        None, description="weigh errors by what they do to the output [default: by quality]"
    )

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            return str(Pattern.parse(pattern))
        except ValueError as wrong:
            raise ValueError(f"{wrong}{'.' * bool(hint := did_you_mean(pattern, PATTERNS))}{hint}") from None

    def resolved(self) -> CompressionSettings:
        """The settings that follow.

        Raises:
            ValueError: what was given does not fit together; begins with the name of a field.
        """
        if self.bits == "auto":
            raise ValueError("bits auto is for a search (`max_drop` or `target_mb` of a run): give a number")
        method = methods.find(self.method)
        method.check(self)
        pattern = Pattern.parse(self.pattern or method.pattern)
        ratio = self.rank_ratio if isinstance(self.rank_ratio, float) else method.rank_ratio
        density = 1.0 if self.bits else method.density if self.density is None else self.density
        allocation = Allocation.of(self.rate, ratio, pattern, density)
        values = self.values or method.values
        storage = self.storage_dtype or ("float16" if values or self.bits else None)
        return CompressionSettings(
            **{name: getattr(self, name) for name in _Shared.model_fields}
            | {
                "rate": allocation.rate,
                "rank_ratio": "auto" if self.rank_ratio == "auto" else allocation.rank_ratio,
                "pattern": str(pattern),
                "budget": self.budget or method.budget(self),
                "values": values,
                "factors": self.factors or ("int8" if values and allocation.rank_ratio else None),
                "density": density,
                "storage_dtype": storage,
                **method.levers(self),
            }
        )


def no_recovery(method: str, values: str | None, bits: float | str | None) -> str:
    """Why what these options round to few bits cannot be recovered, and what to do."""
    rounding = "`bits`" if bits else "`values`" if values else f"method {method}"
    return f"recover trains floating values, which {rounding} rounds: leave one of them out"


def resolve(**options: Any) -> CompressionSettings:
    """Settings from options by name, each checked.

    Args:
        options: fields of `CompressionOptions`.

    Raises:
        ConfigError: one line that names each field that is wrong, what it was and what is allowed.

    >>> settings = resolve(rate=0.4)
    >>> settings.method, settings.rank_ratio, settings.pattern, settings.refit
    ('oats', 0.2, 'row', True)
    """
    try:
        return CompressionOptions(**options).resolved()
    except ValidationError as invalid:
        raise ConfigError(what_is_wrong(CompressionOptions, invalid)) from None
    except ValueError as wrong:
        raise ConfigError(str(wrong)) from None
