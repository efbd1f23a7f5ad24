"""What protocols may be asked for: data to measure on and how they are read; the options of `oats-vision eval`.

A description may end with `[default: ...]`, where the default depends on something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from oats_vision.compression.settings import Dtype
from oats_vision.progress import Unit

if TYPE_CHECKING:
    import torch

    from oats_vision.data.pictures import Batches
    from oats_vision.models.transforms import Transform

LABELLED = "labelled pictures: one folder per class, hf:name or demo"


class Settings(BaseModel):
    """Base of all; `unit` says the task: what the model must read."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    unit: ClassVar[Unit]

    def open(self, reader: Any) -> dict[str, Any]:
        """The data, by the name of each source.

        Args:
            reader: the model's transform of pictures, or its tokenizer.

        Raises:
            DataError: something is missing, or cannot be read.
        """
        return {}

    @property
    def where(self) -> Mapping[str, str]:
        """Where the data are from: `data`, or `train` and `val`."""
        return {name: getattr(self, name) for name in ("data", "train", "val") if hasattr(self, name)}

    @property
    def variant(self) -> str:
        """A word before the protocol's title, where the settings make another one of it."""
        return ""


class OnPictures(Settings):
    """A protocol on pictures."""

    unit = "pictures"

    batch_size: int = Field(64, ge=1, description="pictures in a batch")
    seed: int = Field(42, ge=0, lt=1 << 63, description="seed for choosing the pictures")
    mixed_precision: Dtype | None = Field(None, description="precision of matrix products alone (autocast)")
    streaming: bool = Field(False, description="stream a Hugging Face dataset")
    workers: int = Field(0, ge=0, description="processes that read pictures")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Of matrix products, if it is another one than the model's."""
        from oats_vision.machine import dtype_of

        return dtype_of(self.mixed_precision) if self.mixed_precision else None

    def labelled(
        self, source: str, split: str, samples: int | None, transform: Transform, held_out: int = 0
    ) -> Batches:
        """Labelled pictures, read as these settings say.

        Args:
            held_out: with `samples`, others that are kept apart.
        """
        from oats_vision.data.pictures import load_pictures

        return load_pictures(
            source,
            transform,
            samples=samples,
            labelled=True,
            split=split,
            batch_size=self.batch_size,
            seed=self.seed,
            streaming=self.streaming,
            workers=self.workers,
            held_out=held_out,
        )


class LabelledPictures(OnPictures):
    """A protocol on one set of labelled pictures."""

    data: str = Field(description=LABELLED)
    split: str = Field("validation", description="split of the data, if a Hugging Face dataset")
    samples: int | None = Field(None, ge=1, description="evaluate on this many pictures [default: all]")

    def open(self, reader: Any) -> dict[str, Any]:
        return {"data": self.labelled(self.data, self.split, self.samples, reader)}


class TrainAndVal(OnPictures):
    """A protocol that learns from one set of labelled pictures and is evaluated on another."""

    train: str = Field(description="labelled pictures to learn from, as for `val`")
    val: str = Field(description=f"{LABELLED.replace('pictures', 'pictures to evaluate on')}")
    train_split: str = Field("train", description="split of `train`, if a Hugging Face dataset")
    val_split: str = Field("validation", description="split of `val`, if a Hugging Face dataset")
    train_samples: int | None = Field(None, ge=1, description="learn from this many pictures [default: all]")
    val_samples: int | None = Field(None, ge=1, description="evaluate on this many pictures [default: all]")

    def open(self, reader: Any) -> dict[str, Any]:
        return {
            "train": self.labelled(self.train, self.train_split, self.train_samples, reader),
            "val": self.labelled(self.val, self.val_split, self.val_samples, reader),
        }


class OnText(Settings):
    """A protocol on text."""

    unit = "sequences"

    batch_size: int = Field(1, ge=1, description="sequences in a batch")


class OneText(OnText):
    """A protocol on one text, opened as token ids (tokens,), int64."""

    data: str = Field(description="text: a .txt or .jsonl file, wikitext, c4, fineweb, hf:name or demo")
    split: str = Field("test", description="split of a dataset")
    streaming: bool = Field(False, description="stream a Hugging Face dataset")

    @property
    def tokens(self) -> int | None:
        """That are needed of its beginning; None: all."""
        return None

    def open(self, reader: Any) -> dict[str, Any]:
        from oats_vision.data.text import load_tokens

        found = load_tokens(self.data, reader, split=self.split, streaming=self.streaming, tokens=self.tokens)
        return {"data": found}
