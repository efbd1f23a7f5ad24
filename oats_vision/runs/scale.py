"""What a search goes along: the rate or the bits, in whole steps from the largest model to the smallest."""

from dataclasses import dataclass, replace
from typing import Literal

from oats_vision.compression.settings import LEAST_BITS, MOST_BITS, CompressionSettings


@dataclass(frozen=True)
class Scale:
    """A setting that decides how large a model is: `start + step * size` at a step.

    lowest, highest: steps; perhaps not possible for a model.
    """

    name: Literal["rate", "bits"]
    start: float
    size: float
    lowest: int
    highest: int

    def at(self, step: int) -> float:
        return round(self.start + step * self.size, 4)

    def step(self, settings: CompressionSettings) -> int:
        """Where settings are, to the nearest step."""
        value = settings.rate if self.name == "rate" else settings.bits or 0.0
        return round((value - self.start) / self.size)

    def finer(self, times: int) -> "Scale":
        """The same with so many steps in the place of one."""
        return replace(self, size=self.size / times, lowest=self.lowest * times, highest=self.highest * times)

    @property
    def ends(self) -> str:
        """In words: from the smallest model to the largest."""
        return f"{self.name} from {self.at(self.highest):g} to {self.at(self.lowest):g}"


RATE = Scale("rate", 0.0, 0.01, 5, 95)
BITS = Scale("bits", MOST_BITS, -1 / 16, 0, round(16 * (MOST_BITS - LEAST_BITS)))
FIRST_BITS = 4.0  # to begin with
