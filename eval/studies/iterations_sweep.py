r"""Top-1 and relative error against the iterations of alternating thresholding, for both solvers.

    python eval/studies/iterations_sweep.py
    python eval/studies/iterations_sweep.py --config configs/paper/vit_base.yaml \
        --data imagenet/train --eval-data imagenet/val

The early stop is off, so that each run does the iterations it was asked for. Writes iterations_sweep.csv, .png and
.md, and the errors as iterations_sweep_error.png and .md; run it again to go on where it stopped.
"""

from benches import Pictures
from study import collect, picture_parser, run, show, show_values


def main() -> None:
    flags = picture_parser(__doc__, "results/iterations_sweep")
    flags.add_argument("--rate", type=float, default=0.6)
    flags.add_argument("--iterations", type=int, nargs="+", default=[1, 2, 5, 10, 20, 40, 80])
    flags.add_argument("--solvers", nargs="+", default=["fast", "exact"])
    args = flags.parse_args()
    cells = [
        {"rate": args.rate, "iterations": count, "solver": solver, "tolerance": 0.0, "quality": "plain"}
        for solver in args.solvers
        for count in args.iterations
    ]
    rows = run(Pictures(args), args, "iterations_sweep", cells)
    title = f"{rows[0]['model']}, OATS at rate {args.rate}"
    out = args.out / "iterations_sweep"
    show(rows, collect(rows, lambda row: row["solver"], "iterations"), title, "iterations", out, log_x=True)
    errors = collect(rows, lambda row: row["solver"], "iterations", "layer_error")
    show_values(errors, title, "iterations", "mean relative error", out.with_name(f"{out.name}_error"), log_x=True)


if __name__ == "__main__":
    main()
