"""`oats-vision eval`: the same protocol on the dense and on the compressed model, and the difference."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

from oats_vision import checkpoint, report
from oats_vision.cli.common import Json, choose_device, dtype_of, machine, need_transform, notes, results
from oats_vision.cli.common import perplexity as score_text
from oats_vision.cli.common import top1 as classify_all
from oats_vision.data import Batches, load_pictures
from oats_vision.errors import ConfigError, ModelError
from oats_vision.evaluation import (
    Difference,
    Features,
    Perplexity,
    Ratio,
    cached_features,
    paired_difference,
    paired_ratio,
    quick_probe,
)
from oats_vision.evaluation import knn as knn_protocol
from oats_vision.evaluation import linear_probe as linear_probe_protocol
from oats_vision.evaluation.harness import ZERO_SHOT, run_tasks
from oats_vision.evaluation.knn import NEIGHBOURS, TEMPERATURE
from oats_vision.models import ModelSource, load_model, load_tokenizer, source_of
from oats_vision.text import load_tokens
from oats_vision.transforms import Transform

Model = Annotated[str, typer.Argument(help="a compressed checkpoint, or any model that `compress` takes")]
Dense = Annotated[
    str | None, typer.Option(help="the dense model to compare with [default: the one that was compressed]")
]
NoDense = Annotated[bool, typer.Option("--no-dense", help="evaluate the compressed model alone")]
Batch = Annotated[int, typer.Option(help="pictures in a batch")]
Seed = Annotated[int, typer.Option(help="of the choice of pictures, and of the probe's training")]
Device = Annotated[str, typer.Option(help="auto (CUDA if it is there), cpu, cuda, ...")]
Dtype = Annotated[str, typer.Option(help="precision of weights and arithmetic: float32, float16 or bfloat16")]
Mixed = Annotated[
    str | None, typer.Option(help="float16 or bfloat16: matrix products in it, all else in --dtype (autocast)")
]
Streaming = Annotated[bool, typer.Option("--streaming", help="stream a Hugging Face dataset")]
Workers = Annotated[int, typer.Option(help="processes that read pictures")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run model code from a hub")]
Train = Annotated[str, typer.Option(help="labelled pictures to learn from: one folder a class, hf:name or demo")]
Val = Annotated[str, typer.Option(help="labelled pictures to evaluate on")]
TrainSplit = Annotated[str, typer.Option(help="split of --train, if a Hugging Face dataset")]
ValSplit = Annotated[str, typer.Option(help="split of --val, if a Hugging Face dataset")]
TrainSamples = Annotated[int | None, typer.Option(help="learn from that many pictures only [default: all]")]
ValSamples = Annotated[int | None, typer.Option(help="evaluate on that many pictures only [default: all]")]
Cache = Annotated[Path, typer.Option(help="folder that features are kept in, under what they are made of")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="neither read nor write cached features")]
CACHE = Path("~/.cache/oats_vision")

# what to report; for each metric which pictures are right, or the perplexity
Score = tuple[dict[str, Any], dict[str, Tensor | Perplexity]]


def top1(
    model: Model,
    data: Annotated[str, typer.Option(help="labelled pictures: one folder a class, hf:name or demo")],
    split: Annotated[str, typer.Option(help="split of a Hugging Face dataset")] = "validation",
    samples: Annotated[int | None, typer.Option(help="evaluate on that many pictures only [default: all]")] = None,
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
    models = _Models(model, dense, no_dense, device, dtype, trust_remote_code)
    mixed = dtype_of("--mixed-precision", mixed_precision) if mixed_precision else None
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
    _show(models, f"top-1 of {model} on {data}", {"protocol": "top1", "data": data}, scores, rows, as_json)


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
    models = _Models(model, dense, no_dense, device, dtype, trust_remote_code)
    loading = {"batch_size": batch_size, "seed": seed, "streaming": streaming, "workers": workers}
    splits = _splits(models.transform, (train, train_split, train_samples), (val, val_split, val_samples), loading)
    extract = _extraction(splits, None if no_cache else cache, mixed_precision)

    def protocol(module: nn.Module, what: str) -> Score:
        features = extract(module, what)
        if quick:
            with notes.status(f"logistic regression, {what}"):
                probe = quick_probe(*features, seed=seed)
        else:
            with report.counting_progress(notes, f"linear probe, {what}", "steps", iterations) as progress:
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
    _show(models, f"{about['protocol']} of {model}: {train} -> {val}", about, scores, rows, as_json)


def knn(
    model: Model,
    train: Train,
    val: Val,
    k: Annotated[list[int] | None, typer.Option(help="neighbours; may be repeated [default: 10 20 100 200]")] = None,
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
    if temperature <= 0 or any(count < 1 for count in k or ()):
        raise ConfigError("--temperature must be above 0, and --k at least 1")
    models = _Models(model, dense, no_dense, device, dtype, trust_remote_code)
    loading = {"batch_size": batch_size, "seed": seed, "streaming": streaming, "workers": workers}
    splits = _splits(models.transform, (train, train_split, train_samples), (val, val_split, val_samples), loading)
    extract = _extraction(splits, None if no_cache else cache, mixed_precision)

    def protocol(module: nn.Module, what: str) -> Score:
        features = extract(module, what)
        correct = knn_protocol(*features, neighbours=k or NEIGHBOURS, temperature=temperature)
        accuracy = {str(count): 100 * float(right.float().mean()) for count, right in correct.items()}
        return {"top1": accuracy, **_about(features)}, {f"k = {count}": right for count, right in correct.items()}

    scores = models.run(protocol)
    about = {"protocol": "k-NN", "train": train, "val": val}
    _show(models, f"k-NN of {model}: {train} -> {val}", about, scores, _extraction_rows(scores), as_json)


def perplexity(
    model: Model,
    data: Annotated[str, typer.Option(help="text: a .txt or .jsonl file, wikitext, c4, fineweb, hf:name or demo")],
    split: Annotated[str, typer.Option(help="split of a dataset")] = "test",
    sequence_length: Annotated[int, typer.Option(min=2, help="tokens in a window")] = 2048,
    stride: Annotated[
        int | None, typer.Option(help="tokens that windows move by [default: --sequence-length, no overlap]")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="the first windows only [default: all]")] = None,
    dense: Dense = None,
    no_dense: NoDense = False,
    batch_size: Annotated[int, typer.Option(min=1, help="windows in a batch")] = 1,
    device: Device = "auto",
    dtype: Dtype = "float32",
    streaming: Streaming = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Perplexity of a language model.

    By default the convention of published WikiText-2 figures: the documents joined by empty lines, windows of 2,048
    tokens that do not overlap, an incomplete last one left out. The ratio's interval is over windows.
    """
    models = _Models(model, dense, no_dense, device, dtype, trust_remote_code)
    ids = load_tokens(data, load_tokenizer(model), split=split, streaming=streaming)
    if samples:
        ids = ids[: sequence_length + (samples - 1) * (stride or sequence_length)]

    def protocol(module: nn.Module, what: str) -> Score:
        score = score_text(module, ids, what, length=sequence_length, stride=stride, batch_size=batch_size)
        return score.to_dict(), {"perplexity": score}

    scores = models.run(protocol)
    rows = {
        "tokens/s": [f"{about['tokens_per_second']:.0f}" for about, _ in scores.values()],
        "windows": [f"{about['windows']} of {sequence_length} tokens" for about, _ in scores.values()],
    }
    about = {"protocol": "perplexity", "data": data, "sequence_length": sequence_length, "stride": stride}
    _show(models, f"perplexity of {model} on {data}", about, scores, rows, as_json)


def lm(
    model: Model,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="of the LM evaluation harness; may be repeated [default: the eight of the OATS paper]"),
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="examples in the prompt [default: the task's own]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="documents of each task at most [default: all]")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="folder of task definitions of your own")] = None,
    dense: Dense = None,
    no_dense: NoDense = False,
    batch_size: Annotated[int, typer.Option(min=1, help="documents in a batch")] = 8,
    device: Device = "auto",
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Accuracy on tasks of the LM evaluation harness (needs the extra `llm`).

    [bold]oats-vision eval lm smollm_40/ --tasks piqa --tasks arc_easy[/bold]

    MMLU as in the paper: --tasks mmlu --shots 5
    """
    models = _Models(model, dense, no_dense, device, dtype, trust_remote_code)
    tokenizer = load_tokenizer(model)

    def protocol(module: nn.Module, what: str) -> Score:
        with notes.status(f"tasks, {what}"):
            scores = run_tasks(
                module,
                tokenizer,
                tasks or ZERO_SHOT,
                shots=shots,
                limit=limit,
                batch_size=batch_size,
                folder=task_folder,
            )
        accuracy = {task: score.accuracy for task, score in scores.items()}
        mean = sum(accuracy.values()) / len(accuracy)
        return {"top1": accuracy, "mean": mean}, {task: score.correct for task, score in scores.items()}

    scores = models.run(protocol)
    rows = {"mean of the tasks": [f"{about['mean']:.2f}%" for about, _ in scores.values()]}
    about = {"protocol": "lm-eval", "data": " ".join(tasks or ZERO_SHOT), "shots": shots, "limit": limit}
    _show(models, f"tasks, {model}", about, scores, rows, as_json)


class _Models:
    """The compressed model and the dense one that it came from; one of them is in memory at a time."""

    def __init__(self, model: str, dense: str | None, no_dense: bool, device: str, dtype: str, trust: bool) -> None:
        if dense and no_dense:
            raise ConfigError("give either --dense or --no-dense")
        self.device = choose_device(device)
        self.options: dict[str, Any] = {
            "dtype": dtype_of("--dtype", dtype),
            "device": self.device,
            "trust_remote_code": trust,
        }
        self.directory = Path(model) if checkpoint.is_checkpoint(Path(model)) else None
        self.loaders: dict[str, Callable[[], nn.Module]] = {}
        if self.directory is None:
            if dense:
                raise ConfigError(f"--dense is for a compressed checkpoint, and {model} is none")
            module, transform = load_model(model, **self.options)
            self.loaders["dense"] = lambda: module
        else:
            source = ModelSource(**checkpoint.read_config(self.directory)["source"])
            transform = checkpoint.load_transform(self.directory)
            if not no_dense:
                self.loaders["dense"] = lambda: self._dense(source, dense)
            self.loaders["compressed"] = lambda: checkpoint.load(Path(model), **self.options)
        self.name, self._transform = model, transform

    @property
    def transform(self) -> Transform:
        """The models' preprocessing of pictures. Raises ModelError if it is not known."""
        return need_transform(self._transform, self.name)

    def _dense(self, source: ModelSource, name: str | None) -> nn.Module:
        origin = source.origin or {}
        if name is None and not origin:
            raise ConfigError(f"{self.directory} does not say where its dense model is: give --dense or --no-dense")
        try:
            module, _ = load_model(name or origin["name"], image_size=origin.get("image_size"), **self.options)
        except ModelError as problem:
            raise ModelError(f"the dense model: {problem} (give --dense, or --no-dense)") from None
        found = source_of(module)
        if (found.kind, found.name) != (source.kind, source.name) or found.args != source.args:
            raise ConfigError(f"--dense {name or origin['name']} is no {source.name} as in {self.directory}")
        return module

    def run(self, protocol: Callable[[nn.Module, str], Score]) -> dict[str, Score]:
        """The protocol on each model."""
        return {what: protocol(load(), what) for what, load in self.loaders.items()}


Split = tuple[str, str, int | None]  # source, split, samples


def _splits(transform: Transform, train: Split, val: Split, loading: dict[str, Any]) -> dict[str, Batches]:
    """Both splits, checked before a model is loaded."""
    return {
        flag: load_pictures(source, transform, samples=samples, labelled=True, split=split, **loading)
        for flag, (source, split, samples) in {"train": train, "val": val}.items()
    }


def _extraction(
    splits: dict[str, Batches], cache: Path | None, mixed_precision: str | None
) -> Callable[[nn.Module, str], tuple[Features, Features]]:
    """What gives a model's features of both splits."""
    mixed = dtype_of("--mixed-precision", mixed_precision) if mixed_precision else None
    folder = cache.expanduser() if cache else None

    def extract(module: nn.Module, what: str) -> tuple[Features, Features]:
        blocks = 1 if checkpoint.is_sliced(module) else 4
        features = []
        for flag, batches in splits.items():
            with report.evaluation_progress(notes, f"features of --{flag}, {what}", batches.total) as progress:
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


def _show(
    models: _Models,
    title: str,
    about: dict[str, Any],
    scores: dict[str, Score],
    rows: dict[str, list[str]],
    as_json: bool,
) -> None:
    """Print the scores and their differences, and add them to the checkpoint's report."""
    differences: dict[str, Difference | Ratio] = {}
    values: dict[str, list[str]] = {}
    for metric in next(iter(scores.values()))[1]:
        measured = [score[metric] for _, score in scores.values() if metric in score]
        values[metric] = [_text(score) for score in measured]
        if len(measured) == 2:
            differences[metric] = _difference(*measured)
    result = {
        **about,
        "model": str(models.directory or ""),
        **{what: details for what, (details, _) in scores.items()},
        "difference": {metric: difference.to_dict() for metric, difference in differences.items()},
        "machine": machine(models.device),
    }
    if models.directory:
        checkpoint.add_evaluation(models.directory, result)
    if as_json:
        typer.echo(json.dumps(result))
        return
    shown = {metric: str(difference) for metric, difference in differences.items()}
    results().print(report.comparison_table(title, list(scores), values | rows, shown))


def _text(score: Tensor | Perplexity) -> str:
    return f"{score.value:.3f}" if isinstance(score, Perplexity) else f"{100 * float(score.float().mean()):.2f}%"


def _difference(dense: Tensor | Perplexity, compressed: Tensor | Perplexity) -> Difference | Ratio:
    if isinstance(dense, Perplexity) and isinstance(compressed, Perplexity):
        return paired_ratio(dense, compressed)
    assert isinstance(dense, Tensor)
    assert isinstance(compressed, Tensor)
    return paired_difference(dense, compressed)
