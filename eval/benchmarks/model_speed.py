r"""Speed of whole models: compressed against dense, and against what else makes a dense model fast, in one run.

    python eval/benchmarks/model_speed.py vit_b_50/ --batch-sizes 1 16
    python eval/benchmarks/model_speed.py vit_b_50/ --others bfloat16 compile onnxruntime openvino --csv models.csv

The dense model is the checkpoint's twin with dense layers of the same shapes. `bfloat16` and `compile` are that model
in PyTorch; `onnxruntime` and `openvino` run its ONNX export in float32 with as many threads (install onnx, onnxscript,
onnxruntime, openvino). `rank ratio 0` is a model pruned at the same rate in the same kernels, with random weights.
"""

import argparse
import copy
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from layer_speed import random_layer, write_csv
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import oats_vision as ov
from oats_vision.checkpoint import load_transform
from oats_vision.core.budget import Pattern
from oats_vision.evaluation.speed import dense_twin, plain_picture
from oats_vision.nn.sparse_low_rank import compressed_layers
from oats_vision.timing import side_by_side

OTHERS = ["bfloat16", "compile", "onnxruntime", "openvino", "rank ratio 0"]


def export(model: nn.Module, batch: Tensor, file: Path) -> None:
    torch.onnx.export(model, (batch,), str(file), dynamo=True, verbose=False)


def onnxruntime(model: nn.Module, batch: Tensor, folder: Path):
    import onnxruntime

    export(model, batch, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: batch.numpy()})


def openvino(model: nn.Module, batch: Tensor, folder: Path):
    import openvino

    export(model, batch, folder / "model.onnx")
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(folder / "model.onnx"), "CPU", settings)
    return partial(compiled, [batch.numpy()])


def pruned(compressed: nn.Module) -> nn.Module:
    """The same model at the same rate without low-rank terms."""
    model = copy.deepcopy(compressed)
    for name, layer in compressed_layers(model).items():
        rate = 1 - layer.spec.parameters / layer.spec.dense_parameters
        storage = layer.dtype
        plain = random_layer(layer.out_features, layer.in_features, rate, 0.0, Pattern(), storage)
        if layer.bias is None:
            plain.bias = None
        model.set_submodule(name, plain)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", metavar="DIR", help="compressed vision checkpoints")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--others", nargs="*", default=OTHERS, choices=OTHERS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()

    rows = []
    for directory, size in track([(d, s) for d in args.directories for s in args.batch_sizes], "timing"):
        transform = load_transform(directory)
        if transform is None:
            sys.exit(f"{directory} says nothing about its preprocessing: compress a model that has one")
        picture = plain_picture(transform)
        batch = picture.expand(size, *picture.shape).contiguous()
        compressed = ov.load(directory)
        dense = dense_twin(compressed)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            calls = {"dense": partial(dense, batch), "compressed": partial(compressed, batch)}
            if "rank ratio 0" in args.others:
                calls["rank ratio 0"] = partial(pruned(compressed), batch)
            if "bfloat16" in args.others:
                half = batch.bfloat16()
                calls["dense, bfloat16"] = partial(copy.deepcopy(dense).bfloat16(), half)
                calls["compressed, bfloat16"] = partial(ov.load(directory, dtype=torch.bfloat16), half)
            if "compile" in args.others:
                calls["dense, torch.compile"] = partial(torch.compile(dense_twin(compressed)), batch)
                calls["compressed, torch.compile"] = partial(torch.compile(ov.load(directory)), batch)
            for name, build in (("onnxruntime", onnxruntime), ("openvino", openvino)):
                if name in args.others:
                    (Path(folder) / name).mkdir()
                    calls[f"dense, {name}"] = build(dense, batch, Path(folder) / name)
            taken = side_by_side(calls, args.repeats)
        for name, seconds in taken.items():
            speedup = taken["dense"] / seconds
            rows.append({"model": directory, "batch": size, "what": name, "ms": seconds * 1e3, "to_dense": speedup})
    table = Table(
        title=f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}; medians of {args.repeats}"
    )
    for heading in ("model", "batch", "what", "ms", "times faster than dense"):
        table.add_column(heading, justify="left" if heading in ("model", "what") else "right")
    for row in rows:
        table.add_row(row["model"], str(row["batch"]), row["what"], f"{row['ms']:.1f}", f"{row['to_dense']:.2f}")
    Console(width=120).print(table)
    if args.csv:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
