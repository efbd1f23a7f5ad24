"""How close compressed classifiers stay to the dense one, picture by picture, under several methods and rates.

    python eval/studies/closeness_table.py --rates 0.5 0.6 --methods wanda sparsegpt oats           # the demo

Top-1 counts only the pictures whose answer turns from right to wrong or back, a few dozen in thousands. This measures
all of them: the Kullback-Leibler divergence of the compressed model's probabilities from the dense model's (in
nats, mean over pictures), and the share of pictures that both put into the same class. Writes closeness_table.csv,
and a plot and a table of each measure; run it again to go on where it stopped.
"""

from benches import Closeness
from study import collect, method_cells, method_line, parse_methods, picture_parser, run, show_values

METHODS = ["wanda", "sparsegpt", "oats-plain", "oats"]
RATES = [0.3, 0.4, 0.5, 0.6, 0.7]
MEASURES = {"divergence": "divergence from dense (nats)", "agreement": "same class as dense (%)"}


def main() -> None:
    flags = picture_parser(__doc__, "results/closeness_table")
    args = parse_methods(flags, METHODS, RATES)
    rows = run(Closeness(args), args, "closeness_table", method_cells(args))
    for measure, name in MEASURES.items():
        values = collect(rows, method_line, "rate", measure)
        log_y = measure == "divergence"
        show_values(values, f"{rows[0]['model']}, methods", "rate", name, args.out / measure, log_y=log_y)


if __name__ == "__main__":
    main()
