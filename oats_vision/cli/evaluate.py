"""`oats-vision eval` on pictures: top-1, linear probe and k-NN of the dense and of the compressed model."""

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from oats_vision import checkpoint
from oats_vision.cli.common import Json, dtype_of, notes, warn_if_slow
from oats_vision.cli.common import top1 as classify_all
from oats_vision.cli.comparison import Dense, Device, Dtype, Model, Models, NoDense, Score, Streaming, Trust, show
from oats_vision.data import Batches, load_pictures
from oats_vision.display import Display
from oats_vision.errors import ConfigError
from oats_vision.evaluation import Features, cached_features, quick_probe
from oats_vision.evaluation import knn as knn_protocol
from oats_vision.evaluation import linear_probe as linear_probe_protocol
from oats_vision.evaluation.knn import NEIGHBOURS, TEMPERATURE
from oats_vision.machine import choose_device
from oats_vision.transforms import Transform

Batch = Annotated[int, typer.Option(min=1, help="pictures in a batch")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="of the choice of pictures, and of the probe's training")]
Mixed = Annotated[
    str | None, typer.Option(help="float16 or bfloat16: matrix products in it, all else in --dtype (autocast)")
]
Workers = Annotated[int, typer.Option(min=0, help="processes that read pictures")]
Train = Annotated[str, typer.Option(help="labelled pictures to learn from: one folder a class, hf:name or demo")]
Val = Annotated[str, typer.Option(help="labelled pictures to evaluate on")]
TrainSplit = Annotated[str, typer.Option(help="split of --train, if a Hugging Face dataset")]
ValSplit = Annotated[str, typer.Option(help="split of --val, if a Hugging Face dataset")]
TrainSamples = Annotated[int | None, typer.Option(min=1, help="learn from that many pictures only", show_default="all")]
ValSamples = Annotated[int | None, typer.Option(min=1, help="evaluate on that many pictures only", show_default="all")]
Cache = Annotated[Path, typer.Option(help="folder that features are kept in, under what they are made of")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="neither read nor write cached features")]
CACHE = Path("~/.cache/oats_vision")

log = logging.getLogger(__name__)


def top1(
    model: Model,
    data: Annotated[str, typer.Option(help="labelled pictures: one folder a class, hf:name or demo")],
    split: Annotated[str, typer.Option(help="split of a Hugging Face dataset")] = "validation",
    samples: Annotated[
        int | None, typer.Option(min=1, help="evaluate on that many pictures only", show_default="all")
    ] = None,
    dense: Dense = None,
    no_dense: NoDense = False,
    batch_size: Batch = 64,
    seed: Seed = 42,
    device: Device = "auto",
    dtype: Dtype = "float32",
    mixed_precision: Mixed = None,
    streaming: Streaming = False,
    workers: Workers = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Top-1 and top-5 accuracy, and throughput.

    Folders named by WordNet ids are matched with ImageNet's 1,000 classes, other names with those of the head.
    """
    models = Models(model, dense, no_dense, device, dtype, trust_remote_code)
    mixed = dtype_of("--mixed-precision", mixed_precision) if mixed_precision else None
    warn_if_slow("--mixed-precision", mixed, models.device)
    pictures = load_pictures(
        data,
        models.transform,
        batch_size=batch_size,
        samples=samples,
        seed=seed,
        labelled=True,
        split=split,
        streaming=streaming,
        workers=workers,
    )

    def protocol(module: nn.Module, what: str) -> Score:
        score = classify_all(module, pictures, what, mixed)
        return score.to_dict(), {"top-1": score.correct}

    scores = models.run(protocol)
    rows = {
        "top-5": [f"{about['top5']:.2f}%" for about, _ in scores.values()],
        "pictures/s": [f"{about['pictures_per_second']:.0f}" for about, _ in scores.values()],
        "pictures": [f"{about['pictures']} ({about['skipped']} unreadable)" for about, _ in scores.values()],
    }
    show(models, f"top-1 of {model} on {data}", {"protocol": "top1", "data": data}, scores, rows, as_json)


def linear_probe(
    model: Model,
    train: Train,
    val: Val,
    quick: Annotated[
        bool, typer.Option("--quick", help="logistic regression (seconds) in place of the grid of SGD classifiers")
    ] = False,
    iterations: Annotated[int, typer.Option(min=1, help="steps of SGD")] = 12_500,
    probe_batch: Annotated[int, typer.Option(min=1, help="features in a step of SGD")] = 1024,
    train_split: TrainSplit = "train",
    val_split: ValSplit = "validation",
    train_samples: TrainSamples = None,
    val_samples: ValSamples = None,
    dense: Dense = None,
    no_dense: NoDense = False,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    batch_size: Batch = 64,
    seed: Seed = 42,
    device: Device = "auto",
    dtype: Dtype = "float32",
    mixed_precision: Mixed = None,
    streaming: Streaming = False,
    workers: Workers = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Linear classification of the frozen backbone's features, as DINOv2 does it.

    A grid of learning rates, last 1 or 4 blocks, with and without the mean patch token is trained at once; a
    held-out tenth of --train chooses. Features are extracted once and cached.
    """
    models = Models(model, dense, no_dense, device, dtype, trust_remote_code)
    loading = {"batch_size": batch_size, "seed": seed, "streaming": streaming, "workers": workers}
    splits = _splits(models.transform, (train, train_split, train_samples), (val, val_split, val_samples), loading)
    extract = _extraction(splits, None if no_cache else _cache_folder(cache), mixed_precision, models.device)

    def protocol(module: nn.Module, what: str) -> Score:
        features = extract(module, what)
        if quick:
            with notes.status(f"logistic regression, {what}"):
                probe = quick_probe(*features, seed=seed)
        else:
            with Display(notes).counting(f"linear probe, {what}", "steps", iterations) as progress:
                probe = linear_probe_protocol(
                    *features,
                    iterations=iterations,
                    batch_size=probe_batch,
                    seed=seed,
                    device=choose_device(device),
                    progress=progress,
                )
        return {**probe.to_dict(), **_about(features)}, {"top-1": probe.correct}

    scores = models.run(protocol)
    rows = {"chosen": [about["best"] for about, _ in scores.values()]} | _extraction_rows(scores)
    about = {"protocol": "quick linear probe" if quick else "linear probe", "train": train, "val": val}
    show(models, f"{about['protocol']} of {model}: {train} -> {val}", about, scores, rows, as_json)


def knn(
    model: Model,
    train: Train,
    val: Val,
    k: Annotated[
        list[int] | None, typer.Option(min=1, help="neighbours; may be repeated", show_default="10 20 100 200")
    ] = None,
    temperature: Annotated[float, typer.Option(help="of the votes")] = TEMPERATURE,
    train_split: TrainSplit = "train",
    val_split: ValSplit = "validation",
    train_samples: TrainSamples = None,
    val_samples: ValSamples = None,
    dense: Dense = None,
    no_dense: NoDense = False,
    cache: Cache = CACHE,
    no_cache: NoCache = False,
    batch_size: Batch = 64,
    seed: Seed = 42,
    device: Device = "auto",
    dtype: Dtype = "float32",
    mixed_precision: Mixed = None,
    streaming: Streaming = False,
    workers: Workers = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """k-nearest-neighbour classification of the frozen backbone's features, as DINOv2 does it."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"--temperature must be above 0, got {temperature:g}")
    models = Models(model, dense, no_dense, device, dtype, trust_remote_code)
    loading = {"batch_size": batch_size, "seed": seed, "streaming": streaming, "workers": workers}
    splits = _splits(models.transform, (train, train_split, train_samples), (val, val_split, val_samples), loading)
    extract = _extraction(splits, None if no_cache else _cache_folder(cache), mixed_precision, models.device)

    def protocol(module: nn.Module, what: str) -> Score:
        features = extract(module, what)
        correct = knn_protocol(*features, neighbours=k or NEIGHBOURS, temperature=temperature)
        accuracy = {str(count): 100 * float(right.float().mean()) for count, right in correct.items()}
        return {"top1": accuracy, **_about(features)}, {f"k = {count}": right for count, right in correct.items()}

    scores = models.run(protocol)
    about = {"protocol": "k-NN", "train": train, "val": val}
    show(models, f"k-NN of {model}: {train} -> {val}", about, scores, _extraction_rows(scores), as_json)


Split = tuple[str, str, int | None]  # source, split, samples


def _splits(transform: Transform, train: Split, val: Split, loading: dict[str, Any]) -> dict[str, Batches]:
    """Both splits, checked before a model is loaded."""
    return {
        flag: load_pictures(source, transform, samples=samples, labelled=True, split=split, **loading)
        for flag, (source, split, samples) in {"train": train, "val": val}.items()
    }


def _cache_folder(cache: Path) -> Path | None:
    """The folder, made if need be; None, and a warning, if the usual one is not to be had.

    Raises:
        ConfigError: it was asked for, and cannot be made or written to.
    """
    try:
        folder = cache.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not writable")
    except (OSError, RuntimeError) as problem:  # RuntimeError: no home
        if cache != CACHE:
            raise ConfigError(f"--cache {cache} cannot be made or written to: {problem}") from None
        log.warning("features are not kept, since %s cannot be used: %s (--cache gives another folder)", cache, problem)
        return None
    return folder


def _extraction(
    splits: dict[str, Batches], folder: Path | None, mixed_precision: str | None, device: torch.device
) -> Callable[[nn.Module, str], tuple[Features, Features]]:
    """What gives a model's features of both splits."""
    mixed = dtype_of("--mixed-precision", mixed_precision) if mixed_precision else None
    warn_if_slow("--mixed-precision", mixed, device)

    def extract(module: nn.Module, what: str) -> tuple[Features, Features]:
        blocks = 1 if checkpoint.is_sliced(module) else 4
        features = []
        for flag, batches in splits.items():
            with Display(notes).counting(f"features of --{flag}, {what}", "pictures", batches.total) as progress:
                features.append(
                    cached_features(module, batches, folder, blocks=blocks, mixed_precision=mixed, progress=progress)
                )
        return features[0], features[1]

    return extract


def _about(features: tuple[Features, Features]) -> dict[str, Any]:
    train, val = features
    return {
        "train_pictures": len(train),
        "val_pictures": len(val),
        "skipped": train.skipped + val.skipped,
        "extraction_seconds": train.seconds + val.seconds,
    }


def _extraction_rows(scores: dict[str, Score]) -> dict[str, list[str]]:
    abouts = [about for about, _ in scores.values()]
    counts = [f"{about['train_pictures']} / {about['val_pictures']}" for about in abouts]
    seconds = [f"{about['extraction_seconds']:.1f} s" if about["extraction_seconds"] else "cached" for about in abouts]
    return {"pictures, train / val": counts, "extraction": seconds}
