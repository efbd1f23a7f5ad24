r"""Bytes of models at 3.5 bits a weight: on disk against the count, and in memory while they are loaded.

    python eval/benchmarks/file_sizes.py                      # the demo, DINOv2-L, Llama-3.2-1B; 1 GB of disk
    python eval/benchmarks/file_sizes.py --models demo --bits 2.5 3.5 6

The architectures are real, the weights random: no data, no network. Each linear has one of the formats below, as the
total and its importance, which is made up, say. `counted` is what its shape and its format say before it is made:
values, positions, scales, U and V; `on disk` what model.safetensors holds of them. The peak is that of a process of its
own that loads the model and reads all its weights once, beyond its libraries; what is dense (biases, norms, embeddings,
heads) is taken from it as it is in memory, in float32.
"""

import argparse
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from few_bits import random_layer
from loading import load_alone
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor, nn

import oats_vision as ov
from oats_vision.checkpoint import WEIGHTS
from oats_vision.compression.budgets import PartBudget
from oats_vision.compression.formats import FORMATS, Offer, choose
from oats_vision.compression.record import CompressionRecord, CompressionReport, LayerReport
from oats_vision.compression.settings import resolve
from oats_vision.core.budget import Budget
from oats_vision.core.grid import Grid
from oats_vision.models.loading.load import rebuild
from oats_vision.models.record import set_record, structure_of
from oats_vision.models.source import ModelSource
from oats_vision.nn.sparse_low_rank import SparseLowRankLinear

SOURCES = {
    "demo": ModelSource(
        "timm", "vit_small_patch16_224", {"img_size": 28, "patch_size": 4, "depth": 3, "num_classes": 10}
    ),
    "dinov2_vitl14": ModelSource("timm", "vit_large_patch14_dinov2", {"num_classes": 0}),
    "llama_3.2_1b": ModelSource(
        "huggingface",
        "LlamaForCausalLM",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
}
STORAGE = torch.float16
HEADINGS = (
    "model",
    "bits a weight",
    "counted",
    "on disk",
    "to count",
    "files",
    "dense",
    "peak",
    "peak - dense",
    "to packed",
)


@dataclass(frozen=True)
class Written:
    """What is known of a model before it is written: names of its compressed linears, and how many have each format.

    weights: that these had, dense. counted: bytes that they are to take.
    """

    names: set[str]
    formats: Counter[str]
    weights: int
    counted: int


def write_random(source: ModelSource, bits: float, out: Path) -> Written:
    """Write a model of random weights, compressed to at most so many bits a weight."""
    model = rebuild(source)
    structure = structure_of(model)
    structure.prepare(model)
    linears = {
        f"{block_name}.{name}": linear
        for block_name, block in structure.named_blocks(model)
        for name, linear in structure.named_linears(block)
    }
    weights = sum(linear.weight.numel() for linear in linears.values())
    chosen = choose([offers_of(linear) for linear in linears.values()], int(bits * weights / 8))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    report = CompressionReport(structure.family.name, resolve(bits=bits), unit=structure.family.unit)
    for (name, linear), offer in zip(linears.items(), chosen, strict=True):
        assert offer.format is not None
        layer = compressed(linear, offer.format)
        report.layers.append(LayerReport(name, layer.spec, {"weight": 0.0}, {}, {}, 0.0, 0))
        model.set_submodule(name, layer)
    fill(model)
    set_record(model, CompressionRecord(source, structure, report=report))
    ov.save(model, out)
    counted = sum(offer.bytes for offer in chosen)
    return Written(set(linears), Counter(str(offer.format) for offer in chosen), weights, counted)


def offers_of(linear: nn.Linear) -> list[Offer]:
    """A linear in all formats; each bit halves its error, and some linears matter more than others."""
    importance = float(torch.randn(()).exp())
    rows, columns = linear.weight.shape
    offers = []
    for one in FORMATS:
        offer = Offer.of(one, columns, [PartBudget("weight", rows, Budget(0, rows * columns))], 0.0)
        cost = importance * rows * columns * 4.0 ** (-8 * offer.bytes / (rows * columns))
        offers.append(replace(offer, cost=cost))
    return offers


def compressed(linear: nn.Linear, grid: Grid) -> SparseLowRankLinear:
    """Random codes and scales in the place of a linear."""
    rows, columns = linear.weight.shape
    layer = random_layer(rows, columns, grid, density=1.0, rank=0)
    if linear.bias is None:
        return layer
    return SparseLowRankLinear(
        replace(layer.spec, bias=True), layer.sparse, layer.low_rank, torch.randn(rows).to(STORAGE)
    )


def fill(model: nn.Module) -> None:
    """Give what is dense, and on the meta device, random values; what is one tensor stays one."""
    made: dict[int, Tensor] = {}
    missing = {name: one for name, one in model.state_dict(keep_vars=True).items() if one.is_meta}
    values = {name: made.setdefault(id(one), torch.empty(one.shape).normal_(std=0.02)) for name, one in missing.items()}
    model.load_state_dict(values, strict=False, assign=True)
    model.requires_grad_(False)


def bytes_of_linears(checkpoint: Path, names: set[str]) -> int:
    """Bytes that model.safetensors holds of the weights of these linears, by its header."""
    total = 0
    with safe_open(checkpoint / WEIGHTS, framework="pt") as content:
        for name in content.keys():  # noqa: SIM118
            linear, _, part = name.rpartition(".")[0].rpartition(".")
            if linear in names and part in ("sparse", "low_rank"):
                total += content.get_tensor(name).nbytes
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--bits", type=float, nargs="+", default=[3.5], help="a weight of the compressed linears")
    parser.add_argument("--folder", type=Path, help="for the files, which are removed [default: the system's]")
    args = parser.parse_args()
    table = Table(title="bytes of the compressed linears; of the files; of the process that loads them. MB")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, bits in product(args.models, args.bits):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            out = Path(folder) / "model"
            written = write_random(SOURCES[name], bits, out)
            on_disk = bytes_of_linears(out, written.names)
            files = sum(file.stat().st_size for file in out.iterdir())
            loaded = load_alone(out)
        table.add_row(
            name,
            f"{8 * on_disk / written.weights:.3f}",
            *(f"{size / 1e6:.2f}" for size in (written.counted, on_disk)),
            f"{on_disk / written.counted:.4f}",
            *(f"{size / 1e6:.1f}" for size in (files, loaded.dense, loaded.peak, loaded.peak - loaded.dense)),
            f"{loaded.times_packed:.2f}",
        )
        print(f"{name}, {bits:g} bits: {', '.join(f'{count} in {one}' for one, count in written.formats.items())}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
