"""`oats-vision eval perplexity`: how well a language model predicts a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from oats_vision.evaluation.protocols.base import Given, Measurement, protocol
from oats_vision.evaluation.protocols.settings import OneText

if TYPE_CHECKING:
    from torch import nn

EXAMPLES = """\
  oats-vision eval perplexity smollm2_50 --data wikitext
  oats-vision eval perplexity smollm2_50 --data notes.txt \\
    --sequence-length 1024 --stride 512"""


class PerplexitySettings(OneText):
    """Those of published WikiText-2 figures by default."""

    samples: int | None = Field(None, ge=1, description="the first windows only [default: all]")
    sequence_length: int = Field(2048, ge=2, description="tokens in a window")
    stride: int | None = Field(
        None, ge=1, description="tokens from the start of a window to the next one's [default: `sequence_length`]"
    )

    @property
    def tokens(self) -> int | None:
        """Those of the windows."""
        if self.samples is None:
            return None
        return self.sequence_length + (self.samples - 1) * (self.stride or self.sequence_length)


@protocol("perplexity", PerplexitySettings, rank=1, examples=EXAMPLES)
def perplexity(model: nn.Module, given: Given[PerplexitySettings]) -> Measurement:
    """Perplexity of a language model.

    By default the convention of published WikiText-2 figures: the documents joined by empty lines, windows of 2,048
    tokens that do not overlap, an incomplete last one left out. The ratio's interval is over windows.
    """
    from oats_vision.evaluation import perplexity as text

    settings = given.settings
    length, stride = settings.sequence_length, settings.stride
    ids = given.data["data"][: settings.tokens]
    windows = max(len(ids) - length, 0) // (stride or length) + 1
    with given.display.counting(f"perplexity {given.which}", "windows", windows) as progress:
        score = text.perplexity(
            model, ids, sequence_length=length, stride=stride, batch_size=settings.batch_size, progress=progress
        )
    details = score.to_dict()
    return Measurement(
        compared={"perplexity": score},
        samples=details["tokens"],
        unit="tokens",
        details=details,
        lines={
            "tokens/s": f"{details['tokens_per_second']:.0f}",
            "windows": f"{details['windows']} of {length} tokens",
        },
    )
