"""What is measured of a compressed model: the one form of it in report.json, `eval --json`, pages and tables.

Files are read by the same types, those of earlier versions too.
"""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, SerializeAsAny, model_validator

EXAMPLES = 12  # pictures that are shown
PICTURE = 100_000  # characters of a picture's address at most
LINE = 1_000  # characters of a name or of a line of advice at most

Line = Annotated[str, Field(max_length=LINE)]
Count = Annotated[int, Field(ge=1, lt=1 << 48)]
Seconds = Annotated[float, Field(gt=1e-9, lt=1e9)]
Address = Annotated[str, Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/=]*$", max_length=PICTURE)]
Kind = Literal["percent", "number", "ratio"]


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True)


class Figure(_Result):
    """One value of one model.

    kind: `percent` (0 to 100), `number` (a perplexity, a cosine, a relative error), or `ratio` (compressed to dense).
    """

    name: Line
    kind: Kind
    value: FiniteFloat
    lower_is_better: bool = False

    @property
    def figure(self) -> str:
        """The value as it is shown."""
        return f"{self.value:.2f}%" if self.kind == "percent" else f"{self.value:.3f}{' x' * (self.kind == 'ratio')}"


class Metric(Figure):
    """A figure of the compressed model beside the dense one, with its 95% confidence interval."""

    low: FiniteFloat
    high: FiniteFloat

    @model_validator(mode="before")
    @classmethod
    def _of_an_earlier_version(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or "lower_is_better" in fields:
            return fields
        lower = fields.get("kind") == "ratio" or "error" in str(fields.get("name"))
        return fields | {"lower_is_better": lower}

    @property
    def figure(self) -> str:
        return self._shown(self.value)

    @property
    def interval(self) -> str:
        """The interval as it is shown, in brackets."""
        return f"[{self._shown(self.low, unit=False)}, {self._shown(self.high, unit=False)}]"

    def __str__(self) -> str:
        return f"{self.figure} {self.interval}"

    def _shown(self, value: float, unit: bool = True) -> str:
        if self.kind == "percent":
            return f"{value:.1f}{'%' * unit}"
        return f"{value:.4f}{' x' * (unit and self.kind == 'ratio')}"


@dataclass(frozen=True)
class Difference:
    """Compressed minus dense, in points of accuracy, with a 95% confidence interval.

    p_value: of McNemar's exact test that both are equally accurate.
    """

    points: float
    low: float
    high: float
    p_value: float

    @property
    def value(self) -> float:
        return self.points

    @property
    def words(self) -> tuple[str, str, str]:
        """The value, its unit and its interval as they are shown."""
        return f"{self.points:+.2f}", " points", f"[{self.low:+.2f}, {self.high:+.2f}]"

    def around(self, dense: float) -> tuple[float, float]:
        """The interval of the compressed model's value."""
        return dense + self.low, dense + self.high

    def moved(self, value: float, low: float, high: float) -> "Difference":
        """Another one, such as a mean over several runs, of which no test is known."""
        return Difference(value, low, high, math.nan)

    def __str__(self) -> str:
        return f"{self.points:+.2f} points [{self.low:+.2f}, {self.high:+.2f}]"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """Compressed perplexity as a multiple of the dense one, with a 95% confidence interval."""

    value: float
    low: float
    high: float

    @property
    def words(self) -> tuple[str, str, str]:
        """The value, its unit and its interval as they are shown."""
        return f"{self.value:.3f}", " x", f"[{self.low:.3f}, {self.high:.3f}]"

    def around(self, dense: float) -> tuple[float, float]:
        """The interval of the compressed model's value."""
        return dense * self.low, dense * self.high

    def moved(self, value: float, low: float, high: float) -> "Ratio":
        """Another one, such as a mean over several runs."""
        return Ratio(value, low, high)

    def __str__(self) -> str:
        return f"{self.value:.4f} x [{self.low:.4f}, {self.high:.4f}]"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Score(_Result):
    """One model's figures by one protocol.

    metrics: the one that says most first. samples: pictures or tokens that they were measured on, in `unit`. In JSON
    the protocol's own fields stand beside these, such as `top1`, `perplexity`, `skipped` or `pictures_per_second`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    metrics: list[Figure] = Field(min_length=1)
    samples: Count | None = None
    unit: Line = "pictures"

    @model_validator(mode="before")
    @classmethod
    def _of_an_earlier_version(cls, fields: Any) -> Any:
        """Earlier ones give top-1 in percent, alone or by k or task, or a perplexity, and no `metrics`."""
        if not isinstance(fields, dict) or "metrics" in fields:
            return fields
        top1, perplexity = fields.get("top1"), fields.get("perplexity")
        if perplexity is not None:
            found = [{"name": "perplexity", "kind": "number", "value": perplexity, "lower_is_better": True}]
        else:
            by_name = top1 if isinstance(top1, dict) else {} if top1 is None else {"top-1": top1}
            found = [
                {"name": f"k = {name}" if str(name).isdecimal() else name, "kind": "percent", "value": value}
                for name, value in by_name.items()
            ]
        tokens = fields.get("tokens")
        samples = fields.get("pictures") or fields.get("val_pictures") or tokens
        return {"metrics": found, "samples": samples, "unit": "pictures" if tokens is None else "tokens"} | fields

    def __getitem__(self, name: str) -> Figure:
        """The metric of a name."""
        return next(metric for metric in self.metrics if metric.name == name)

    @property
    def names(self) -> list[str]:
        return [metric.name for metric in self.metrics]

    @property
    def count(self) -> str:
        """How much it was measured on, if that is known."""
        return f"{self.samples:,} {self.unit}" if self.samples else ""


class Evaluation(_Result):
    """One protocol on one set of data: the compressed model, the dense one, or both and their differences.

    data, or train and val: where the data are from. settings: of the protocol. model: directory of the compressed
    model. difference: by the name of a metric. machine, dtype: that it was measured on, and in, if known.
    """

    protocol: str
    data: str | None = None
    train: str | None = None
    val: str | None = None
    settings: dict[str, Any] = {}
    model: str = ""
    dense: SerializeAsAny[Score] | None = None
    compressed: SerializeAsAny[Score] | None = None
    difference: dict[str, Difference | Ratio] = {}
    machine: dict[str, Any] = {}
    dtype: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def where(self) -> str:
        """The data that it was measured on."""
        return self.data or f"{self.train} → {self.val}"

    @property
    def scores(self) -> dict[str, Score]:
        """By what each is of, `dense` first."""
        both = {"dense": self.dense, "compressed": self.compressed}
        return {which: score for which, score in both.items() if score is not None}

    @property
    def compared(self) -> str | None:
        """The first metric of which both values and their difference are known."""
        return next((name for name in self.difference if self.figures(name)[0] and self.figures(name)[1]), None)

    def figures(self, name: str) -> tuple[Figure | None, Figure | None]:
        """What the dense and the compressed model reach in a metric."""
        dense, compressed = (
            next((one for one in score.metrics if one.name == name), None) if score else None
            for score in (self.dense, self.compressed)
        )
        return dense, compressed

    def pair(self, name: str) -> tuple[Figure, Figure]:
        """`figures` of a metric that is `compared`."""
        dense, compressed = self.figures(name)
        assert dense is not None
        assert compressed is not None
        return dense, compressed

    def rows(self) -> list[list[str]]:
        """Metric, dense, compressed and change, for each metric."""
        names = dict.fromkeys(name for score in self.scores.values() for name in score.names)
        return [
            [name, *(one.figure if one else "" for one in self.figures(name)), self._change(name)] for name in names
        ]

    def _change(self, name: str) -> str:
        """The difference in a metric as it is shown, without its interval where that is not known."""
        dense, compressed = self.figures(name)
        if name in self.difference:
            return str(self.difference[name])
        if dense is None or compressed is None or compressed.kind != "percent":
            return ""
        return f"{compressed.value - dense.value:+.2f} points"


class Cost(_Result):
    """How close the compressed model stays to the dense one, without labels.

    samples: pictures (or sequences) that it was measured on, none of which calibration has seen. metrics: the one that
    says most comes first.
    """

    unit: Literal["pictures", "sequences"]
    samples: int = Field(ge=1)
    metrics: list[Metric] = Field(min_length=1)


class Answer(_Result):
    """What a model says of a picture: its likeliest class, and the share of probability that it gives it."""

    label: str
    share: FiniteFloat


class Example(_Result):
    """A picture on which both models differ most.

    thumbnail, maps: `data:` addresses of small pictures; maps show the patch features, dense and compressed, by their
    first three principal components in red, green and blue. cosine: of all the picture's features, if known.
    """

    name: str
    thumbnail: Address
    dense: Answer | None = None
    compressed: Answer | None = None
    cosine: FiniteFloat | None = None
    maps: list[Address] = []
