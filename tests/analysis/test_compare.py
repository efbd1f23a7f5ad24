"""Several checkpoints side by side: one table, one page, and what is said of runs that do not compare."""

import io
import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from selenium.webdriver.common.by import By
from typer.testing import CliRunner

import command
import oats_vision as ov
from oats_vision.analysis import figures
from oats_vision.analysis.compare import (
    alike,
    columns,
    comparison_page,
    comparison_table,
    doubts,
    scatters,
)
from oats_vision.analysis.compared import ComparedModel, errors_by_block, read_compared
from oats_vision.analysis.page import write_page
from oats_vision.checkpoint import measure, read_config, read_weights
from oats_vision.cli.commands import app
from oats_vision.compression.record import CompressionReport, LayerReport
from oats_vision.compression.settings import resolve
from oats_vision.errors import CheckpointError, ConfigError
from oats_vision.evaluation.results import Cost, Difference, Evaluation, Metric, Score
from oats_vision.evaluation.speed import Timing
from oats_vision.nn.sparse_low_rank import LayerSpec, PartSpec
from pages import DESKTOP, PHONE, check_accessible, check_dark, check_quiet, check_width, show


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> list[Path]:
    """Three checkpoints of one model, two of which have the same name."""
    root = tmp_path_factory.mktemp("runs")
    generator = torch.Generator().manual_seed(1)
    pictures = list(torch.randn(8, 3, 32, 32, generator=generator).split(4))
    made = []
    for place, rate in (("a/out", 0.3), ("b/out", 0.5), ("c", 0.7)):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
        ov.compress(model, pictures, rate=rate, iterations=2, storage_dtype="float16")
        (root / place).parent.mkdir(exist_ok=True)
        ov.save(model, root / place)
        made.append(root / place)
    return made


def _cost(same: float, error: float, samples: int = 64) -> Cost:
    metrics = [
        Metric(name="same class", kind="percent", value=same, low=same - 3, high=same + 1),
        Metric(name="relative error of features", kind="number", value=error, low=error / 2, high=error * 2),
    ]
    return Cost(unit="pictures", samples=samples, metrics=metrics)


def _labelled(top1: float, data: str = "val", **more) -> Evaluation:
    change = Difference(top1 - 80, top1 - 81, top1 - 79, 0.1)
    values = {"dense": Score(top1=80), "compressed": Score(top1=top1), "difference": {"top-1": change}}
    return Evaluation(protocol="top1", data=data, **values, **more)


def _run(number: int, **more) -> ComparedModel:
    """The higher the number, the smaller, faster and worse."""
    values = {
        "name": f"run{number}",
        "model": "vit",
        "settings": resolve(rate=0.1 * number),
        "bytes": 10_000_000 - 1_000_000 * number,
        "dense_bytes": 10_000_000,
        "speed": [Timing("forward, batch 1", 1, "pictures", 0.01, 0.01 / (1 + 0.1 * number))],
        "cost": _cost(99 - number, 0.01 * number),
        "errors": {0: 0.01 * number, 1: 0.02 * number},
        "machine": "cpu, 2",
        "dtype": "float32",
        "held_out": "data val, seed 42",
    }
    return ComparedModel(**values | more)


def _best(rows: list[ComparedModel]) -> dict[str, list[int]]:
    """Which rows are marked, of each column that marks any."""
    marks = {column.heading: [i for i, cell in enumerate(column.cells) if cell.best] for column in columns(rows)}
    return {heading: rows for heading, rows in marks.items() if rows}


def test_a_run_read_from_a_checkpoint_is_what_the_checkpoint_is(directories):
    runs = read_compared(directories)
    assert [run.name for run in runs] == ["a/out", "b/out", f"{directories[2].parent.name}/c"]
    for run, directory, rate in zip(runs, directories, (0.3, 0.5, 0.7), strict=True):
        config = read_config(directory)
        report = config.report
        sizes = measure(read_weights(directory, config).values(), report, torch.float16)
        assert (run.bytes, run.dense_bytes) == (sizes.total, sizes.dense_total)
        assert run.settings.rate == rate
        first = [layer.error for layer in report.layers if layer.name.startswith("blocks.0.")]
        assert run.errors[0] == pytest.approx(sum(first) / len(first))
        assert sorted(run.errors) == [0, 1]
    assert doubts(runs) == []


def test_the_best_of_each_column_is_marked():
    rows = [_run(1), _run(2), _run(3)]
    assert _best(rows) == {"MB": [2], "batch 1": [2], "same class": [0], "relative error of features": [0]}
    assert _best([replace(run, labelled=_labelled(80 - i)) for i, run in enumerate(rows)])["top-1"] == [0]
    assert _best([_run(1), _run(1, name="again")]) == {}
    unmeasured = replace(_run(3), speed=(), cost=None)
    assert _best([*rows[:2], unmeasured]) == {
        "MB": [2],
        "batch 1": [1],
        "same class": [0],
        "relative error of features": [0],
    }


def test_settings_that_differ_are_columns_and_others_are_said_once():
    rows = [_run(1), _run(2, settings=resolve(rate=0.2, iterations=7), seed=3)]
    headings = [column.heading for column in columns(rows)]
    assert headings[:4] == ["run", "rate", "iterations", "seed"]
    assert alike(rows) == "The same in all: model vit, method oats, rank ratio 0.2, pattern row. Dense: 10.00 MB."
    assert "top-1 80.00%" in alike([replace(run, labelled=_labelled(79)) for run in rows])


def test_settings_that_had_no_say_are_left_out():
    rows = [_run(1), _run(2, settings=resolve(bits=4)), _run(3, settings=resolve(method="gptq"))]
    texts = {column.heading: [cell.text for cell in column.cells] for column in columns(rows)}
    assert texts["rate"] == ["0.1", "", ""]
    assert texts["bits"] == ["", "4", ""]
    assert texts["values"] == ["", "", "int4"]
    assert texts["rank ratio"] == ["0.2", "", "0"]
    assert "group size" not in texts
    assert {column.heading: column.numeric for column in columns(rows)}["bits"]


def test_a_scatter_shows_accuracy_else_cost_else_errors():
    rows = [_run(1), _run(2)]
    assert [caption for caption, _ in scatters(rows)] == [
        "same class against bytes",
        "same class against latency, batch 1",
    ]
    assert all("dense" in plot for _, plot in scatters(rows))
    labelled = [replace(run, labelled=_labelled(79)) for run in rows]
    assert scatters(labelled)[0][0] == "top-1 against bytes"
    assert scatters([labelled[0], rows[1]])[0][0] == "same class against bytes"  # not known of all
    bare = [replace(run, cost=None, speed=()) for run in rows]
    assert [caption for caption, _ in scatters(bare)] == ["mean relative error of the layers against bytes"]
    sliced = [replace(run, errors={}) for run in bare]
    assert scatters(sliced) == []
    assert "Errors by block" not in comparison_page(sliced, "sliced")


def test_labels_of_neighbours_do_not_hide_each_other():
    near = [figures.Point(f"{rate:g}", 0.7 + rate, 2 - rate, number=0) for rate in (0.75, 0.76, 0.77, 0.78)]
    plot = figures.scatter([*near, figures.Point("far", 9.0, 9.0, number=0)], "MB", "points lost")
    text = r'text-anchor: (\w+)[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>(0\.7\d+)</text>'
    boxes = []
    for side, x, y, label in re.findall(text, plot):
        width = 4.5 * len(label)  # of letters of 8 points
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[side]
        boxes.append((left, left + width, float(y) - 7, float(y)))
    assert len(boxes) == len(near)
    for one, other in itertools.combinations(boxes, 2):
        aside = one[1] <= other[0] or other[1] <= one[0]
        assert aside or one[3] <= other[2] or other[3] <= one[2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "other"}, "different models"),
        ({"dense_sha256": "b" * 64}, "different dense weights"),
        ({"machine": "gpu"}, "different machines"),
        ({"dtype": "bfloat16"}, "different precisions: bfloat16, float32"),
        ({"cost": _cost(99, 0.1, samples=128)}, "different numbers of samples"),
        ({"held_out": "data other, seed 42"}, "different samples"),
        ({"labelled": _labelled(79, "other")}, "different data"),
        ({"labelled": _labelled(79, settings={"samples": 40})}, "different settings"),
        ({"labelled": _labelled(79, dtype="bfloat16")}, "different precisions: bfloat16, float32"),
    ],
)
def test_runs_that_do_not_compare_are_said(change, words):
    rows = [_run(1, dense_sha256="a" * 64, labelled=_labelled(79, dtype="float32")), _run(2, dense_sha256="a" * 64)]
    rows[1] = replace(rows[1], labelled=_labelled(78))  # of an earlier version, which notes no precision
    assert doubts(rows) == []
    seeds = [_labelled(79, settings={"samples": None, "seed": seed, "workers": seed}) for seed in (1, 2)]
    assert doubts([_run(1, labelled=seeds[0]), _run(2, labelled=seeds[1])]) == []  # all samples, in any case
    found = doubts([rows[0], replace(rows[1], **change)])
    assert len(found) == 1
    assert words in found[0]
    assert found[0] in comparison_page([rows[0], replace(rows[1], **change)], "x")


def test_errors_of_experts_are_one_line():
    spec = LayerSpec(8, 8, False, (PartSpec("w", 8, 1, 1),))
    names = ["model.layers.0.mlp.experts.0.w1", "model.layers.0.mlp.experts.1.w1", "model.layers.2.mlp.experts.0.w1"]
    layers = [LayerReport(name, spec, {"w": 0.1 * i}, {}, {"w": 1}, 0.0, 1) for i, name in enumerate(names, 1)]
    found = errors_by_block(CompressionReport("x", resolve(), layers=layers))
    assert found == {"mlp.experts.*.w1": {0: pytest.approx(0.15), 2: pytest.approx(0.3)}}


@pytest.mark.parametrize("prefix", ["", "0.", "features.0.", "net.1.2."])
def test_a_number_that_all_names_begin_with_is_no_block(prefix):
    """As of a backbone in nn.Sequential."""
    spec = LayerSpec(8, 8, False, (PartSpec("w", 8, 1, 1),))
    layers = [LayerReport(f"{prefix}blocks.{i}.mlp.fc1", spec, {"w": 0.1 * i}, {}, {"w": 1}, 0.0, 1) for i in range(3)]
    found = errors_by_block(CompressionReport("x", resolve(), layers=layers))
    assert found == {"mlp.fc1": {i: pytest.approx(0.1 * i) for i in range(3)}}


def test_page_in_a_browser(browser, tmp_path):
    rows = [_run(i, labelled=_labelled(80 - i)) for i in (1, 2, 3)]
    rows.append(replace(rows[0], name="</script><script>alert(1)</script>", speed=()))
    page = tmp_path / "compare.html"
    write_page(comparison_page(rows, "four <b>runs</b>"), page)
    for size in (DESKTOP, PHONE):
        show(browser, page, size)
        check_quiet(browser, page)
        check_width(browser)
        plots = browser.find_elements(By.CSS_SELECTOR, "figure svg.figure")
        assert len(plots) == 3
        assert all(plot.rect["width"] <= size[0] and plot.rect["height"] > 100 for plot in plots)
    check_accessible(browser)
    check_dark(browser, page)
    assert browser.find_element(By.TAG_NAME, "h1").text == "four <b>runs</b>"
    assert browser.find_element(By.ID, "runs").text.count("(best)") >= 4

    def names() -> list[str]:
        script = "return [...document.querySelectorAll('#runs tbody th')].map(one => one.innerText.split(/\\s+/)[1])"
        return browser.execute_script(script)

    untouched = names()
    assert untouched == ["run1", "run2", "run3", "</script><script>alert(1)</script>"]
    heading = next(b for b in browser.find_elements(By.CSS_SELECTOR, "#runs th button") if b.text == "batch 1")
    browser.execute_script("arguments[0].click()", heading)
    assert names() == [untouched[3], *untouched[:3]]  # what is not known comes first
    browser.execute_script("arguments[0].click()", heading)
    assert names() == ["run3", "run2", "run1", untouched[3]]


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_a_terminal(width):
    rows = [_run(i, labelled=_labelled(80 - i)) for i in (1, 2, 3)]
    shown = io.StringIO()
    Console(width=width, file=shown).print(comparison_table(rows, "runs"))
    assert {"7.00*", "79.00%*", "1.30", "[95.0,"} <= set(shown.getvalue().split())
    assert "…" not in shown.getvalue()


def test_command(directories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["compare", *map(str, directories)])
    assert shown.exit_code == 0
    assert "* best of its column" in shown.output
    assert "The same in all: model" in shown.output
    assert shown.output.rstrip().endswith("Written to compare.html.")
    assert "Errors by block" in (tmp_path / "compare.html").read_text()
    printed = CliRunner().invoke(app, ["compare", *map(str, directories), "--json", "--html", "other.html"])
    content = json.loads(printed.stdout)
    assert [run["settings"]["rate"] for run in content["runs"]] == [0.3, 0.5, 0.7]
    assert [run["bytes"] for run in content["runs"]] == [run.bytes for run in read_compared(directories)]
    assert (tmp_path / "other.html").is_file()


def test_wrong_inputs_are_one_line_each_and_write_nothing(directories, tmp_path):
    first, second, third = directories
    empty = tmp_path / "empty"
    empty.mkdir()
    html = tmp_path / "page.html"
    for given, error, words in [
        ([first], ConfigError, "2 to 20 checkpoints, got 1"),
        ([first] * 21, ConfigError, "2 to 20 checkpoints, got 21"),
        ([first, second, first], ConfigError, "is given twice"),
        ([first, second / ".." / "out", second], ConfigError, "is given twice"),
        ([first, empty], CheckpointError, "there is no config.json"),
        ([first, tmp_path / "none"], CheckpointError, "does not exist"),
        ([first, first / "config.json"], CheckpointError, "is a file"),
    ]:
        result = CliRunner().invoke(app, ["compare", *map(str, given), "--html", str(html)])
        assert isinstance(result.exception, error)
        assert words in str(result.exception)
        assert "\n" not in str(result.exception)
    (third / "report.json").write_text("{")
    result = CliRunner().invoke(app, ["compare", str(first), str(third), "--html", str(html)])
    assert isinstance(result.exception, CheckpointError)
    assert "report.json is damaged" in str(result.exception)
    (third / "report.json").unlink()
    for place, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.html", "does not exist")):
        result = CliRunner().invoke(app, ["compare", str(first), str(second), "--html", str(place)])
        assert isinstance(result.exception, ConfigError)
        assert words in str(result.exception)
    result = CliRunner().invoke(app, ["compare", str(first), str(second), "--html", str(second / "config.json")])
    assert "is a file of the checkpoint" in str(result.exception)
    assert not html.exists()
    os.mkfifo(tmp_path / "pipe")
    result = CliRunner().invoke(app, ["compare", str(first), str(second), "--html", str(tmp_path / "pipe")])
    assert "pipe is not a regular file" in str(result.exception)
    assert (tmp_path / "pipe").is_fifo()


def test_a_page_is_written_to_where_a_link_leads(directories, tmp_path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "page.html").write_text("old")
    (tmp_path / "link.html").symlink_to(tmp_path / "pages" / "page.html")
    written = CliRunner().invoke(app, ["compare", *map(str, directories), "--html", str(tmp_path / "link.html")])
    assert written.exit_code == 0
    assert (tmp_path / "link.html").is_symlink()
    assert "Errors by block" in (tmp_path / "pages" / "page.html").read_text()


def test_a_folder_whose_name_is_in_no_encoding_is_compared(directories, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff"))
    shutil.copytree(directories[0], odd)
    html = tmp_path / "page.html"
    done = command.run("compare", odd, directories[1], "--html", html)
    assert done.returncode == 0, done.stderr
    assert "b\\udcff" in html.read_text()
