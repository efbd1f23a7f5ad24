"""One whole run of `oats-vision compress`: load, calibrate, compress, write, and measure what it cost."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from oats_vision import checkpoint
from oats_vision.analysis.html_report import spectra_of, write_html
from oats_vision.checkpoint.place import PAGE
from oats_vision.compression.pipeline import compress
from oats_vision.compression.settings import CompressionSettings
from oats_vision.compression.trial import trial
from oats_vision.data.batches import expected_samples
from oats_vision.data.pictures import ENOUGH, Batches, load_pictures
from oats_vision.data.text import Sequences, load_sequences, load_tokens
from oats_vision.display import Display
from oats_vision.errors import CheckpointError, ConfigError, ModelError
from oats_vision.evaluation import (
    Perplexity,
    Top1,
    evaluate_top1,
    paired_difference,
    paired_ratio,
    perplexity,
)
from oats_vision.evaluation.closeness import PictureCloseness, TextCloseness, closeness
from oats_vision.evaluation.speed import plain_picture
from oats_vision.machine import choose_device, machine, peak_memory, slow_dtype_warning
from oats_vision.models.loading.load import load_model, load_tokenizer, save_plain, source_of
from oats_vision.models.record import structure_of
from oats_vision.models.source import ModelSource
from oats_vision.models.transforms import Transform
from oats_vision.models.values import check_finite
from oats_vision.nn.sparse_low_rank import merge
from oats_vision.progress import Estimate
from oats_vision.runs.compress import Result, describe, measure
from oats_vision.runs.config import RunConfig
from oats_vision.runs.forecast import Forecast, forecast

log = logging.getLogger(__name__)

Scores = tuple[Top1, Top1] | tuple[Perplexity, Perplexity]


@dataclass
class Outcome:
    """What a run made and measured; `to_dict` is the checkpoint's report.json.

    scores: on labelled pictures or on text, dense and compressed, if there were any. files: bytes of each in the
    checkpoint's directory. peak_memory: bytes.
    """

    run: RunConfig
    settings: CompressionSettings
    result: Result
    files: dict[str, int]
    skipped: int
    scores: Scores | None = None
    seconds: float = 0.0
    peak_memory: int = 0
    machine: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        figures = self.result.to_dict()
        return {
            "run": self.run.model_dump(mode="json"),
            **figures,
            "settings": self.settings.model_dump(),
            "skipped_pictures": self.skipped,
            "bytes": figures["bytes"] | {"files": self.files},
            **(_compared(*self.scores) if self.scores else {}),
            "seconds": {**figures["seconds"], "command": self.seconds},
            "peak_memory": self.peak_memory,
            "machine": self.machine,
            "out": str(self.run.out),
        }

    def write(self, display: Display) -> None:
        """Write report.json into the checkpoint's directory, and the page that shows it, if one is wanted."""
        out, examples = self.run.out, self.result.examples if self.run.report else []
        content = self.to_dict() | {"examples": [example.model_dump() for example in examples]}
        checkpoint.write_json(out / checkpoint.REPORT, content)
        if self.run.report:
            with display.counting("drawing the page", "layers", len(spectra_of(self.result.report))) as progress:
                write_html(out, out / PAGE, progress)


@dataclass
class Draw:
    """Calibration data of one seed, and what the dense model says of the inputs that are held out of them."""

    calibration: Batches | Sequences
    close: PictureCloseness | TextCloseness | None


@dataclass
class Prepared:
    """What comes before a compression, and is the same for every compression of a model.

    run: with the defaults that depend on what the model reads. test: labelled pictures, or text as token ids.
    parameters: of the dense model.
    """

    run: RunConfig
    device: torch.device
    unit: Literal["pictures", "sequences"]
    source: ModelSource
    parameters: int
    transform: Transform | None
    tokenizer: Any
    test: Batches | Tensor | None

    def settings(self, run: RunConfig) -> CompressionSettings:
        """Those of a run, with the precision that weights are stored in."""
        return run.settings(self.source.dtype)

    def open(self, seed: int) -> Batches | Sequences:
        """The calibration data that a seed chooses."""
        run = self.run.model_copy(update={"seed": seed})
        return _pictures(run, self.transform) if self.transform else _text(run, self.tokenizer)

    def forecast(self, model: nn.Module, calibration: Batches | Sequences) -> Forecast:
        """What compressing on these data will come to."""
        run, others = self.run, calibration.held_out
        first = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
        if self.transform:
            example = plain_picture(self.transform)[None].to(first.device, first.dtype)
        else:
            example = torch.zeros(1, run.sequence_length, dtype=torch.long, device=first.device)
        return forecast(
            model,
            structure_of(model),
            self.settings(run),
            example,
            name=run.model,
            data=run.data or "demo",
            samples=expected_samples(calibration),
            held_out=0 if others is None else expected_samples(others) or 0,
            batch_size=run.batch_size or 1,
            activation_memory=run.activation_memory,
        )

    def draw(self, model: nn.Module, calibration: Batches | Sequences, display: Display) -> Draw:
        """Ask the dense model about what is held out of the calibration data."""
        others = calibration.held_out
        if not self.run.eval or others is None:
            return Draw(calibration, None)
        with display.counting("dense model, held-out", self.unit, expected_samples(others)) as progress:
            return Draw(calibration, closeness(model, others, self.transform, progress))

    def score(self, model: nn.Module, what: str, display: Display) -> Top1 | Perplexity | None:
        """Top-1 on the labelled pictures, perplexity on the text."""
        return _score(model, self.test, self.run, what, display)


def run(config: RunConfig, display: Display) -> Outcome:
    """Do what `oats-vision compress` does, and return what it made.

    Raises:
        OatsVisionError: something that was given is wrong; nothing is written then, or the checkpoint is whole and the
            message says so.
    """
    with checkpoint.locked(config.out):
        checkpoint.check_target(config.out, config.overwrite)
        return _run(config, display)


def _run(config: RunConfig, display: Display) -> Outcome:
    """The run, once its output is seen to be free and is held."""
    start = time.perf_counter()
    model, prepared = prepare(config, display)
    calibration = prepared.open(config.seed)
    display.lines("plan", prepared.forecast(model, calibration).lines())
    draw = prepared.draw(model, calibration, display)
    before = prepared.score(model, "dense", display)
    outcome = compress_and_write(model, prepared.run, prepared, draw, display)
    with _after_the_checkpoint(outcome.run, how_to_evaluate(prepared.unit)):
        del model
        measure_stored(outcome, prepared, draw, before, display)
        outcome.seconds = time.perf_counter() - start
        outcome.write(display)
        if config.merge:
            with checkpoint.new_directory(config.out / checkpoint.MERGED, overwrite=False) as merged:
                dtype = getattr(torch, str(outcome.settings.storage_dtype))
                save_plain(merge(outcome.result.model), prepared.source, dtype, merged)
                if prepared.tokenizer is not None:
                    prepared.tokenizer.save_pretrained(merged)
    return outcome


def dry_run(
    config: RunConfig, display: Display, tell: Callable[[Forecast], None] = lambda planned: None
) -> tuple[Forecast, Estimate]:
    """What `run` would come to, and by a trial of one block on two batches how long it would take; nothing is written.

    Args:
        tell: called with what is known before the trial, which takes a while.

    Raises:
        OatsVisionError: something that was given is wrong.
    """
    checkpoint.check_target(config.out, config.overwrite)
    model, prepared = prepare(config, display)
    calibration = prepared.open(config.seed)
    planned, settings = prepared.forecast(model, calibration), prepared.settings(prepared.run)
    tell(planned)
    with display.compression() as progress:
        return planned, trial(model, calibration, settings, samples=planned.samples, progress=progress)


def prepare(config: RunConfig, display: Display) -> tuple[nn.Module, Prepared]:
    """Load the dense model, and open the data that it is scored on.

    Raises:
        OatsVisionError: something that was given is wrong.
    """
    device = choose_device(config.device)
    if warning := slow_dtype_warning(getattr(torch, config.dtype), device, "use --dtype float32"):
        log.warning(warning)
    config.check_data()
    with display.status(f"loading {config.model}"):
        model, transform = load_model(
            config.model,
            pretrained=config.pretrained,
            image_size=config.image_size,
            dtype=getattr(torch, config.dtype),
            device=device,
            trust_remote_code=config.trust_remote_code,
        )
        check_finite(model)
        checkpoint.check_source(model)
    unit = structure_of(model).family.unit
    run = config.completed(unit)
    tokenizer: Any = None
    test: Batches | Tensor | None
    if unit == "sequences":
        transform, tokenizer = None, load_tokenizer(run.model)
        positions = getattr(model.config, "max_position_embeddings", None)
        if isinstance(positions, int) and run.sequence_length > positions:
            raise ConfigError(
                f"sequence_length must be at most the model's {positions} positions, got {run.sequence_length}"
            )
        test = _test_text(run, tokenizer)
    elif transform is None:
        raise ModelError(
            f"{run.model} says nothing about its preprocessing: use the Python API with batches of your own"
        )
    else:
        test = _test_pictures(run, transform)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return model, Prepared(run, device, unit, source_of(model), parameters, transform, tokenizer, test)


def compress_and_write(model: nn.Module, run: RunConfig, prepared: Prepared, draw: Draw, display: Display) -> Outcome:
    """Compress the model, in place, and write it to `run.out`, both as the run's settings say."""
    settings = prepared.settings(run)
    with display.compression() as progress:
        report = compress(model, draw.calibration, settings, activation_memory=run.activation_memory, progress=progress)
    with display.status(f"writing {run.out}"):
        checkpoint.write(model, run.out, run.overwrite, prepared.tokenizer)
    return Outcome(
        run=run,
        settings=settings,
        result=describe(model, report, prepared.parameters),
        files={file.name: file.stat().st_size for file in run.out.iterdir() if file.is_file()},
        skipped=draw.calibration.skipped if isinstance(draw.calibration, Batches) else 0,
        machine=machine(prepared.device),
    )


def measure_stored(
    outcome: Outcome, prepared: Prepared, draw: Draw, before: Top1 | Perplexity | None, display: Display
) -> None:
    """Measure the model as its users will have it: read from its files, in the stored precision.

    Args:
        before: the dense model's score, if there is data to score on.
    """
    run, result = outcome.run, outcome.result
    del result.model  # before the other one takes memory
    result.model = checkpoint.load(
        run.out, device=prepared.device, dtype=getattr(torch, run.dtype), trust_remote_code=run.trust_remote_code
    )
    if draw.close is not None:
        measure(result, result.model, draw.close, display, run.batch_size)
    after = prepared.score(result.model, "compressed", display)
    outcome.scores = (before, after) if before and after else None  # type: ignore[assignment]  # of one kind
    outcome.peak_memory = peak_memory(prepared.device)


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
    except Exception as problem:  # whatever it is, hours of work are not lost
        reason = " ".join(str(problem).split()) or type(problem).__name__
        raise CheckpointError(
            f"{complete}; what comes after it failed: {reason}. Measure it with: oats-vision eval {again}"
        ) from problem


def _pictures(run: RunConfig, transform: Transform) -> Batches:
    """Calibration pictures."""
    return load_pictures(
        run.data or "demo",
        transform,
        samples=run.samples,
        split=run.split,
        held_out=_held_out(run),
        **_reading(run),
    )


def _test_pictures(run: RunConfig, transform: Transform) -> Batches | None:
    """Labelled pictures for the evaluation, if there are any."""
    source = run.eval_data or ("demo" if run.model == "demo" and run.eval else None)
    if source is None:
        return None
    split = str(run.eval_split)
    return load_pictures(source, transform, samples=run.eval_samples, split=split, labelled=True, **_reading(run))


def _reading(run: RunConfig) -> dict[str, Any]:
    """How pictures are read."""
    return {"batch_size": run.batch_size, "seed": run.seed, "streaming": run.streaming, "workers": run.workers}


def _held_out(run: RunConfig) -> int:
    """How many inputs to keep apart to measure the cost on."""
    assert run.samples is not None
    return max(ENOUGH, run.samples // 8) if run.eval else 0


def _text(run: RunConfig, tokenizer: Any) -> Sequences:
    """Calibration sequences."""
    return load_sequences(
        str(run.data),
        tokenizer,
        samples=run.samples or 0,
        length=run.sequence_length,
        batch_size=run.batch_size or 1,
        seed=run.seed,
        split=run.split,
        streaming=run.streaming,
        held_out=_held_out(run),
    )


def _test_text(run: RunConfig, tokenizer: Any) -> Tensor | None:
    """The evaluation's text as token ids, if there is one."""
    if run.eval_data is None:
        return None
    ids = load_tokens(run.eval_data, tokenizer, split=str(run.eval_split), streaming=run.streaming)
    return ids[: run.eval_samples * run.sequence_length] if run.eval_samples else ids


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
