"""The command line: parse, call, print."""

import dataclasses
import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from rich.console import Console
from rich.logging import RichHandler

from oats_vision import checkpoint, report
from oats_vision.adapters import adapters
from oats_vision.config import RunConfig, load_run_config
from oats_vision.data import Batches, load_pictures
from oats_vision.errors import ConfigError, ModelError, OatsVisionError
from oats_vision.evaluation.top1 import Top1, evaluate_top1
from oats_vision.layers import merge as merge_model
from oats_vision.models import ALIASES, load_model, save_plain, source_of
from oats_vision.pipeline import compress as compress_model
from oats_vision.transforms import Transform

app = typer.Typer(
    help="Compress vision transformers with OATS: every linear of the blocks becomes sparse plus low-rank.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
evaluations = typer.Typer(help="Measure what compression cost.", no_args_is_help=True)
app.add_typer(evaluations, name="eval")
notes = Console(stderr=True)  # progress and warnings; results go to standard output


def _results() -> Console:
    """Standard output; wide enough for the tables when it is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _option(name: str, *flags: str) -> Any:
    """An option of RunConfig; unset flags leave the field to the YAML file or the default."""
    field = RunConfig.model_fields[name]
    default = "" if field.default is None else f" [default: {field.default}]"
    return typer.Option(*flags, help=f"{field.description}{default}", show_default=False)


Json = Annotated[bool, typer.Option("--json", help="print one JSON object to standard output, and nothing else there")]


@app.command()
def compress(
    config: Annotated[Path | None, typer.Option(help="YAML file of these settings (underscores for dashes)")] = None,
    model: Annotated[str | None, _option("model")] = None,
    data: Annotated[str | None, _option("data")] = None,
    method: Annotated[str | None, _option("method")] = None,
    rate: Annotated[float | None, _option("rate")] = None,
    rank_ratio: Annotated[float | None, _option("rank_ratio")] = None,
    pattern: Annotated[str | None, _option("pattern")] = None,
    out: Annotated[Path | None, _option("out")] = None,
    overwrite: Annotated[bool | None, _option("overwrite", "--overwrite")] = None,
    merge: Annotated[bool | None, _option("merge", "--merge")] = None,
    samples: Annotated[int | None, _option("samples")] = None,
    batch_size: Annotated[int | None, _option("batch_size")] = None,
    seed: Annotated[int | None, _option("seed")] = None,
    eval_data: Annotated[str | None, _option("eval_data")] = None,
    eval_samples: Annotated[int | None, _option("eval_samples")] = None,
    iterations: Annotated[int | None, _option("iterations")] = None,
    solver: Annotated[str | None, _option("solver")] = None,
    tolerance: Annotated[float | None, _option("tolerance")] = None,
    scaling: Annotated[str | None, _option("scaling")] = None,
    fused_qkv: Annotated[str | None, _option("fused_qkv")] = None,
    device: Annotated[str | None, _option("device")] = None,
    dtype: Annotated[str | None, _option("dtype")] = None,
    storage_dtype: Annotated[str | None, _option("storage_dtype")] = None,
    image_size: Annotated[int | None, _option("image_size")] = None,
    pretrained: Annotated[bool | None, _option("pretrained", "--pretrained/--no-pretrained")] = None,
    split: Annotated[str | None, _option("split")] = None,
    eval_split: Annotated[str | None, _option("eval_split")] = None,
    streaming: Annotated[bool | None, _option("streaming", "--streaming")] = None,
    workers: Annotated[int | None, _option("workers")] = None,
    activation_memory: Annotated[float | None, _option("activation_memory")] = None,
    trust_remote_code: Annotated[bool | None, _option("trust_remote_code", "--trust-remote-code")] = None,
    as_json: Json = False,
) -> None:
    """Compress a model, measure what it cost, and write the checkpoint.

    Without arguments it runs on the demo: a small ViT and Fashion-MNIST pictures that ship with the package.

    [bold]oats-vision compress --model dinov2_vitl14 --data imagenet/train --rate 0.5 --out dinov2_l_50/[/bold]
    """
    flags = {name: value for name, value in locals().items() if name in RunConfig.model_fields}
    run = load_run_config(config, flags)
    start = time.perf_counter()
    checkpoint.check_target(run.out, run.overwrite)
    target = choose_device(run.device)
    if run.data is None and run.model != "demo":
        raise ConfigError("--data must be given for a model that is not the demo: a folder of pictures or hf:name")
    dense, transform = load_model(
        run.model,
        pretrained=run.pretrained,
        image_size=run.image_size,
        dtype=getattr(torch, run.dtype),
        device=target,
        trust_remote_code=run.trust_remote_code,
    )
    transform = _need_transform(transform, run.model)
    source = source_of(dense)
    settings = run.settings().model_copy(update={"storage_dtype": run.storage_dtype or source.dtype})
    loading: dict[str, Any] = {"batch_size": run.batch_size, "streaming": run.streaming, "workers": run.workers}
    pictures = load_pictures(
        run.data or "demo", transform, samples=run.samples, seed=run.seed, split=run.split, **loading
    )
    eval_source = run.eval_data or ("demo" if run.model == "demo" else None)
    test = None
    if eval_source:
        options: dict[str, Any] = {
            "samples": run.eval_samples,
            "seed": run.seed,
            "split": run.eval_split,
            "labelled": True,
        }
        test = load_pictures(eval_source, transform, **options, **loading)

    parameters = sum(parameter.numel() for parameter in dense.parameters())
    before = _top1(dense, test, "dense") if test else None
    with report.compression_progress(notes) as progress:
        done = compress_model(
            dense, pictures, settings=settings, activation_memory=run.activation_memory, progress=progress
        )
    compressed = dense  # the same module: its linears were replaced
    checkpoint.save(compressed, run.out, overwrite=run.overwrite)
    storage = getattr(torch, str(settings.storage_dtype))
    sizes = checkpoint.measure(compressed.state_dict().values(), done, storage)
    after = _top1(compressed, test, "compressed") if test else None
    kept = parameters - done.dense_parameters + done.parameters
    files = {file.name: file.stat().st_size for file in run.out.iterdir()}
    result: dict[str, Any] = {
        "run": run.model_dump(mode="json"),
        "settings": settings.model_dump(),
        "samples": done.samples,
        "skipped_pictures": pictures.skipped,
        "parameters": {"dense": parameters, "compressed": kept},
        "bytes": dataclasses.asdict(sizes) | {"layer_ratio": sizes.layer_ratio, "files": files},
        "top1": {"dense": before.to_dict(), "compressed": after.to_dict()} if before and after else None,
        "seconds": {**done.seconds, "command": time.perf_counter() - start},
        "peak_memory": _peak_memory(target),
        "machine": _machine(target),
        "out": str(run.out),
    }
    checkpoint.write_json(run.out / checkpoint.REPORT, result)
    if run.merge:
        save_plain(merge_model(compressed), source, storage, run.out / "merged")
    if as_json:
        typer.echo(json.dumps(result))
        return
    console = _results()
    rate_used, rank_ratio_used, _ = settings.terms
    title = f"{run.model}: rate {rate_used:.3g}, rank ratio {rank_ratio_used:.3g}, pattern {settings.pattern}"
    scores = (before, after) if before and after else None
    console.print(report.run_table(f"{title}, stored in {settings.storage_dtype}", (parameters, kept), sizes, scores))
    errors = [layer.error for layer in done.layers]
    written = ", ".join(f"{name} {report.megabytes(size)}" for name, size in sorted(files.items()))
    console.print(
        f"{len(errors)} layers compressed with {done.samples} pictures ({pictures.skipped} unreadable ones skipped) in "
        f"{done.seconds['total']:.1f} s: {done.seconds['calibration']:.1f} s calibration, "
        f"{done.seconds['solver']:.1f} s solver; {result['seconds']['command']:.1f} s with the evaluation. "
        f"Peak memory {_peak_memory(target) / 1e9:.2f} GB.\n"
        f"Relative error of a layer: mean {sum(errors) / len(errors):.4f}, largest {max(errors):.4f}.\n"
        f"Written to {run.out} ({written})"
        f"{', and the dense merge to ' + str(run.out / 'merged') if run.merge else ''}.",
        soft_wrap=True,
    )
    if not scores:
        console.print(f"Accuracy was not measured: oats-vision eval top1 {run.out} --data LABELLED_PICTURES")


@evaluations.command("top1")
def eval_top1(
    model: Annotated[str, typer.Argument(help="a compressed checkpoint, or any model that `compress` takes")],
    data: Annotated[str, typer.Option(help="labelled pictures: one folder a class, hf:name or demo")],
    split: Annotated[str, typer.Option(help="split of a Hugging Face dataset")] = "validation",
    samples: Annotated[int | None, typer.Option(help="evaluate on that many pictures only [default: all]")] = None,
    batch_size: Annotated[int, typer.Option(help="pictures in a batch")] = 64,
    seed: Annotated[int, typer.Option(help="of the choice of --samples")] = 42,
    device: Annotated[str, typer.Option(help="auto (CUDA if it is there), cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    streaming: Annotated[bool, typer.Option("--streaming", help="stream a Hugging Face dataset")] = False,
    workers: Annotated[int, typer.Option(help="processes that read pictures")] = 0,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="run model code from a hub")] = False,
    as_json: Json = False,
) -> None:
    """Top-1 and top-5 accuracy of a compressed or a dense model."""
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"--dtype must be float32, float16 or bfloat16, got {dtype!r}")
    precision, target = getattr(torch, dtype), choose_device(device)
    if checkpoint.is_checkpoint(Path(model)):
        module, transform = (
            checkpoint.load(model, device=target, dtype=precision, trust_remote_code=trust_remote_code),
            checkpoint.load_transform(model),
        )
    else:
        module, transform = load_model(model, dtype=precision, device=target, trust_remote_code=trust_remote_code)
    pictures = load_pictures(
        data,
        _need_transform(transform, model),
        batch_size=batch_size,
        samples=samples,
        seed=seed,
        labelled=True,
        split=split,
        streaming=streaming,
        workers=workers,
    )
    score = _top1(module, pictures, model)
    if as_json:
        typer.echo(json.dumps({"model": model, "data": data, **score.to_dict(), "machine": _machine(target)}))
        return
    rows = {
        "top-1": f"{score.top1:.2f}%",
        "top-5": f"{score.top5:.2f}%",
        "pictures": f"{score.pictures} ({score.skipped} unreadable ones skipped)",
        "pictures/s": f"{score.pictures / score.seconds:.0f}",
    }
    _results().print(report.key_values(f"{model} on {data}", rows))


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="a compressed checkpoint")],
    as_json: Json = False,
) -> None:
    """Show a checkpoint: its settings, sizes, and each layer's budget and error."""
    config = checkpoint.read_config(directory)
    tensors = checkpoint.read_weights(directory, config)
    done = checkpoint.CompressionReport.from_dict(config)
    sizes = checkpoint.measure(tensors.values(), done, getattr(torch, config["storage_dtype"]))
    if as_json:
        typer.echo(json.dumps(config | {"bytes": dataclasses.asdict(sizes) | {"layer_ratio": sizes.layer_ratio}}))
        return
    rows = {
        "model": f"{config['source']['kind']} {config['source']['name']} (adapter {config['adapter']})",
        **{name: value for name, value in done.settings.model_dump().items() if value is not None},
        "calibration": f"{done.samples} pictures",
        "parameters of the layers": f"{done.parameters:,} of {done.dense_parameters:,} "
        f"({done.parameters / done.dense_parameters:.1%})",
        "bytes of the layers": f"{report.megabytes(sizes.layers)} of {report.megabytes(sizes.dense_layers)} "
        f"({sizes.layer_ratio:.3f}), positions of S {report.megabytes(sizes.positions)}",
        "bytes of the model": f"{report.megabytes(sizes.total)} of {report.megabytes(sizes.dense_total)}",
    }
    console = _results()
    console.print(report.key_values(str(directory), rows))
    console.print(report.layer_table(done))


@app.command()
def models(
    search: Annotated[str | None, typer.Option(help="list timm models whose name contains this")] = None,
    as_json: Json = False,
) -> None:
    """List the supported model families and the aliases."""
    found = timm.list_models(f"*{search}*", pretrained=True) if search else []
    families = {adapter.name: adapter.serves for adapter in adapters()}
    if as_json:
        typer.echo(json.dumps({"families": families, "aliases": ALIASES, "found": found}))
        return
    console = _results()
    if search:
        console.print("\n".join(found) or f"no timm model with pretrained weights has {search!r} in its name")
        return
    console.print(report.key_values("families", families))
    console.print(report.key_values("aliases", ALIASES | {"demo": "a ViT for Fashion-MNIST, inside the package"}))
    console.print(
        "Any timm name of these families works too (--search NAME lists them), hf:org/name, hub:entry, a path."
    )


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA if it is there.

    Raises:
        ConfigError: the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        raise ConfigError(f"device: {name!r} is not there: {str(problem).splitlines()[0]}") from None
    return device


def _need_transform(transform: Transform | None, model: str) -> Transform:
    if transform is None:
        raise ModelError(f"{model} says nothing about its preprocessing: use the Python API with batches of your own")
    return transform


def _top1(model: torch.nn.Module, batches: Batches, what: str) -> Top1:
    with report.evaluation_progress(notes, f"top-1 {what}", batches.total) as progress:
        return evaluate_top1(model, batches, progress)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the process, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def main() -> None:
    """Run the command; an error of the user's is one line on standard error and exit status 1."""
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=notes, show_time=False, show_path=False)])
    try:
        app()
    except OatsVisionError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
