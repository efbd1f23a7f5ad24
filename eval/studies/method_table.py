r"""Top-1 of all methods at several rates: the form of the OATS paper's table of vision transformers.

    python eval/studies/method_table.py                                           # the demo
    python eval/studies/method_table.py --config configs/paper/vit_base.yaml \
        --data imagenet/train --eval-data imagenet/val

Each method runs in its own paper's pattern (`oats-vision compress --help` names them). Writes method_table.csv,
.png and .md; run it again to go on where it stopped.
"""

from benches import Pictures
from oats_vision.compression import methods
from study import collect, method_cells, method_line, parse_methods, picture_parser, run, show

RATES = [0.3, 0.4, 0.5, 0.6, 0.7]


def main() -> None:
    flags = picture_parser(__doc__, "results/method_table")
    of_a_rate = [method.name for method in methods.known() if method.density is None]
    args = parse_methods(flags, ["oats-plain", "oats-fast", *of_a_rate], RATES)
    rows = run(Pictures(args), args, "method_table", method_cells(args))
    show(rows, collect(rows, method_line, "rate"), f"{rows[0]['model']}, methods", "rate", args.out / "method_table")


if __name__ == "__main__":
    main()
