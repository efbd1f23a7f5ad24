"""Top-1 against the share of the budget that goes to the low-rank term, at several rates.

    python eval/rank_ratio_sweep.py
    python eval/rank_ratio_sweep.py --config configs/paper/vit_base.yaml --data imagenet/train --eval-data imagenet/val

Writes rank_ratio_sweep.csv, .png and .md; run it again to go on where it stopped.
"""

from benches import Pictures
from study import collect, picture_parser, run, show


def main() -> None:
    flags = picture_parser(__doc__, "results/rank_ratio_sweep")
    flags.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    flags.add_argument("--rank-ratios", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0])
    args = flags.parse_args()
    cells = [{"rate": rate, "rank_ratio": ratio} for rate in args.rates for ratio in args.rank_ratios]
    rows = run(Pictures(args), args, "rank_ratio_sweep", cells)
    values = collect(rows, lambda row: f"rate {row['rate']}", "rank_ratio")
    show(rows, values, f"{rows[0]['model']}, OATS", "rank_ratio", args.out / "rank_ratio_sweep")


if __name__ == "__main__":
    main()
