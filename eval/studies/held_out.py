"""Does the cost that every run prints flatter? Agreement on its few held-out pictures against that on many others.

    python eval/studies/held_out.py                                    # the demo, 20 draws of calibration pictures

Each draw is one compression as `oats-vision compress` does it. The true agreement (on 2,000 pictures of the test set)
should lie in the interval of the held-out one in 19 of 20 draws, and as often above its value as below.
"""

import argparse

from rich.console import Console
from rich.table import Table

import oats_vision as ov
from oats_vision.evaluation.tasks import task_of


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="demo")
    flags.add_argument("--data", default="demo")
    flags.add_argument("--eval-data", default="demo", help="pictures that no run has seen")
    flags.add_argument("--others", type=int, default=2000, help="of these")
    flags.add_argument("--rate", type=float, default=0.7)
    flags.add_argument("--samples", type=int, default=256)
    flags.add_argument("--held-out", type=int, default=128)
    flags.add_argument("--draws", type=int, default=20)
    args = flags.parse_args()
    table = Table(title=f"{args.model}, rate {args.rate:g}, {args.held_out} held-out and {args.others} other pictures")
    for heading in ("draw", "figure", "held out", "others", "inside"):
        table.add_column(heading, justify="right")
    inside: dict[str, list[bool]] = {}
    above: dict[str, list[bool]] = {}
    for seed in range(args.draws):
        model, transform = ov.load_model(args.model)
        loading = {"batch_size": 64, "seed": seed}
        pictures = ov.load_pictures(args.data, transform, samples=args.samples, held_out=args.held_out, **loading)
        others = ov.load_pictures(args.eval_data, transform, samples=args.others, split="test", **loading)
        reference = task_of(model).reference(model, others)
        result = ov.compress(model, pictures, rate=args.rate)
        truth, _ = reference.compare(model)
        assert result.cost is not None
        for ours, true in zip(result.cost.metrics, truth.metrics, strict=True):
            inside.setdefault(ours.name, []).append(ours.low <= true.value <= ours.high)
            above.setdefault(ours.name, []).append(true.value > ours.value)
            table.add_row(str(seed), ours.name, str(ours), true.figure, "yes" if inside[ours.name][-1] else "no")
    console = Console()
    console.print(table)
    for name, hits in inside.items():
        more = sum(above[name])
        console.print(f"{name}: inside in {sum(hits)} of {len(hits)} draws; the others' is higher in {more}")


if __name__ == "__main__":
    main()
