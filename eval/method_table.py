"""Top-1 of all methods at several rates: the form of the OATS paper's table of vision transformers.

    python eval/method_table.py                                           # the demo
    python eval/method_table.py --config configs/paper/vit_base.yaml --data imagenet/train --eval-data imagenet/val

Each method runs in its own paper's pattern (`oats-vision compress --help` names them). Writes method_table.csv,
.png and .md; run it again to go on where it stopped.
"""

from study import collect, parser, run, show

METHODS = ["magnitude", "svd", "slicegpt", "wanda", "dsnot", "sparsegpt", "oats", "oats+refit"]


def main() -> None:
    flags = parser(__doc__, "results/method_table")
    flags.add_argument("--methods", nargs="+", default=METHODS)
    flags.add_argument("--rates", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7])
    flags.add_argument("--rank-ratio", type=float, nargs="+", default=[0.2], help="of OATS")
    args = flags.parse_args()
    cells = [
        {"method": method.removesuffix("+refit"), "refit": "+" in method, "rate": rate, "rank_ratio": ratio}
        for rate in args.rates
        for method in args.methods
        for ratio in (args.rank_ratio if "oats" in method else [None])
    ]
    rows = run(args, "method_table", cells)

    def line(row: dict[str, str]) -> str:
        name = row["method"] + " + refit" * (row["refit"] == "True")
        return f"{name}, rank ratio {row['rank_ratio']}" if row["method"] == "oats" else name

    show(rows, collect(rows, line, "rate"), f"{rows[0]['model']}, methods", "rate", args.out / "method_table")


if __name__ == "__main__":
    main()
