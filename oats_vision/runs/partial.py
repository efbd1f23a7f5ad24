"""OUT.partial: what a run keeps until its output is complete, so that the same command goes on if it is stopped.

A run that goes on does again what it did, and finds the blocks done. So it may have to replace a checkpoint that it has
written itself, and knows it by its digest, which is noted before the checkpoint takes its place.
"""

from pathlib import Path
from typing import Any

from torch import nn

from oats_vision import checkpoint
from oats_vision.compression.journal import Journal
from oats_vision.compression.settings import CompressionSettings
from oats_vision.display import Display
from oats_vision.runs.config import RunConfig


def journal_of(out: Path, again: str = "use `restart`") -> Journal:
    """What is kept of a run until its output is complete.

    Args:
        again: what a message tells to do for a fresh start.

    Raises:
        CheckpointError: something else is in its place, or it is damaged.
    """
    place = out.resolve()
    return Journal(place.with_name(f"{place.name}.partial"), again)


def has_written(journal: Journal, out: Path) -> bool:
    """Whether the checkpoint in a folder is one that the run of the journal has written there."""
    written = journal.noted("written") or []
    return bool(written) and checkpoint.is_checkpoint(out) and checkpoint.read_config(out).weights_sha256 in written


# fields of RunConfig by which calibration data are chosen and the model is made
_DECIDING = (
    "model",
    "pretrained",
    "image_size",
    "data",
    "split",
    "streaming",
    "samples",
    "sequence_length",
    "seed",
    "batch_size",
    "dtype",
)


def see_same(journal: Journal, config: RunConfig, settings: CompressionSettings, display: Display) -> None:
    """See that a run that was stopped is this one, before the data are read, and say that it goes on.

    Raises:
        ConfigError: it is another one.
    """
    given = config.model_dump(mode="json", include={"quality", *_DECIDING})
    journal.see(settings.model_dump(mode="json", exclude={"on_bad_layer"}) | given)
    if journal.done:
        display.console.print(
            f"going on after block {journal.done} of {journal.blocks}, from {journal.folder}", soft_wrap=True
        )


def write_noted(model: nn.Module, config: RunConfig, tokenizer: Any, journal: Journal, display: Display) -> None:
    """Write the model to `config.out`, and note before that it is this run's."""
    overwrite = config.overwrite or has_written(journal, config.out)

    def note(sha256: str) -> None:
        if journal.blocks:  # else the same command begins again, and would take it for its own
            journal.note(written=[*(journal.noted("written") or []), sha256])

    with display.status(f"writing {config.out}"):
        checkpoint.write(model, config.out, overwrite, tokenizer, note)
