"""What each part of OATS is worth: the scaling, where thresholds apply, how a fused qkv is
decomposed, and the least-squares refit (off in all lines but its own).

    python eval/studies/ablations.py
    python eval/studies/ablations.py --config configs/paper/vit_base.yaml --data imagenet/train --eval-data imagenet/val

Writes ablations.csv, .png and .md; run it again to go on where it stopped.
"""

from benches import Pictures
from study import collect, picture_parser, run, show

VARIANTS = {
    "OATS (second moment, row, split qkv)": {},
    "scaling: none": {"scaling": "none"},
    "scaling: median": {"scaling": "median"},
    "thresholds: layer": {"pattern": "layer"},
    "thresholds: layer, scaling: none": {"pattern": "layer", "scaling": "none"},
    "qkv: joint": {"fused_qkv": "joint"},
    "refit": {"quality": "fast"},
}


def main() -> None:
    flags = picture_parser(__doc__, "results/ablations")
    flags.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    args = flags.parse_args()
    defaults = {"scaling": "second_moment", "pattern": "row", "fused_qkv": "split", "quality": "plain"}
    names = {tuple((defaults | changes).values()): name for name, changes in VARIANTS.items()}
    cells = [{"rate": rate, **defaults, **changes} for rate in args.rates for changes in VARIANTS.values()]
    rows = run(Pictures(args), args, "ablations", cells)

    def line(row: dict[str, str]) -> str:
        quality = "fast" if row["refit"] == "True" else "plain"
        return names[row["scaling"], row["pattern"], row["fused_qkv"], quality]

    values = collect(rows, line, "rate")
    show(rows, values, f"{rows[0]['model']}, ablations", "rate", args.out / "ablations")


if __name__ == "__main__":
    main()
