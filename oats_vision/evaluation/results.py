"""What a run measures of the model that it made, as its report.json holds it; files are read by the same types."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

EXAMPLES = 12  # pictures that are shown
PICTURE = 100_000  # characters of a picture's address at most
Address = Annotated[str, Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/=]*$", max_length=PICTURE)]


class _Measured(BaseModel):
    model_config = ConfigDict(frozen=True)


class Metric(_Measured):
    """One figure with its 95% confidence interval.

    kind: `percent` (0 to 100), `number` (a cosine, a relative error), or `ratio` (compressed to dense).
    """

    name: str
    kind: Literal["percent", "number", "ratio"]
    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat

    @property
    def figure(self) -> str:
        """The value as it is shown."""
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


class Cost(_Measured):
    """How close the compressed model stays to the dense one, without labels.

    samples: pictures (or sequences) that it was measured on, none of which calibration has seen. metrics: the one that
    says most comes first.
    """

    unit: Literal["pictures", "sequences"]
    samples: int = Field(ge=1)
    metrics: list[Metric] = Field(min_length=1)


class Answer(_Measured):
    """What a model says of a picture: its likeliest class, and the share of probability that it gives it."""

    label: str
    share: FiniteFloat


class Example(_Measured):
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
