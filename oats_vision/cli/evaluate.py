"""`oats-vision eval` on pictures: top-1, linear probe and k-NN of the dense and of the compressed model."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from oats_vision import logs
from oats_vision.cli.common import dtype_of, notes, warn_if_slow
from oats_vision.cli.common import top1 as classify_all
from oats_vision.cli.comparison import Dense, Model, Models, NoDense, Score, show
from oats_vision.cli.help import DATA, MACHINE, MEASURE, RARE
from oats_vision.cli.options import (
    Device,
    Dtype,
    Json,
    LogFile,
    Streaming,
    Trust,
    Verbose,
    Workers,
    checked,
    option,
    suggest,
)
from oats_vision.display import Display
from oats_vision.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from oats_vision.data.pictures import Batches
    from oats_vision.evaluation import Features
    from oats_vision.models.transforms import Transform

LABELLED = {"metavar": "DATA", "autocompletion": suggest("data")}
COUNT = {"min": 1, "metavar": "N", "show_default": "all"}
Data = Annotated[str, option(DATA, **LABELLED, help="labelled pictures: one folder a class, hf:name or demo")]
Train = Annotated[str, option(DATA, **LABELLED, help="labelled pictures to learn from, as for --val")]
Val = Annotated[
    str, option(DATA, **LABELLED, help="labelled pictures to evaluate on: one folder a class, hf:name or demo")
]
Split = Annotated[str, option(DATA, metavar="SPLIT", help="split of --data, if a Hugging Face dataset")]
TrainSplit = Annotated[str, option(DATA, metavar="SPLIT", help="split of --train, if a Hugging Face dataset")]
ValSplit = Annotated[str, option(DATA, metavar="SPLIT", help="split of --val, if a Hugging Face dataset")]
Samples = Annotated[int | None, option(DATA, **COUNT, help="evaluate on so many pictures")]
TrainSamples = Annotated[int | None, option(DATA, **COUNT, help="learn from so many pictures")]
ValSamples = Annotated[int | None, option(DATA, **COUNT, help="evaluate on so many pictures")]
Seed = Annotated[int, option(DATA, min=0, max=2**32 - 1, metavar="N", help="of the choice of pictures")]
Batch = Annotated[int, option(MACHINE, min=1, metavar="N", help="pictures in a batch")]
Mixed = Annotated[str | None, checked("dtype", MACHINE, "DTYPE", "of matrix products alone (autocast)")]
Cache = Annotated[Path, option(RARE, metavar="FOLDER", help="where features are kept, under what they are made of")]
NoCache = Annotated[bool, option(RARE, "--no-cache", help="neither read nor write cached features")]
CACHE = Path("~/.cache/oats_vision")

TOP1_EXAMPLES = """\
  oats-vision eval top1 vit_b_50 --data imagenet/val
  oats-vision eval top1 vit_b_50 --data hf:timm/mini-imagenet --samples 2000"""
PROBE_EXAMPLES = """\
  oats-vision eval linear-probe dinov2_l_50 \\
    --train imagenet/train --val imagenet/val
in seconds
  oats-vision eval linear-probe dinov2_l_50 --quick --train-samples 20000 \\
    --train imagenet/train --val imagenet/val"""
KNN_EXAMPLES = """\
  oats-vision eval knn dinov2_l_50 --train imagenet/train --val imagenet/val
  oats-vision eval knn dinov2_l_50 --k 20 --train-samples 20000 \\
    --train imagenet/train --val imagenet/val"""

log = logging.getLogger(__name__)


def top1(
    model: Model,
    data: Data,
    split: Split = "validation",
    samples: Samples = None,
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
    verbose: Verbose = False,
    log_file: LogFile = None,
) -> None:
    """Top-1 and top-5 accuracy, and throughput.

    Folders named by WordNet ids are matched with ImageNet's 1,000 classes, other names with those of the head.
    """
    logs.set_up(verbose, log_file)
    models = Models(model, dense, no_dense, device, dtype, trust_remote_code)
    mixed = dtype_of(mixed_precision) if mixed_precision else None
    warn_if_slow("--mixed-precision", mixed, models.device)
    from oats_vision.data.pictures import load_pictures

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
        bool, option(MEASURE, "--quick", help="logistic regression (seconds), no grid of SGD classifiers")
    ] = False,
    iterations: Annotated[int, option(MEASURE, min=1, metavar="N", help="steps of SGD")] = 12_500,
    probe_batch: Annotated[int, option(MEASURE, min=1, metavar="N", help="features in a step of SGD")] = 1024,
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
    verbose: Verbose = False,
    log_file: LogFile = None,
) -> None:
    """Linear classification of the frozen backbone's features, as DINOv2 does it.

    A grid of learning rates, last 1 or 4 blocks, with and without the mean patch token is trained at once; a
    held-out tenth of --train chooses. Features are extracted once and cached.
    """
    logs.set_up(verbose, log_file)
    models = Models(model, dense, no_dense, device, dtype, trust_remote_code)
    loading = {"batch_size": batch_size, "seed": seed, "streaming": streaming, "workers": workers}
    splits = _splits(models.transform, (train, train_split, train_samples), (val, val_split, val_samples), loading)
    extract = _extraction(splits, None if no_cache else _cache_folder(cache), mixed_precision, models.device)

    from oats_vision import evaluation
    from oats_vision.machine import choose_device

    def protocol(module: nn.Module, what: str) -> Score:
        features = extract(module, what)
        if quick:
            with notes.status(f"logistic regression, {what}"):
                probe = evaluation.quick_probe(*features, seed=seed)
        else:
            with Display(notes).counting(f"linear probe, {what}", "steps", iterations) as progress:
                probe = evaluation.linear_probe(
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
        list[int] | None,
        option(MEASURE, min=1, metavar="N", help="neighbours; may be repeated", show_default="10 20 100 200"),
    ] = None,
    temperature: Annotated[float, option(MEASURE, metavar="X", help="of the votes, above 0")] = 0.07,
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
    verbose: Verbose = False,
    log_file: LogFile = None,
) -> None:
    """k-nearest-neighbour classification of the frozen backbone's features, as DINOv2 does it."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"--temperature must be above 0, got {temperature:g}")
    logs.set_up(verbose, log_file)
    models = Models(model, dense, no_dense, device, dtype, trust_remote_code)
    loading = {"batch_size": batch_size, "seed": seed, "streaming": streaming, "workers": workers}
    splits = _splits(models.transform, (train, train_split, train_samples), (val, val_split, val_samples), loading)
    extract = _extraction(splits, None if no_cache else _cache_folder(cache), mixed_precision, models.device)

    from oats_vision import evaluation
    from oats_vision.evaluation.knn import NEIGHBOURS

    def protocol(module: nn.Module, what: str) -> Score:
        features = extract(module, what)
        correct = evaluation.knn(*features, neighbours=k or NEIGHBOURS, temperature=temperature)
        accuracy = {str(count): 100 * float(right.float().mean()) for count, right in correct.items()}
        return {"top1": accuracy, **_about(features)}, {f"k = {count}": right for count, right in correct.items()}

    scores = models.run(protocol)
    about = {"protocol": "k-NN", "train": train, "val": val}
    show(models, f"k-NN of {model}: {train} -> {val}", about, scores, _extraction_rows(scores), as_json)


Source = tuple[str, str, int | None]  # source, split, samples


def _splits(transform: Transform, train: Source, val: Source, loading: dict[str, Any]) -> dict[str, Batches]:
    """Both splits, checked before a model is loaded."""
    from oats_vision.data.pictures import load_pictures

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
    mixed = dtype_of(mixed_precision) if mixed_precision else None
    warn_if_slow("--mixed-precision", mixed, device)

    from oats_vision.checkpoint import is_sliced
    from oats_vision.evaluation import cached_features

    def extract(module: nn.Module, what: str) -> tuple[Features, Features]:
        blocks = 1 if is_sliced(module) else 4
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
