"""What a search for a rate or bits tried and found: rows that are written one by one, and all in report.json."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from oats_vision.compression.settings import CompressionSettings
from oats_vision.evaluation.results import Count, Line
from oats_vision.progress import count


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True)


class Loss(_Row):
    """What a compressed model loses against the dense one, more being worse, with the ends of its 95% interval."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat

    def __str__(self) -> str:
        value, low, high = (round(number, 2) + 0.0 for number in (self.value, self.low, self.high))  # -0.00 is 0.00
        return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


class Tried(_Row):
    """One compression of a search.

    number: from 1, in the order in which they were made. bytes: of all files that are needed to load it. failed: why
    its loss could not be measured; it counts as more than any then. skipped: pictures that could not be read.
    weights_sha256: of its weights' file. Of one that could not even be compressed there are neither bytes nor weights.
    """

    number: int = Field(ge=1, lt=1000)
    settings: CompressionSettings
    bytes: Count | None = None
    loss: Loss | None = None
    failed: Line | None = None
    seconds: FiniteFloat
    skipped: int = 0
    weights_sha256: Line | None = None

    @property
    def megabytes(self) -> str:
        """Of its files, for a table; empty if it has none."""
        return "" if self.bytes is None else f"{self.bytes / 1e6:.2f}"


class Searched(_Row):
    """A search that is done.

    sort: what is limited, the loss or the size. limit: in the loss's unit, or in bytes. loss: what is measured, in
    words, in `unit`. samples: inputs that it was measured on, each counted as one `of`. chosen: number of a trial.
    final: the chosen one's loss on `final_samples` inputs that the search did not see, if there were any.
    """

    sort: Literal["max_drop", "target_mb"]
    limit: FiniteFloat
    loss: Line
    unit: Line
    samples: int = Field(ge=0)
    of: Line
    trials: list[Tried] = Field(min_length=1, max_length=100)
    chosen: int
    final: Loss | None = None
    final_samples: int = 0

    @model_validator(mode="after")
    def _chosen_among_them(self) -> "Searched":
        if self.chosen not in {one.number for one in self.trials}:
            raise ValueError("the chosen trial is not there")
        return self

    @property
    def best(self) -> Tried:
        return next(one for one in self.trials if one.number == self.chosen)

    @property
    def sentence(self) -> str:
        """What was found, in a line."""
        best, trials = self.best, count(len(self.trials), "trial")
        size = best.settings.size
        found = f"{size[0].upper()}{size[1:]}, found in {trials}"
        if best.loss is None:
            return f"{found}."
        found += f": {self.loss}, {self.unit}: {best.loss} on the {self.samples:,} {self.of} of the search"
        return f"{found}." if self.final is None else f"{found}, {self.final} on {self.final_samples:,} others."


def varied(settings: CompressionSettings) -> dict[str, str]:
    """What trials of a search differ in, by its heading."""
    ratio = settings.rank_ratio if isinstance(settings.rank_ratio, str) else f"{settings.rank_ratio:.3g}"
    own = (
        {"bits a weight": f"{settings.bits:g}"}
        if settings.bits
        else {"rate": f"{settings.rate:.3g}", "rank ratio": ratio}
    )
    return own | {"stored in": str(settings.storage_dtype)}
