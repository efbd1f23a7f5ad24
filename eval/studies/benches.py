"""What a study measures, on pictures or on text: the dense model, calibration data by seed, and a score."""

import argparse
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import oats_vision as ov
from oats_vision.data.pictures import Batches, load_pictures
from oats_vision.data.text import Sequences
from oats_vision.evaluation.evaluate import evaluation_of
from oats_vision.evaluation.protocols import Given, Measurement
from oats_vision.evaluation.protocols.settings import Settings
from oats_vision.evaluation.results import Evaluation
from oats_vision.evaluation.tasks import task_of_unit
from oats_vision.evaluation.top1 import classify
from oats_vision.machine import choose_device, machine, machine_line
from oats_vision.progress import Unit
from oats_vision.runs.config import RunConfig, load_run_config

KEEP_IN_MEMORY = 2e9  # bytes of pictures
Row = dict[str, str]
console = Console(stderr=True)


class Bench(Protocol):
    """What a study measures: `targets` are what it is measured on, `about` is what its rows begin with."""

    KEYS: ClassVar[list[str]]
    RESULTS: ClassVar[list[str]]
    config: RunConfig
    targets: list[str]
    about: dict[str, Any]

    def load(self) -> nn.Module:
        """The dense model, after it was measured."""

    def calibration(self, seed: int) -> Any:
        """The data that a seed draws, to be read again and again."""

    def measure(self, model: nn.Module, target: str) -> Row:
        """The results of a compressed model."""


class Pictures:
    """What a study on pictures measures: top-1, against the dense model on the same pictures."""

    KEYS: ClassVar = ["model", "data", "samples", "seed", "eval_data", "eval_samples", "precision"]
    RESULTS: ClassVar = ["dense_top1", "top1", "top5", "difference", "low", "high"]

    def __init__(self, args: argparse.Namespace) -> None:
        config = run_config(args, "pictures", eval_data=args.eval_data)
        self.config = config.model_copy(update={"data": config.data or "demo", "eval_data": config.eval_data or "demo"})
        self.targets = [str(self.config.eval_data)]
        self.asked = asked(self.config, "pictures").model_copy(update={"mixed_precision": args.mixed_precision})
        self.mixed = self.asked.autocast_dtype
        self.about = {
            "model": self.config.model,
            "data": self.config.data,
            "samples": self.config.samples,
            "eval_samples": self.config.eval_samples or "all",
            "precision": args.mixed_precision or self.config.dtype,
        }

    def load(self) -> nn.Module:
        """The dense model, after it was measured."""
        model, transform = load_dense(self.config)
        if transform is None:
            raise SystemExit(f"{self.config.model} says nothing about its preprocessing")
        self.transform = transform
        self.test = _in_memory(self.asked.open(transform)["data"])
        self.measure_dense(model)
        return model

    def measure_dense(self, model: nn.Module) -> None:
        """Keep what `measure` compares with."""
        self.before = measured(model, "pictures", self.asked, self.test)
        top1 = self.before.score()["top-1"].figure
        console.print(f"{self.config.model}: dense top-1 {top1} on {self.before.samples} pictures")

    def calibration(self, seed: int) -> Batches:
        drawn = load_pictures(
            str(self.config.data),
            self.transform,
            samples=self.config.samples,
            seed=seed,
            split=self.config.split,
            batch_size=self.config.batch_size or 1,
            workers=self.config.workers,
        )
        return _in_memory(drawn)

    def measure(self, model: nn.Module, target: str) -> Row:
        found = compared("pictures", self.asked, self.before, measured(model, "pictures", self.asked, self.test))
        (dense, ours), change = found.pair("top-1"), found.difference["top-1"]
        values = [dense.value, ours.value, found.pair("top-5")[1].value, change.value, change.low, change.high]
        return {name: f"{value:.3f}" for name, value in zip(self.RESULTS, values, strict=True)}


class Closeness(Pictures):
    """What a study of closeness measures: the compressed model's probabilities against the dense model's."""

    RESULTS: ClassVar = ["divergence", "agreement"]

    def measure_dense(self, model: nn.Module) -> None:
        self.expected = self._log_probabilities(model)

    def measure(self, model: nn.Module, target: str) -> Row:
        found = self._log_probabilities(model)
        divergence = F.kl_div(found, self.expected, reduction="batchmean", log_target=True)
        agreement = 100 * (found.argmax(1) == self.expected.argmax(1)).float().mean()
        return {"divergence": f"{divergence:.6f}", "agreement": f"{agreement:.3f}"}

    @torch.inference_mode()
    def _log_probabilities(self, model: nn.Module) -> Tensor:
        batches = (classify(model, images, self.mixed) for images, _ in self.test)
        return torch.cat([logits.double().log_softmax(1).cpu() for logits in batches])


class Texts:
    """What a study on text measures: perplexity, against the dense model on the same windows of each text."""

    KEYS: ClassVar = ["model", "data", "samples", "sequence_length", "seed", "eval_data", "eval_samples", "precision"]
    RESULTS: ClassVar = ["dense_perplexity", "perplexity", "ratio", "low", "high"]

    def __init__(self, args: argparse.Namespace) -> None:
        self.config = run_config(args, "sequences", sequence_length=args.sequence_length)
        if self.config.data is None or self.config.model == "demo":
            raise SystemExit("--model and --data must be given: a language model, and a text to calibrate with")
        self.targets = args.eval_data
        self.about = {
            "model": self.config.model,
            "data": self.config.data,
            "samples": self.config.samples,
            "sequence_length": self.config.sequence_length,
            "eval_samples": self.config.eval_samples or "all",
            "precision": self.config.dtype,
        }

    def load(self) -> nn.Module:
        """The dense model, after it was evaluated."""
        model, _ = load_dense(self.config)
        self.tokenizer = ov.load_tokenizer(self.config.model)
        self.asked, self.ids, self.before = {}, {}, {}
        for text in self.targets:
            self.asked[text] = asked(self.config.model_copy(update={"eval_data": text}), "sequences")
            self.ids[text] = self.asked[text].open(self.tokenizer)["data"]
            self.before[text] = measured(model, "sequences", self.asked[text], self.ids[text])
            perplexity, windows = self.before[text].score()["perplexity"].figure, self.before[text].details["windows"]
            console.print(f"{self.config.model}: dense perplexity {perplexity} on {windows} windows of {text}")
        return model

    def calibration(self, seed: int) -> Sequences:
        return ov.load_sequences(
            str(self.config.data),
            self.tokenizer,
            samples=self.config.samples or 1,
            sequence_length=self.config.sequence_length,
            batch_size=self.config.batch_size or 1,
            seed=seed,
            split=self.config.split,
        )

    def measure(self, model: nn.Module, target: str) -> Row:
        after = measured(model, "sequences", self.asked[target], self.ids[target])
        found = compared("sequences", self.asked[target], self.before[target], after)
        (dense, ours), ratio = found.pair("perplexity"), found.difference["perplexity"]
        values = [dense.value, ours.value, ratio.value, ratio.low, ratio.high]
        return {name: f"{value:.4f}" for name, value in zip(self.RESULTS, values, strict=True)}


def asked(config: RunConfig, unit: Unit) -> Any:
    """What the protocol of pictures, or of text, is asked for."""
    found = task_of_unit(unit).evaluation(config)
    assert found is not None
    return found


def measured(model: nn.Module, unit: Unit, settings: Settings, data: Any) -> Measurement:
    """What that protocol finds of a model."""
    return task_of_unit(unit).protocol.function(model, Given(settings, {"data": data}))


def compared(unit: Unit, settings: Settings, dense: Measurement, ours: Measurement) -> Evaluation:
    """Both models' figures, and their differences."""
    return evaluation_of(task_of_unit(unit).protocol, settings, {"dense": dense, "compressed": ours})


def run_config(args: argparse.Namespace, unit: Unit, **flags: Any) -> RunConfig:
    """The settings of the file, overridden by the flags."""
    given = ("model", "data", "samples", "eval_samples", "batch_size", "device", "workers")
    config = load_run_config(args.config, {field: getattr(args, field) for field in given} | flags)
    return task_of_unit(unit).completed(config)


def load_dense(config: RunConfig) -> tuple[nn.Module, Any]:
    device, dtype = choose_device(config.device), getattr(torch, config.dtype)
    console.print(machine_line(machine(device)))
    return ov.load_model(config.model, dtype=dtype, device=device, image_size=config.image_size)


def _in_memory(batches: Batches) -> Batches:
    """The same batches, read once, if they are not too many."""
    if not batches.total:
        return batches
    picture = next(iter(batches))[0][0]
    if batches.total * picture.numel() * picture.element_size() > KEEP_IN_MEMORY:
        return batches
    return replace(batches, loader=list(batches.loader))  # type: ignore[arg-type]  # any iterable of batches will do
