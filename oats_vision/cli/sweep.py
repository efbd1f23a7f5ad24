"""`oats-vision sweep`: a grid of compressions of one model, each measured, in one table, one CSV file and one page."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from oats_vision.cli.common import notes, results
from oats_vision.config import RunConfig
from oats_vision.display import Display
from oats_vision.grid import OUT, Extent, load_sweep_config

if TYPE_CHECKING:
    from oats_vision.sweep import Sweep

WHAT, GRID, DATA, EVALUATION = "What to compress", "The grid", "Calibration data", "Evaluation"
OUTPUT, MACHINE, EXPERTS = "Output", "Machine", "The algorithm, for experts"
EXAMPLES = """\
three rates by two rank ratios, on the demo
  oats-vision sweep --rate 0.3 --rate 0.5 --rate 0.7 --rank-ratio 0.1 --rank-ratio 0.2
OATS and two baselines on a classifier, three draws of the calibration pictures
  oats-vision sweep --model vit_base_patch16_224 --data imagenet/train --eval-data imagenet/val \\
    --method oats --method wanda --method sparsegpt --rate 0.4 --rate 0.5 --seeds 3
a grid in a file
  oats-vision sweep --config sweep.yaml --out dinov2_l_sweep"""


def _setting(panel: str, name: str, *flags: str) -> Any:
    """An option of a setting that all cells share."""
    field = RunConfig.model_fields[name]
    default = "" if field.default in (None, ()) else f"  [default: {field.default}]"
    return typer.Option(*flags, help=f"{field.description}{default}", show_default=False, rich_help_panel=panel)


def _grid(name: str, *flags: str) -> Any:
    """An option of the grid."""
    return typer.Option(*flags, help=Extent.model_fields[name].description, show_default=False, rich_help_panel=GRID)


def sweep(
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these settings; those of the grid are lists", rich_help_panel=WHAT)
    ] = None,
    model: Annotated[str | None, _setting(WHAT, "model")] = None,
    skip: Annotated[list[str] | None, _setting(WHAT, "skip")] = None,
    image_size: Annotated[int | None, _setting(WHAT, "image_size")] = None,
    pretrained: Annotated[bool | None, _setting(WHAT, "pretrained", "--pretrained/--no-pretrained")] = None,
    trust_remote_code: Annotated[bool | None, _setting(WHAT, "trust_remote_code", "--trust-remote-code")] = None,
    rate: Annotated[list[str] | None, _grid("rate")] = None,
    rank_ratio: Annotated[list[str] | None, _grid("rank_ratio")] = None,
    method: Annotated[list[str] | None, _grid("method")] = None,
    pattern: Annotated[list[str] | None, _grid("pattern")] = None,
    seeds: Annotated[int | None, _grid("seeds")] = None,
    data: Annotated[str | None, _setting(DATA, "data")] = None,
    samples: Annotated[int | None, _setting(DATA, "samples")] = None,
    sequence_length: Annotated[int | None, _setting(DATA, "sequence_length")] = None,
    split: Annotated[str | None, _setting(DATA, "split")] = None,
    streaming: Annotated[bool | None, _setting(DATA, "streaming", "--streaming")] = None,
    seed: Annotated[int | None, _setting(DATA, "seed")] = None,
    evaluate: Annotated[bool | None, _setting(EVALUATION, "eval", "--eval/--no-eval")] = None,
    eval_data: Annotated[str | None, _setting(EVALUATION, "eval_data")] = None,
    eval_split: Annotated[str | None, _setting(EVALUATION, "eval_split")] = None,
    eval_samples: Annotated[int | None, _setting(EVALUATION, "eval_samples")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"folder for sweep.csv and sweep.html; one that is there is gone on with  [default: {OUT}]",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    keep: Annotated[
        bool | None, typer.Option("--keep", help=Extent.model_fields["keep"].description, rich_help_panel=OUTPUT)
    ] = None,
    storage_dtype: Annotated[str | None, _setting(OUTPUT, "storage_dtype")] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="print one JSON object to standard output, and nothing else there",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    device: Annotated[str | None, _setting(MACHINE, "device")] = None,
    dtype: Annotated[str | None, _setting(MACHINE, "dtype")] = None,
    batch_size: Annotated[int | None, _setting(MACHINE, "batch_size")] = None,
    workers: Annotated[int | None, _setting(MACHINE, "workers")] = None,
    activation_memory: Annotated[float | None, _setting(MACHINE, "activation_memory")] = None,
    refit: Annotated[bool | None, _setting(EXPERTS, "refit", "--refit/--no-refit")] = None,
    scaling: Annotated[str | None, _setting(EXPERTS, "scaling")] = None,
    solver: Annotated[str | None, _setting(EXPERTS, "solver")] = None,
    iterations: Annotated[int | None, _setting(EXPERTS, "iterations")] = None,
    tolerance: Annotated[float | None, _setting(EXPERTS, "tolerance")] = None,
    fused_qkv: Annotated[str | None, _setting(EXPERTS, "fused_qkv")] = None,
    error_tolerance: Annotated[float | None, _setting(EXPERTS, "error_tolerance")] = None,
    latency_tokens: Annotated[int | None, _setting(EXPERTS, "latency_tokens")] = None,
) -> None:
    """Compress a model in several ways, and show what each costs against its size and speed.

    Options of the grid may be repeated; every combination is done that can be. A sweep that was stopped goes on where
    it was when it is started again; with more values it does those too.
    """
    flags = {
        name: value for name, value in locals().items() if name in RunConfig.model_fields or name in Extent.model_fields
    }
    chosen = load_sweep_config(config, flags | {"eval": evaluate})
    from oats_vision.sweep import sweep as run

    done = run(chosen, Display(notes))
    if as_json:
        typer.echo(json.dumps(done.to_dict()))
    else:
        _show(done)
    if done.failures:
        raise typer.Exit(1)


def _show(done: "Sweep") -> None:
    """The table, what failed, and where the files are."""
    from oats_vision.sweep_folder import CSV, PAGE
    from oats_vision.sweep_table import sweep_table

    console = results()
    out = done.config.out
    if done.rows:
        console.print(sweep_table(done))
    for line in done.notes:
        console.print(line, soft_wrap=True)
    if done.rows:
        console.print(f"Written to {out / CSV}; the page with plots is {out / PAGE}.", soft_wrap=True)
