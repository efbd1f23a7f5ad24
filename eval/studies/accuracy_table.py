r"""How much every method, and every part of ours, loses against the dense model, at several rates: the main table.

    python eval/studies/accuracy_table.py closeness            # of the demo
    python eval/studies/accuracy_table.py features --model dinov2_small --decoder dinov2_small/decoder.onnx \
        --data imagenet --samples 512
    python eval/studies/accuracy_table.py texts --model model.gguf --data calibration.txt \
        --eval-data held_out.txt other.txt --samples 128 --sequence-length 512

eval/models/dinov2_small.py makes that backbone and its decoder. Writes accuracy_table.csv (a row for each compression,
as soon as it is measured), and a table and a plot of each measure and of the seconds; run it again to go on where it
stopped.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import Any

from benches import Closeness, Row, Texts
from features import Features
from study import SETTINGS, collect, described, parser, picture_parser, run, settings_of, show_values, suffix_of

# name -> settings, in the order of the table; each is given every rate
LINES: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda"},
    "wanda+targets": {"method": "wanda", "targets": True},
    "sparsegpt": {"method": "sparsegpt", "pattern": "row"},
    "sparsegpt+targets": {"method": "sparsegpt", "pattern": "row", "targets": True},
    "plain": {"quality": "plain"},
    "fast": {"quality": "fast"},
    "joint": {"quality": "fast", "joint": True},
    "joint+targets": {"sensitivity": False},
    "joint+targets+sensitivity": {"budget": "uniform"},
    "best": {},
}
RATES = [0.3, 0.4, 0.5, 0.6, 0.7]
SECONDS = {"solver_seconds": "seconds of the solver", "seconds": "seconds of the whole compression"}
MEASURES = {
    "features": {
        "error": "relative error of the last hidden state",
        "cosine": "cosine of patch tokens",
        "iou": "overlap of maps (IoU)",
    },
    "closeness": {"divergence": "divergence from dense (nats)", "agreement": "same class as dense (%)"},
    "texts": {"loss": "loss of log-perplexity"},
}
GROWING = ("error", "divergence", "loss", *SECONDS)  # drawn on a logarithmic scale
BENCHES = {"features": Features, "closeness": Closeness, "texts": Texts}


def main() -> None:
    args = parse(__doc__, "results/accuracy_table", list(LINES))
    bench = BENCHES[args.bench](args)
    lines = {name: LINES[name] for name in args.lines}
    cells = [settings | {"rate": rate} for rate in args.rates for settings in lines.values()]
    names = {
        without_rate(described(settings_of(bench, settings | {"rate": 0.5}))): name for name, settings in lines.items()
    }
    rows = run(bench, args, "accuracy_table", cells)
    for target in bench.targets:
        chosen = [with_loss(row) for row in rows if row["eval_data"] == target]
        title = f"{Path(chosen[0]['model']).name}{f' on {Path(target).name}' * (len(bench.targets) > 1)}"
        suffix = suffix_of(target, bench.targets) * (len(bench.targets) > 1)
        for measure, words in (MEASURES[args.bench] | SECONDS).items():
            measured = [row for row in chosen if row[measure]]
            values = collect(measured, lambda row: names[without_rate(row)], "rate", measure)
            if values:
                out = args.out / f"{measure}{suffix}"
                show_values(values, title, "rate", words, out, log_y=measure in GROWING)


def parse(description: str | None, out: str, lines: list[str], by_rate: bool = True) -> argparse.Namespace:
    """The flags of a table on features, probabilities or texts.

    Args:
        lines: that it may have. by_rate: whether its columns are rates.
    """
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made = flags.add_subparsers(dest="bench", required=True, metavar="features | closeness | texts")

    def add(name: str) -> Any:
        return partial(made.add_parser, name)

    features = parser("A backbone's features, and a decoder's maps of them", out, add("features"))
    features.add_argument("--pictures", type=int, default=1000, help="of --data that are used at all [default: 1000]")
    features.add_argument("--decoder", type=Path, help="ONNX file: last hidden state, pictures -> maps in 0..1")
    closeness = picture_parser("A classifier's probabilities", out, add("closeness"))
    texts = parser("A language model's perplexity", out, add("texts"))
    texts.add_argument("--eval-data", nargs="+", required=True, help="held-out texts, as --data")
    texts.add_argument("--sequence-length", type=int, help="tokens in a sequence, and in a window [default: 2048]")
    for one in (features, closeness, texts):
        one.add_argument(
            "--lines",
            nargs="+",
            choices=lines,
            default=lines,
            metavar="LINE",
            help=f"[default: {' '.join(lines)}]",
        )
        if by_rate:
            one.add_argument("--rates", type=float, nargs="+", default=RATES)
    return flags.parse_args()


def without_rate(settings: dict[str, Any]) -> tuple[str, ...]:
    """What tells lines apart."""
    return tuple(str(settings[field]) for field in SETTINGS if field != "rate")


def with_loss(row: Row) -> Row:
    """A row about text also says what its perplexity has lost, in nats a token."""
    if "perplexity" not in row:
        return row
    return row | {"loss": f"{math.log(float(row['perplexity']) / float(row['dense_perplexity'])):.5f}"}


if __name__ == "__main__":
    main()
