"""One self-contained page about a checkpoint: `oats-vision inspect DIR --html report.html`."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from torch import Tensor

from oats_vision import checkpoint
from oats_vision.errors import CheckpointError
from oats_vision.evaluations import read_evaluations
from oats_vision.files import replacing
from oats_vision.layers import LayerSpec, SparseLowRankLinear
from oats_vision.pipeline import CompressionReport

POINTS = 80  # of a spectrum that are drawn
STYLE: Any = {
    "svg.fonttype": "none",  # text as text
    "svg.hashsalt": "oats_vision",
    "text.parse_math": False,  # a layer's name may have a $
    "text.usetex": False,
}
HEADINGS = ["layer", "part", "shape", "rank", "non-zeros", "kept", "error", "output error", "rounds"]


def write_html(directory: Path, file: Path, progress: Callable[[int], None] = lambda layers: None) -> None:
    """Write the page, all of it or nothing.

    Args:
        directory: a checkpoint.
        file: to write; replaced if it exists.
        progress: called with the number of layers whose spectrum is done.

    Raises:
        CheckpointError: the checkpoint is damaged, or the file cannot be written.
    """
    page = html_report(directory, progress)
    try:
        with replacing(file) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be written: {problem}") from None


def html_report(directory: Path, progress: Callable[[int], None] = lambda layers: None) -> str:
    """The page as text: summary, accuracy, errors, budget, spectra, and a table of layers that sorts."""
    evaluations = read_evaluations(directory)
    config = checkpoint.read_config(directory)
    tensors = checkpoint.read_weights(directory, config)
    report = CompressionReport.from_dict(config)
    sizes = checkpoint.measure(tensors.values(), report, getattr(torch, config["storage_dtype"]))
    settings = report.settings
    name = config["source"]["name"]
    cards = [
        (f"{report.parameters / report.dense_parameters:.1%}", "of the blocks' parameters kept"),
        (f"{sizes.layer_ratio:.3f}", f"bytes of the blocks, to dense {config['storage_dtype']}"),
        (f"{sizes.total / 1e6:.1f} MB", f"whole model; dense {sizes.dense_total / 1e6:.1f} MB"),
        (f"{report.samples:,}", f"calibration {report.unit}"),
        (f"{report.seconds.get('total', 0):.0f} s", "to compress"),
    ]
    if report.layers:
        errors = [layer.error for layer in report.layers]
        cards.append((f"{sum(errors) / len(errors):.4f}", f"mean {report.error_name}"))
    spectra = []
    for i, layer in enumerate(report.layers):
        spectra.append(spectrum(layer.name, layer.spec, tensors))
        progress(i + 1)
    environment = Environment(loader=PackageLoader("oats_vision"), autoescape=select_autoescape())
    return environment.get_template("report.html").render(
        title=f"{name}, {settings.method} at rate {settings.rate:.3g}",
        subtitle=f"{directory.name}: {config['source']['kind']} {name}, adapter {config['adapter']}, "
        f"{settings.summary}, written by {config['written_by']}",
        cards=cards,
        accuracy=[row for evaluation in evaluations for row in evaluation.rows()],
        protocol=f"top1 {directory.name} --data LABELLED_PICTURES"
        if report.unit == "pictures"
        else f"perplexity {directory.name} --data TEXT",
        plots=_plots(report, sizes),
        layers=report.layers,
        headings=HEADINGS,
        rows=_rows(report),
        spectra=spectra,
        settings=[(key, str(value)) for key, value in settings.model_dump().items() if value is not None],
    )


def spectrum(name: str, spec: LayerSpec, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Singular values of a stored layer and of its two terms, at up to `POINTS` ranks.

    Returns:
        `rank`, from 1, and `values` of `whole`, `sparse` and `low_rank` at these.
    """
    layer = SparseLowRankLinear.empty(spec, torch.float32)
    prefix = f"{name}."
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    layer.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, assign=True)
    whole, sparse = layer.dense_weight(), layer.sparse.dense()
    count = min(whole.shape)
    ranks = sorted({round(1 + i * (count - 1) / (POINTS - 1)) for i in range(POINTS)})
    values = {}
    for term, matrix in {"whole": whole, "sparse": sparse, "low_rank": whole - sparse}.items():
        small = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
        singular = torch.linalg.eigvalsh(small @ small.T).flip(0).clamp_min(0).sqrt()
        floor = 1e-6 * float(singular[0])  # what lies below is rounding
        chosen = singular[[rank - 1 for rank in ranks]].tolist()
        values[term] = [float(f"{value:.4g}") if value > floor else 0.0 for value in chosen]
    return {"rank": ranks, "values": values}


def _rows(report: CompressionReport) -> list[list[tuple[str, str]]]:
    """The table of layers: what is shown and what is sorted by, for each cell."""
    rows: list[list[tuple[str, str]]] = []
    for layer in report.layers:
        for part in layer.spec.parts:
            size = part.out_features * layer.spec.in_features
            kept = (part.nonzeros + part.rank * (part.out_features + layer.spec.in_features)) / size
            rows.append(
                [
                    (layer.name, str(len(rows))),  # the model's order
                    (part.name, part.name),
                    (f"{part.out_features} x {layer.spec.in_features}", str(size)),
                    (str(part.rank), str(part.rank)),
                    (f"{part.nonzeros:,}", str(part.nonzeros)),
                    (f"{kept:.1%}", f"{kept:.6f}"),
                    _number(layer.errors.get(part.name)),
                    _number(layer.output_errors.get(part.name)),
                    (str(layer.rounds.get(part.name, "")), str(layer.rounds.get(part.name, -1))),
                ]
            )
    return rows


def _number(value: float | None) -> tuple[str, str]:
    """What is shown and what is sorted by; a value that is not known comes first."""
    return ("", "-1") if value is None else (f"{value:.4f}", f"{value:.8f}")


def _plots(report: CompressionReport, sizes: checkpoint.Sizes) -> list[Markup]:
    """Error of each linear by block, and where the bytes go; of a sliced model the signal kept by block."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return [_svg(figure) for figure in _figures(report, sizes)]


def _figures(report: CompressionReport, sizes: checkpoint.Sizes) -> list[Any]:
    if report.slicing:
        attention, mlp = report.slicing.kept[::2], report.slicing.kept[1::2]
        lines = {"attention": list(attention), "MLP": list(mlp)}
        width = f"{report.slicing.sliced_width} of {report.slicing.width} dimensions"
        return [_line_plot(lines, "share of the second moment kept", f"{width}, by block")]
    by_kind: dict[str, list[float]] = {}
    for layer in report.layers:
        path = layer.name.split(".")
        block = max(i for i, part in enumerate(path) if part.isdigit()) if any(map(str.isdigit, path)) else -1
        by_kind.setdefault(".".join(path[block + 1 :]), []).append(layer.error)
    storage = sizes.dense_layers / max(report.dense_parameters, 1)
    low_rank = sum(layer.spec.parameters - layer.spec.nonzeros for layer in report.layers)
    budget = {
        "S, values": report.layers and sum(layer.spec.nonzeros for layer in report.layers) * storage,
        "S, positions": sizes.positions,
        "U and V": low_rank * storage,
        "saved": sizes.dense_layers - sizes.layers,
    }
    return [_line_plot(by_kind, report.error_name, "Error of each linear, by block"), _budget_plot(budget)]


def _line_plot(lines: dict[str, list[float]], label: str, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    drawn = [
        axes.plot(range(len(values)), values, marker="o", markersize=3, linewidth=1.2)[0] for values in lines.values()
    ]
    axes.set(xlabel="block", ylabel=label, title=title)
    axes.locator_params(axis="x", integer=True)
    axes.set_ylim(bottom=0 if "error" in label else None)
    axes.legend(drawn, list(lines), fontsize=8)  # by itself it leaves out names that start with _
    axes.grid(alpha=0.3)
    return figure


def _budget_plot(budget: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.4), layout="constrained")
    axes = figure.subplots()
    left, whole = 0.0, sum(budget.values())
    for (name, size), colour in zip(budget.items(), ("#2f6fde", "#9dbcf2", "#d9480f", "#e6e9ef"), strict=True):
        axes.barh([0], [size / 1e6], left=left, color=colour, label=f"{name}: {size / whole:.1%}")
        left += size / 1e6
    axes.set(xlabel="MB", title="Bytes of the compressed layers, of those they had", yticks=[])
    figure.legend(fontsize=9, ncols=2, loc="outside lower center", frameon=False)
    return figure


def _svg(figure: Any) -> Markup:
    """Inline SVG, without the XML header."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return Markup(text[text.index("<svg") :])
