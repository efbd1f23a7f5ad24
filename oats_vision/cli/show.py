"""`oats-vision inspect`, `models` and `rollout`: look at checkpoints and at what can be compressed."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer

from oats_vision import checkpoint, report
from oats_vision.adapters import adapters
from oats_vision.cli.common import Json, results
from oats_vision.models import ALIASES


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
    console = results()
    console.print(report.key_values(str(directory), rows))
    console.print(report.layer_table(done))


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
    console = results()
    if search:
        console.print("\n".join(found) or f"no timm model with pretrained weights has {search!r} in its name")
        return
    console.print(report.key_values("families", families))
    console.print(report.key_values("aliases", ALIASES | {"demo": "a ViT for Fashion-MNIST, inside the package"}))
    console.print(
        "Any timm name of these families works too (--search NAME lists them), hf:org/name, hub:entry, a path."
    )
