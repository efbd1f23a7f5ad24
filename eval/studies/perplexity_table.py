r"""Perplexity of a language model under several methods and rates, on one or more held-out texts.

    python eval/studies/perplexity_table.py --model model.gguf --data calibration.txt \
        --eval-data held_out.txt other.txt --samples 128 --sequence-length 512 --seeds 0

Writes perplexity_table.csv, and for each text a plot and a table; run it again to go on where it stopped.
"""

from pathlib import Path

from benches import Texts
from study import collect, method_cells, method_line, parse_methods, parser, run, show_values, suffix_of

METHODS = ["magnitude", "wanda", "sparsegpt", "oats-plain", "oats-fast", "oats"]
RATES = [0.3, 0.4, 0.5, 0.6]


def main() -> None:
    flags = parser(__doc__, "results/perplexity_table")
    flags.add_argument("--eval-data", nargs="+", required=True, help="held-out texts, as --data")
    flags.add_argument("--sequence-length", type=int, help="tokens in a sequence, and in a window [default: 2048]")
    args = parse_methods(flags, METHODS, RATES)
    rows = run(Texts(args), args, "perplexity_table", method_cells(args))
    for text in args.eval_data:
        chosen = [row for row in rows if row["eval_data"] == text]
        dense = float(chosen[0]["dense_perplexity"])
        title = f"{Path(chosen[0]['model']).name} on {Path(text).name}"
        out = args.out / f"perplexity{suffix_of(text, args.eval_data)}"
        values = collect(chosen, method_line, "rate", "perplexity")
        show_values(values, title, "rate", f"perplexity, dense {dense:.2f}", out, level=dense, log_y=True)


if __name__ == "__main__":
    main()
