"""How long compressing takes by quality, beside `--quality fast`, in one run.

    python eval/benchmarks/compress_time.py                      # two blocks of DINOv2-L's shape, 128 pictures

Weights and pictures are random: times hardly depend on their values. All blocks of a model take about the same.
"""

import argparse
import statistics
import time

import timm
import torch
from rich.console import Console
from rich.table import Table

import oats_vision as ov
from oats_vision.compression.settings import Quality
from oats_vision.machine import machine, machine_line

QUALITIES: tuple[Quality, ...] = ("fast", "best")


def compressed(args: argparse.Namespace, quality: Quality) -> dict[str, float]:
    """Seconds of one compression by stage."""
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=False, depth=args.blocks, img_size=args.image_size).eval()
    pictures = [
        torch.randn(args.batch_size, 3, args.image_size, args.image_size)
        for _ in range(args.samples // args.batch_size)
    ]
    start = time.perf_counter()
    stages = ov.compress(model, pictures, rate=0.5, quality=quality).report.seconds
    return stages | {"total": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch14_dinov2", help="of timm, without weights")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    console = Console(width=120)
    found = {quality: [] for quality in QUALITIES}
    with console.status("compressing") as status:
        for repeat in range(args.repeats):
            for quality in QUALITIES:
                status.update(f"quality {quality}, {repeat + 1} of {args.repeats}")
                found[quality].append(compressed(args, quality))
    on = machine_line(machine(torch.device("cpu")))
    title = f"{args.model}, {args.blocks} blocks, {args.samples} pictures, float32; {on}"
    table = Table(title=f"{title}; seconds, medians of {args.repeats}")
    stages = list(found["best"][0])
    for heading in ("quality", *stages, "to fast"):
        table.add_column(heading, justify="left" if heading == "quality" else "right")
    whole = {quality: statistics.median(one["total"] for one in of_all) for quality, of_all in found.items()}
    for quality, of_all in found.items():
        medians = [statistics.median(one.get(stage, 0.0) for one in of_all) for stage in stages]
        table.add_row(quality, *(f"{seconds:.2f}" for seconds in medians), f"{whole[quality] / whole['fast']:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
