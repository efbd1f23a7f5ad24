"""Draw the README's figure: what OATS makes of a weight, and what it costs beside other methods.

    python eval/studies/readme_figure.py                     # writes docs/figures/overview-{light,dark}.svg

The matrices are a corner of one weight of the demo model, before and after; the bars are the figures of
docs/results/accuracy_dinov2_small.csv.
"""

import argparse
import csv
import statistics
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

import oats_vision as ov

ROOT = Path(__file__).parents[2]
LAYER = "blocks.1.mlp.fc1"
CORNER = 44  # outputs and inputs that are shown
METHODS = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "oats": "oats_vision"}
COLOURS = {
    "light": {"text": "#1f2328", "paper": "#ffffff", "bars": ["#c9ced6", "#8b95a5", "#0b7a75"]},
    "dark": {"text": "#e6edf3", "paper": "#0d1117", "bars": ["#3d444d", "#6e7b8b", "#2fb8ae"]},
}
Matrices = dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures", help="folder [default: docs/figures]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    matrices = decomposed()
    matplotlib.rcParams.update({"svg.hashsalt": "overview", "font.size": 10})
    for theme in COLOURS:
        file = args.out / f"overview-{theme}.svg"
        draw(matrices, errors(), theme).savefig(file, metadata={"Date": None}, transparent=True, bbox_inches="tight")
        print(file)


def decomposed() -> Matrices:
    """A corner of one weight of the demo, and of its terms at rate 0.5."""
    model, transform = ov.load_model("demo")
    W = model.get_submodule(LAYER).weight.detach().numpy()[:CORNER, :CORNER].copy()
    ov.compress(model, ov.load_pictures("demo", transform, batch_size=64, samples=256), rate=0.5)
    layer = model.get_submodule(LAYER)
    S = layer.sparse.dense().float().numpy()[:CORNER, :CORNER]
    U, V = layer.low_rank.U.float().numpy(), layer.low_rank.V.float().numpy()
    return {"W": W, "S": S, "U": U[:CORNER], "V": V[:, :CORNER]}


def errors() -> dict[str, list[float]]:
    """The relative error of DINOv2-S's features at rates 0.3 and 0.5, by method."""
    with (ROOT / "docs" / "results" / "accuracy_dinov2_small.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return {method: [mean_error(rows, method, rate) for rate in ("0.3", "0.5")] for method in METHODS}


def mean_error(rows: list[dict[str, str]], method: str, rate: str) -> float:
    """Over the draws, of a method as it runs by default."""
    targets, budget = ("True", "measured") if method == "oats" else ("False", "uniform")
    wanted = {"method": method, "rate": rate, "targets": targets, "budget": budget}
    return statistics.mean(float(row["error"]) for row in rows if wanted.items() <= row.items())


def draw(matrices: Matrices, costs: dict[str, list[float]], theme: str) -> plt.Figure:
    """Both halves of the figure."""
    colours = COLOURS[theme]
    figure = plt.figure(figsize=(9.2, 3.0))
    show_matrices(figure, matrices, colours)
    show_costs(figure.add_axes((0.645, 0.17, 0.345, 0.62)), costs, colours)
    return figure


def show_matrices(figure: plt.Figure, matrices: Matrices, colours: dict) -> None:
    """W, S, U and V side by side, zeros as paper."""
    places = {
        "W": (0.01, 0.19, 0.18, 0.56),
        "S": (0.235, 0.19, 0.18, 0.56),
        "U": (0.46, 0.19, 0.035, 0.56),
        "V": (0.502, 0.64, 0.115, 0.11),
    }
    captions = {"W": "weight", "S": "sparse", "U": "low-rank"}
    colour_map = matplotlib.colormaps["RdBu_r"].with_extremes(bad=(0, 0, 0, 0))
    for name, place in places.items():
        matrix = matrices[name]
        axes = figure.add_axes(place)
        shown = np.ma.masked_equal(matrix, 0)
        most = np.quantile(np.abs(matrix[matrix != 0]), 0.98)
        axes.imshow(shown, cmap=colour_map, vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=colours["text"], linewidth=0.8)
        axes.set_title(name, color=colours["text"], style="italic", fontsize=13)
        if name in captions:
            axes.set_xlabel(captions[name], color=colours["text"])
    for x, sign in ((0.2125, "≈"), (0.4375, "+")):
        figure.text(x, 0.47, sign, color=colours["text"], fontsize=17, ha="center", va="center")
    figure.text(0.01, 0.93, "Every linear becomes sparse plus low-rank", color=colours["text"], weight="bold")


def show_costs(axes: plt.Axes, costs: dict[str, list[float]], colours: dict) -> None:
    """Bars of error for each method, in groups by rate."""
    for i, (method, colour) in enumerate(zip(METHODS, colours["bars"], strict=True)):
        bars = axes.bar([x + (i - 1) * 0.27 for x in (0, 1)], costs[method], 0.25, color=colour, label=METHODS[method])
        axes.bar_label(bars, fmt="%.3f", color=colours["text"], fontsize=9, padding=1)
    axes.set_xticks([0, 1], ["30% removed", "50% removed"], color=colours["text"])
    axes.set(yticks=[], ylim=(0, 0.62))
    axes.tick_params(length=0)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(colours["text"])
    axes.legend(frameon=False, labelcolor=colours["text"], fontsize=9, loc="upper left", handlelength=1)
    figure = axes.get_figure()
    figure.text(0.645, 0.93, "Error of DINOv2-S's features", color=colours["text"], weight="bold")


if __name__ == "__main__":
    main()
