"""`oats-vision compress`: compress a model, measure what it cost, write the checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from oats_vision.cli.common import Json, notes, option
from oats_vision.cli.outcome import show_outcome, show_plan
from oats_vision.config import RunConfig, load_run_config
from oats_vision.display import Display
from oats_vision.run import dry_run, run


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
    settings = load_run_config(config, flags)
    if settings.dry_run:
        planned, estimate = dry_run(settings, Display(notes))
        show_plan(planned, estimate, as_json)
    else:
        show_outcome(run(settings, Display(notes)), as_json)
