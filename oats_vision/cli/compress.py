"""`oats-vision compress`: compress a model, measure what it cost, write the checkpoint."""

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from oats_vision import checkpoint, report
from oats_vision.adapters import find_adapter
from oats_vision.cli.common import (
    Json,
    choose_device,
    machine,
    need_transform,
    notes,
    option,
    peak_memory,
    perplexity,
    results,
    top1,
)
from oats_vision.config import RunConfig, load_run_config
from oats_vision.data import Batches, load_pictures
from oats_vision.errors import CheckpointError, ConfigError, OatsVisionError
from oats_vision.evaluation import Perplexity, Top1, paired_difference, paired_ratio
from oats_vision.layers import merge as merge_model
from oats_vision.models import load_model, load_tokenizer, save_plain, source_of
from oats_vision.pipeline import compress as compress_model
from oats_vision.text import Sequences, load_sequences, load_tokens
from oats_vision.transforms import Transform


def compress(
    config: Annotated[Path | None, typer.Option(help="YAML file of these settings (underscores for dashes)")] = None,
    model: Annotated[str | None, option("model")] = None,
    data: Annotated[str | None, option("data")] = None,
    method: Annotated[str | None, option("method")] = None,
    rate: Annotated[float | None, option("rate")] = None,
    rank_ratio: Annotated[str | None, option("rank_ratio")] = None,
    error_tolerance: Annotated[float | None, option("error_tolerance")] = None,
    latency_tokens: Annotated[int | None, option("latency_tokens")] = None,
    pattern: Annotated[str | None, option("pattern")] = None,
    out: Annotated[Path | None, option("out")] = None,
    overwrite: Annotated[bool | None, option("overwrite", "--overwrite")] = None,
    merge: Annotated[bool | None, option("merge", "--merge")] = None,
    samples: Annotated[int | None, option("samples")] = None,
    batch_size: Annotated[int | None, option("batch_size")] = None,
    seed: Annotated[int | None, option("seed")] = None,
    eval_data: Annotated[str | None, option("eval_data")] = None,
    eval_samples: Annotated[int | None, option("eval_samples")] = None,
    sequence_length: Annotated[int | None, option("sequence_length")] = None,
    iterations: Annotated[int | None, option("iterations")] = None,
    solver: Annotated[str | None, option("solver")] = None,
    tolerance: Annotated[float | None, option("tolerance")] = None,
    scaling: Annotated[str | None, option("scaling")] = None,
    refit: Annotated[bool | None, option("refit", "--refit/--no-refit")] = None,
    fused_qkv: Annotated[str | None, option("fused_qkv")] = None,
    skip: Annotated[list[str] | None, option("skip")] = None,
    device: Annotated[str | None, option("device")] = None,
    dtype: Annotated[str | None, option("dtype")] = None,
    storage_dtype: Annotated[str | None, option("storage_dtype")] = None,
    image_size: Annotated[int | None, option("image_size")] = None,
    pretrained: Annotated[bool | None, option("pretrained", "--pretrained/--no-pretrained")] = None,
    split: Annotated[str | None, option("split")] = None,
    eval_split: Annotated[str | None, option("eval_split")] = None,
    streaming: Annotated[bool | None, option("streaming", "--streaming")] = None,
    workers: Annotated[int | None, option("workers")] = None,
    activation_memory: Annotated[float | None, option("activation_memory")] = None,
    trust_remote_code: Annotated[bool | None, option("trust_remote_code", "--trust-remote-code")] = None,
    as_json: Json = False,
) -> None:
    """Compress a model, measure what it cost, and write the checkpoint.

    Without arguments it runs on the demo: a small ViT and Fashion-MNIST pictures that ship with the package.

    [bold]oats-vision compress --model dinov2_vitl14 --data imagenet/train --rate 0.5 --out dinov2_l_50/[/bold]
    """
    flags = {name: value for name, value in locals().items() if name in RunConfig.model_fields}
    run = load_run_config(config, flags)
    if run.merge and run.method == "slicegpt":
        raise ConfigError("--merge is for methods that keep the layers' shapes, and slicegpt makes them smaller")
    with checkpoint.locked(run.out):
        checkpoint.check_target(run.out, run.overwrite)
        _run(run, as_json)


def _run(run: RunConfig, as_json: bool) -> None:
    """The command, once its output is seen to be free and is held."""
    start = time.perf_counter()
    target = choose_device(run.device)
    if run.data is None and run.model != "demo":
        raise ConfigError(
            "--data must be given for a model that is not the demo: a folder of pictures, a text or hf:name"
        )
    dense, transform = load_model(
        run.model,
        pretrained=run.pretrained,
        image_size=run.image_size,
        dtype=getattr(torch, run.dtype),
        device=target,
        trust_remote_code=run.trust_remote_code,
    )
    checkpoint.check_source(dense)
    unit = find_adapter(dense).unit
    run = run.completed(unit)
    source = source_of(dense)
    settings = run.settings().model_copy(update={"storage_dtype": run.storage_dtype or source.dtype})
    tokenizer = load_tokenizer(run.model) if unit == "sequences" else None
    calibration: Batches | Sequences
    test: Batches | Tensor | None
    if tokenizer is None:
        calibration, test = _pictures(run, need_transform(transform, run.model))
    else:
        positions = getattr(dense.config, "max_position_embeddings", None)
        if isinstance(positions, int) and run.sequence_length > positions:
            raise ConfigError(
                f"sequence_length must be at most the model's {positions} positions, got {run.sequence_length}"
            )
        calibration, test = _text(run, tokenizer)

    parameters = sum(parameter.numel() for parameter in dense.parameters())
    before = _score(dense, test, run, "dense")
    with report.compression_progress(notes) as progress:
        done = compress_model(
            dense, calibration, settings=settings, activation_memory=run.activation_memory, progress=progress
        )
    compressed = dense  # the same module: its linears were replaced
    checkpoint.write(compressed, run.out, run.overwrite, tokenizer)
    storage = getattr(torch, str(settings.storage_dtype))
    sizes = checkpoint.measure(compressed.state_dict().values(), done, storage)
    how = "top1 {} --data {}" if tokenizer is None else "perplexity {} --data {}"
    with _after_the_checkpoint(run, how):
        after = _score(compressed, test, run, "compressed")
    skipped = calibration.skipped if isinstance(calibration, Batches) else 0
    kept = parameters - done.dense_parameters + done.parameters
    files = {file.name: file.stat().st_size for file in run.out.iterdir() if file.is_file()}
    result: dict[str, Any] = {
        "run": run.model_dump(mode="json"),
        "settings": settings.model_dump(),
        "samples": done.samples,
        "skipped_pictures": skipped,
        "parameters": {"dense": parameters, "compressed": kept},
        "bytes": dataclasses.asdict(sizes) | {"layer_ratio": sizes.layer_ratio, "files": files},
        **_compared(before, after),
        "seconds": {**done.seconds, "command": time.perf_counter() - start},
        "peak_memory": peak_memory(target),
        "machine": machine(target),
        "out": str(run.out),
    }
    with _after_the_checkpoint(run, how):
        checkpoint.write_json(run.out / checkpoint.REPORT, result)
        if run.merge:
            with checkpoint.new_directory(run.out / checkpoint.MERGED, overwrite=False) as merged:
                save_plain(merge_model(compressed), source, storage, merged)
                if tokenizer is not None:
                    tokenizer.save_pretrained(merged)
    if as_json:
        typer.echo(json.dumps(result))
        return
    console = results()
    title = f"{run.model}: {settings.summary}"
    scores = (before, after) if before and after else None
    console.print(report.run_table(f"{title}, stored in {settings.storage_dtype}", (parameters, kept), sizes, scores))
    errors = [layer.error for layer in done.layers]
    quality = (
        f"{done.error_name.capitalize()}: mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f}."
        if errors
        else f"Signal kept in a cut: smallest {min(done.slicing.kept):.4f}."
        if done.slicing
        else ""
    )
    what = f"{len(errors)} layers" if errors else "all blocks"
    written = ", ".join(f"{name} {report.megabytes(size)}" for name, size in sorted(files.items()))
    console.print(
        f"{what} compressed with {done.samples} {unit}{f' ({skipped} unreadable ones skipped)' * (skipped > 0)} in "
        f"{done.seconds['total']:.1f} s: {done.seconds['calibration']:.1f} s calibration, "
        f"{done.seconds['solver']:.1f} s solver; {result['seconds']['command']:.1f} s with the evaluation. "
        f"Peak memory {peak_memory(target) / 1e9:.2f} GB.\n"
        f"{quality}\n"
        f"Written to {run.out} ({written})"
        f"{', and the dense merge to ' + str(run.out / checkpoint.MERGED) if run.merge else ''}.",
        soft_wrap=True,
        markup=False,
    )
    if not scores:
        kind = "LABELLED_PICTURES" if tokenizer is None else "TEXT"
        console.print(f"What it cost was not measured: oats-vision eval {how.format(run.out, kind)}", markup=False)


@contextmanager
def _after_the_checkpoint(run: RunConfig, how: str) -> Iterator[None]:
    """What fails from here on is no lost run, and the message says so."""
    again = how.format(run.out, run.eval_data or "demo")
    complete = f"the checkpoint in {run.out} is complete"
    try:
        yield
    except SystemExit:
        typer.echo(f"{complete}; measure it with: oats-vision eval {again}", err=True)
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
    model: torch.nn.Module, test: Batches | Tensor | None, run: RunConfig, what: str
) -> Top1 | Perplexity | None:
    """Top-1 on pictures, perplexity on text."""
    if test is None:
        return None
    if isinstance(test, Batches):
        return top1(model, test, what)
    return perplexity(model, test, what, length=run.sequence_length, batch_size=run.batch_size or 1)


def _compared(dense: Top1 | Perplexity | None, compressed: Top1 | Perplexity | None) -> dict[str, Any]:
    """Both scores under the name of the protocol, and the difference of top-1 (ratio of perplexities)."""
    if isinstance(dense, Top1) and isinstance(compressed, Top1):
        protocol, change = "top1", {"difference": paired_difference(dense.correct, compressed.correct).to_dict()}
    elif isinstance(dense, Perplexity) and isinstance(compressed, Perplexity):
        protocol, change = "perplexity", {"ratio": paired_ratio(dense, compressed).to_dict()}
    else:
        return {}
    return {protocol: {"dense": dense.to_dict(), "compressed": compressed.to_dict(), **change}}
