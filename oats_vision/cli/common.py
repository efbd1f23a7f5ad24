"""What the commands share: consoles, directories, and protocols with a progress bar."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from oats_vision.display import Display
from oats_vision.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    import torch

    from oats_vision.data.pictures import Batches
    from oats_vision.evaluation import Perplexity, Top1
    from oats_vision.models.transforms import Transform

log = logging.getLogger(__name__)


def warn_if_slow(flag: str, dtype: torch.dtype | None, device: torch.device) -> None:
    """Say so if a dtype that a flag gives takes this processor longer than float32."""
    from oats_vision.machine import slow_dtype_warning

    remedy = f"leave {flag} out" if flag == "--mixed-precision" else f"use {flag} float32"
    if dtype is not None and (warning := slow_dtype_warning(dtype, device, remedy)):
        log.warning(warning)


def plain_console(**options: Any) -> Console:
    """A console that shows strings as they are: names, paths and errors may hold `[...]` or `:smile:`."""
    return Console(markup=False, highlight=False, emoji=False, **options)


notes = plain_console(stderr=True)  # progress and warnings; results go to standard output


def results() -> Console:
    """Standard output; wide enough for the tables when it is a file or a pipe."""
    console = plain_console()
    return console if console.is_terminal else plain_console(width=120)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name that the options have checked."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def need_directory(directory: Path) -> None:
    """See that a checkpoint's directory is one.

    Raises:
        CheckpointError: it is missing, or a file.
    """
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist: give the directory of a compressed model")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: give the directory of a compressed model")


def need_transform(transform: Transform | None, model: str) -> Transform:
    if transform is None:
        raise ModelError(f"{model} says nothing about its preprocessing: use the Python API with batches of your own")
    return transform


def top1(model: torch.nn.Module, batches: Batches, what: str, mixed_precision: torch.dtype | None = None) -> Top1:
    """`evaluate_top1` with a progress bar."""
    from oats_vision.evaluation import evaluate_top1

    with Display(notes).counting(f"top-1 {what}", "pictures", batches.total) as progress:
        return evaluate_top1(model, batches, progress, mixed_precision=mixed_precision)


def perplexity(
    model: torch.nn.Module, ids: torch.Tensor, what: str, *, length: int, stride: int | None = None, batch_size: int = 1
) -> Perplexity:
    """`evaluation.perplexity` with a progress bar."""
    from oats_vision import evaluation

    windows = max(len(ids) - length, 0) // (stride or length) + 1
    with Display(notes).counting(f"perplexity {what}", "windows", windows) as progress:
        return evaluation.perplexity(model, ids, length=length, stride=stride, batch_size=batch_size, progress=progress)
