"""One whole run of `oats-vision compress`: load, calibrate, compress, write, and measure what it cost."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from oats_vision import checkpoint
from oats_vision.adapters import find_adapter
from oats_vision.config import CompressionSettings, RunConfig
from oats_vision.data import Batches, load_pictures
from oats_vision.display import Display
from oats_vision.errors import CheckpointError, ConfigError, ModelError, OatsVisionError
from oats_vision.evaluation import (
    Perplexity,
    Top1,
    evaluate_top1,
    paired_difference,
    paired_ratio,
    perplexity,
)
from oats_vision.layers import merge
from oats_vision.machine import choose_device, machine, peak_memory
from oats_vision.models import load_model, load_tokenizer, save_plain, source_of
from oats_vision.pipeline import CompressionReport, compress
from oats_vision.text import Sequences, load_sequences, load_tokens
from oats_vision.transforms import Transform

log = logging.getLogger(__name__)

Scores = tuple[Top1, Top1] | tuple[Perplexity, Perplexity]


@dataclass
class Outcome:
    """What a run made and measured; `to_dict` is the checkpoint's report.json.

    parameters: of the whole model, dense and compressed. scores: on labelled pictures or on text, dense and compressed,
    if there were any. files: bytes of each in the checkpoint's directory. peak_memory: bytes.
    """

    run: RunConfig
    settings: CompressionSettings
    report: CompressionReport
    sizes: checkpoint.Sizes
    parameters: tuple[int, int]
    files: dict[str, int]
    skipped: int
    scores: Scores | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    machine: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": self.run.model_dump(mode="json"),
            "settings": self.settings.model_dump(),
            "samples": self.report.samples,
            "skipped_pictures": self.skipped,
            "parameters": dict(zip(("dense", "compressed"), self.parameters, strict=True)),
            "bytes": asdict(self.sizes) | {"layer_ratio": self.sizes.layer_ratio, "files": self.files},
            **(_compared(*self.scores) if self.scores else {}),
            "seconds": {**self.report.seconds, "command": self.seconds},
            "peak_memory": self.peak_memory,
            "machine": self.machine,
            "out": str(self.run.out),
        }


def run(config: RunConfig, display: Display) -> Outcome:
    """Do what `oats-vision compress` does, and return what it made.

    Raises:
        OatsVisionError: something that was given is wrong; nothing is written then, or the checkpoint is whole and the
            message says so.
    """
    with checkpoint.locked(config.out):
        checkpoint.check_target(config.out, config.overwrite)
        return _run(config, display)


def _run(run: RunConfig, display: Display) -> Outcome:
    """The run, once its output is seen to be free and is held."""
    start = time.perf_counter()
    target = choose_device(run.device)
    run.check_data()
    model, transform = load_model(
        run.model,
        pretrained=run.pretrained,
        image_size=run.image_size,
        dtype=getattr(torch, run.dtype),
        device=target,
        trust_remote_code=run.trust_remote_code,
    )
    checkpoint.check_source(model)
    unit = find_adapter(model).unit
    run = run.completed(unit)
    source = source_of(model)
    settings = run.settings().model_copy(update={"storage_dtype": run.storage_dtype or source.dtype})
    tokenizer = load_tokenizer(run.model) if unit == "sequences" else None
    calibration: Batches | Sequences
    test: Batches | Tensor | None
    if tokenizer is None:
        if transform is None:
            raise ModelError(
                f"{run.model} says nothing about its preprocessing: use the Python API with batches of your own"
            )
        calibration, test = _pictures(run, transform)
    else:
        positions = getattr(model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and run.sequence_length > positions:
            raise ConfigError(
                f"sequence_length must be at most the model's {positions} positions, got {run.sequence_length}"
            )
        calibration, test = _text(run, tokenizer)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    before = _score(model, test, run, "dense", display)
    with display.compression() as progress:
        report = compress(
            model, calibration, settings=settings, activation_memory=run.activation_memory, progress=progress
        )
    checkpoint.write(model, run.out, run.overwrite, tokenizer)
    storage = getattr(torch, str(settings.storage_dtype))
    outcome = Outcome(
        run=run,
        settings=settings,
        report=report,
        sizes=checkpoint.measure(model.state_dict().values(), report, storage),
        parameters=(parameters, parameters - report.dense_parameters + report.parameters),
        files={file.name: file.stat().st_size for file in run.out.iterdir() if file.is_file()},
        skipped=calibration.skipped if isinstance(calibration, Batches) else 0,
        machine=machine(target),
    )
    with _after_the_checkpoint(run, how_to_evaluate(unit)):
        after = _score(model, test, run, "compressed", display)
        outcome.scores = (before, after) if before and after else None  # type: ignore[assignment]  # of one kind
        outcome.seconds, outcome.peak_memory = time.perf_counter() - start, peak_memory(target)
        checkpoint.write_json(run.out / checkpoint.REPORT, outcome.to_dict())
        if run.merge:
            with checkpoint.new_directory(run.out / checkpoint.MERGED, overwrite=False) as merged:
                save_plain(merge(model), source, storage, merged)
                if tokenizer is not None:
                    tokenizer.save_pretrained(merged)
    return outcome


def how_to_evaluate(unit: str) -> str:
    """The command that measures a checkpoint, with places for its directory and for data."""
    return "top1 {} --data {}" if unit == "pictures" else "perplexity {} --data {}"


@contextmanager
def _after_the_checkpoint(run: RunConfig, how: str) -> Iterator[None]:
    """What fails from here on is no lost run, and the message says so."""
    again = how.format(run.out, run.eval_data or "demo")
    complete = f"the checkpoint in {run.out} is complete"
    try:
        yield
    except SystemExit:
        log.warning("%s; measure it with: oats-vision eval %s", complete, again)
        raise
    except (OatsVisionError, OSError, RuntimeError, MemoryError) as problem:
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise CheckpointError(
            f"{complete}; what comes after it failed: {reason}. Measure it with: oats-vision eval {again}"
        ) from problem


def _pictures(run: RunConfig, transform: Transform) -> tuple[Batches, Batches | None]:
    """Calibration pictures, and labelled ones for the evaluation if there are any."""
    loading: dict[str, Any] = {
        "batch_size": run.batch_size,
        "seed": run.seed,
        "streaming": run.streaming,
        "workers": run.workers,
    }
    calibration = load_pictures(run.data or "demo", transform, samples=run.samples, split=run.split, **loading)
    source = run.eval_data or ("demo" if run.model == "demo" else None)
    if source is None:
        return calibration, None
    options: dict[str, Any] = {"samples": run.eval_samples, "split": run.eval_split, "labelled": True}
    return calibration, load_pictures(source, transform, **options, **loading)


def _text(run: RunConfig, tokenizer: Any) -> tuple[Sequences, Tensor | None]:
    """Calibration sequences, and the evaluation's text as token ids if there is one."""
    calibration = load_sequences(
        str(run.data),
        tokenizer,
        samples=run.samples or 0,
        length=run.sequence_length,
        batch_size=run.batch_size or 1,
        seed=run.seed,
        split=run.split,
        streaming=run.streaming,
    )
    if run.eval_data is None:
        return calibration, None
    ids = load_tokens(run.eval_data, tokenizer, split=str(run.eval_split), streaming=run.streaming)
    return calibration, ids[: run.eval_samples * run.sequence_length] if run.eval_samples else ids


def _score(
    model: nn.Module, test: Batches | Tensor | None, run: RunConfig, what: str, display: Display
) -> Top1 | Perplexity | None:
    """Top-1 on pictures, perplexity on text."""
    if test is None:
        return None
    if isinstance(test, Batches):
        with display.counting(f"top-1 {what}", "pictures", test.total) as progress:
            return evaluate_top1(model, test, progress)
    length = run.sequence_length
    with display.counting(f"perplexity {what}", "windows", max(len(test) // length, 1)) as progress:
        return perplexity(model, test, length=length, batch_size=run.batch_size or 1, progress=progress)


def _compared(dense: Top1 | Perplexity, compressed: Top1 | Perplexity) -> dict[str, Any]:
    """Both scores under the name of the protocol, and the difference of top-1 (ratio of perplexities)."""
    if isinstance(dense, Top1) and isinstance(compressed, Top1):
        protocol, change = "top1", {"difference": paired_difference(dense.correct, compressed.correct).to_dict()}
    else:
        assert isinstance(dense, Perplexity)
        assert isinstance(compressed, Perplexity)
        protocol, change = "perplexity", {"ratio": paired_ratio(dense, compressed).to_dict()}
    return {protocol: {"dense": dense.to_dict(), "compressed": compressed.to_dict(), **change}}
