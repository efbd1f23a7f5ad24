"""The studies in eval/ as a user runs them: on a tiny model, stopped and started again."""

import csv
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from command import run_script

STUDIES_FOLDER = Path(__file__).parents[2] / "eval" / "studies"
STUDIES = ["method_table", "iterations_sweep", "ablations"]
FEW = {
    "method_table": ["--methods", "wanda", "sparsegpt", "slicegpt", "oats-plain", "oats", "--rates", "0.4", "0.5"],
    "iterations_sweep": ["--iterations", "1", "4"],
    "ablations": ["--rates", "0.5"],
}


def _study(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run_script(STUDIES_FOLDER / f"{name}.py", *arguments)


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.slow
def test_study_writes_table_and_plot_and_resumes(name, model_directory, tmp_path):
    arguments = ["--model", model_directory, "--samples", 20, "--eval-samples", 50, "--seeds", 0, 1, "--out", tmp_path]
    done = _study(name, *arguments, *FEW[name])
    assert done.returncode == 0, done.stderr
    file = tmp_path / f"{name}.csv"
    rows = _rows(file)
    assert len(rows) >= 4
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert all(0 <= float(row["top1"]) <= 100 and float(row["parameters"]) < 1 for row in rows)
    with Image.open(tmp_path / f"{name}.png") as plot:
        assert plot.size[0] > 500
    assert (tmp_path / f"{name}.md").read_text().count("|") > 10
    assert "±" in done.stdout

    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-2]) + lines[-2][:40])  # stopped while it wrote
    again = _study(name, *arguments, *FEW[name])
    assert again.returncode == 0, again.stderr
    assert "2/2" in again.stderr
    timeless = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    resumed = [{k: v for k, v in row.items() if "seconds" not in k} for row in _rows(file) if row["seconds"]]
    assert sorted(map(json.dumps, resumed)) == sorted(map(json.dumps, timeless))
    assert again.stdout == done.stdout


@pytest.mark.slow
def test_the_table_of_methods_has_all_that_take_a_rate(model_directory, tmp_path):
    few = ["--samples", 16, "--eval-samples", 20, "--seeds", 0, "--rates", 0.5]
    done = _study("method_table", "--model", model_directory, *few, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = _rows(tmp_path / "method_table.csv")
    found = {row["method"] for row in rows}
    assert found == {"oats", "magnitude", "wanda", "sparsegpt", "dsnot", "svd", "slicegpt"}
    assert len(rows) == len(found) + 2  # OATS in its three qualities


@pytest.mark.parametrize("files", [("a/a.txt", "b/b.txt"), ("a/text.txt", "b/text.txt")], ids=["names", "one name"])
def test_perplexity_of_two_texts_in_one_table_each(language_directory, tmp_path, files):
    texts = [tmp_path / file for file in files]
    for text, line in zip(texts, ("the cat sat on the mat", "alice said that it was the best"), strict=True):
        text.parent.mkdir()
        text.write_text(f"{line}\n" * 40)
    arguments = ["--model", language_directory, "--data", "demo", "--samples", 4, "--sequence-length", 64]
    arguments += ["--eval-data", *texts, "--seeds", 0, "--out", tmp_path / "out"]
    first = _study("perplexity_table", *arguments, "--methods", "wanda", "oats", "--rates", "0.5")
    assert first.returncode == 0, first.stderr
    rows = _rows(tmp_path / "out" / "perplexity_table.csv")
    assert [(row["method"], Path(row["eval_data"]).parent.name) for row in rows] == [
        ("wanda", "a"),
        ("wanda", "b"),
        ("oats", "a"),
        ("oats", "b"),
    ]
    for row in rows:
        ratio = float(row["perplexity"]) / float(row["dense_perplexity"])
        assert float(row["ratio"]) == pytest.approx(ratio, rel=1e-3)
    for name in ("a", "b") if files[0] == "a/a.txt" else ("text_1", "text_2"):
        assert (tmp_path / "out" / f"perplexity_{name}.md").read_text().count("oats") == 1
        assert (tmp_path / "out" / f"perplexity_{name}.png").stat().st_size > 5000


def test_closeness_falls_with_the_rate_in_both_measures(model_directory, tmp_path):
    arguments = ["--model", model_directory, "--samples", 20, "--eval-samples", 100, "--seeds", 0, "--out", tmp_path]
    done = _study("closeness_table", *arguments, "--methods", "magnitude", "wanda", "--rates", "0.1", "0.8")
    assert done.returncode == 0, done.stderr
    rows = {(row["method"], row["rate"]): row for row in _rows(tmp_path / "closeness_table.csv")}
    for method in ("magnitude", "wanda"):
        slight, strong = rows[method, "0.1"], rows[method, "0.8"]
        assert 0 < 10 * float(slight["divergence"]) < float(strong["divergence"])
        assert 100 >= float(slight["agreement"]) > float(strong["agreement"])
    for measure in ("divergence", "agreement"):
        assert "±" in (tmp_path / f"{measure}.md").read_text()
        assert (tmp_path / f"{measure}.png").stat().st_size > 5000


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """Marks the tokens whose first feature is positive."""
    made = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Gather", ["tokens", "first"], ["feature"], axis=2),
            onnx.helper.make_node("Sigmoid", ["feature"], ["map"]),
        ],
        "decoder",
        [made("tokens", 1, ["batch", "tokens", 48]), made("pictures", 1, ["batch", 3, 28, 28])],
        [made("map", 1, ["batch", "tokens"])],
        [onnx.numpy_helper.from_array(np.array(0), "first")],
    )
    file = tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8), file)
    return file


def test_features_and_maps_are_the_less_like_dense_the_higher_the_rate(model_directory, decoder, tmp_path):
    arguments = ["features", "--model", model_directory, "--decoder", decoder, "--pictures", 60, "--samples", 20]
    arguments += ["--eval-samples", 30, "--batch-size", 16, "--seeds", 0, 1, "--out", tmp_path]
    arguments += ["--lines", "wanda", "best", "--rates", "0.1", "0.7"]
    done = _study("accuracy_table", *arguments)
    assert done.returncode == 0, done.stderr
    assert "30 pictures to measure on, 30 others to draw from" in done.stderr
    file = tmp_path / "accuracy_table.csv"
    rows = {(row["method"], row["seed"], float(row["rate"])): row for row in _rows(file)}
    assert len(rows) == 2 * 2 * 2
    for method in ("wanda", "oats"):
        figures = ("error", "cosine", "layer_error")  # each of a few digits, which may be alike by chance
        first, second = ([rows[method, seed, 0.7][name] for name in figures] for seed in "01")
        assert first != second  # of other calibration pictures
        for seed in "01":
            slight, strong = rows[method, seed, 0.1], rows[method, seed, 0.7]
            assert 0 < 2 * float(slight["error"]) < float(strong["error"])
            assert 1 >= float(slight["cosine"]) > float(strong["cosine"])
            assert 1 >= float(slight["iou"]) > float(strong["iou"])
            assert 0 < float(slight["solver_seconds"]) < float(slight["seconds"])
    for measure in ("error", "cosine", "iou", "solver_seconds", "seconds"):
        assert (tmp_path / f"{measure}.md").read_text().count("±") > 4
        assert (tmp_path / f"{measure}.png").stat().st_size > 5000

    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    again = _study("accuracy_table", *arguments)
    assert "1/1" in again.stderr
    assert [float(row["error"]) for row in _rows(file)] == [float(row["error"]) for row in rows.values()]


def test_pictures_to_measure_on_are_in_no_calibration_set(model_directory, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (28, 28), "red").save(folder / f"{i}.png")
    arguments = ["features", "--model", model_directory, "--data", folder, "--out", tmp_path]
    twice = _study("accuracy_table", *arguments, "--samples", 4, "--eval-samples", 4)
    assert twice.returncode != 0
    assert "is the same picture as" in twice.stderr
    few = _study("accuracy_table", *arguments, "--samples", 5, "--eval-samples", 4)
    assert few.returncode != 0
    assert "has 8 pictures: too few for 5 to calibrate with and 4 others" in few.stderr
    assert not (tmp_path / "accuracy_table.csv").exists()


def test_a_decoder_that_is_not_there_is_a_clear_error(model_directory, tmp_path):
    arguments = ["features", "--model", model_directory, "--out", tmp_path]
    done = _study("accuracy_table", *arguments, "--decoder", tmp_path / "decoder.onnx")
    assert done.returncode != 0
    assert "decoder.onnx does not exist" in done.stderr


def test_texts_in_the_accuracy_table_lose_the_logarithm_of_their_perplexity(language_directory, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat\n" * 40)
    arguments = ["texts", "--model", language_directory, "--data", "demo", "--samples", 4, "--sequence-length", 64]
    arguments += ["--eval-data", text, "--seeds", 0, "--lines", "wanda", "--rates", "0.5", "--out", tmp_path]
    done = _study("accuracy_table", *arguments)
    assert done.returncode == 0, done.stderr
    (row,) = _rows(tmp_path / "accuracy_table.csv")
    lost = math.log(float(row["perplexity"])) - math.log(float(row["dense_perplexity"]))
    assert f"| wanda | {lost:.4f} ± 0.0000 |" in (tmp_path / "loss.md").read_text()


def test_closeness_of_each_line_of_the_accuracy_table(model_directory, tmp_path):
    arguments = ["closeness", "--model", model_directory, "--samples", 20, "--eval-samples", 50, "--seeds", 0]
    done = _study("accuracy_table", *arguments, "--rates", "0.5", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "divergence.md").read_text().splitlines()[4:]
    assert len(set(lines)) == len(lines) == len(_rows(tmp_path / "accuracy_table.csv")) >= 4


def test_a_file_of_another_study_is_left_alone(model_directory, tmp_path):
    (tmp_path / "ablations.csv").write_text("a,b\n1,2\n")
    done = _study("ablations", "--model", model_directory, "--out", tmp_path)
    assert done.returncode != 0
    assert "is of another study or release" in done.stderr
    assert (tmp_path / "ablations.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    "config", sorted((STUDIES_FOLDER.parents[1] / "configs").rglob("*.yaml")), ids=lambda path: path.stem
)
def test_configs_are_valid(config):
    from oats_vision.runs.config import load_run_config

    run = load_run_config(config, {})
    assert run.settings().rate
    if config.parent.name == "paper":
        assert (run.solver, run.iterations, run.quality, run.tolerance) == ("exact", 80, "plain", 0.0)
        assert run.rank_ratio == {"llama3_8b": 0.3, "phi3_mini": 0.25, "phi3_medium": 0.25}.get(config.stem, 0.2)


@pytest.mark.slow
def test_budgets_are_compared_on_pictures_kept_apart(model_directory, tmp_path):
    arguments = ["--model", model_directory, "--samples", 20, "--held-out", 30, "--seeds", 0, "--out", tmp_path]
    done = _study("budgets", *arguments, "--methods", "wanda", "--rates", "0.5", "0.9")
    assert done.returncode == 0, done.stderr
    rows = _rows(tmp_path / "budgets.csv")
    assert {row["budget"] for row in rows} == {"uniform", "measured", "owl", "alphapruning"}
    error = {(row["budget"], row["rate"]): float(row["feature_error"]) for row in rows}
    assert all(0 < error[budget, "0.5"] < error[budget, "0.9"] for budget, _ in error)
    assert all(0.08 < float(row["parameters"]) <= 0.1 for row in rows if row["rate"] == "0.9")


def test_fewer_bits_lose_more_and_count_as_many_as_the_table_says(model_directory, tmp_path):
    arguments = ["features", "--model", model_directory, "--pictures", 60, "--samples", 20, "--eval-samples", 30]
    arguments += ["--batch-size", 16, "--seeds", 0, "--out", tmp_path, "--lines", "rtn", "bits"]
    done = _study("bits_table", *arguments)
    assert done.returncode == 0, done.stderr
    rows = _rows(tmp_path / "bits_table.csv")
    rtn = {row["values"]: row for row in rows if row["method"] == "rtn" and row["group_size"] == "64"}
    assert float(rtn["int8"]["bits_a_weight"]) == pytest.approx(
        8 + 16 / 48, abs=0.2
    )  # a scale for each row of 48 or 96
    errors = [float(rtn[values]["error"]) for values in ("int8", "int4", "int3", "int2")]
    assert errors == sorted(errors)
    assert (tmp_path / "error.md").read_text().count("±") >= len(rows)
