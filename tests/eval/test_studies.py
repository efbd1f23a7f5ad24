"""The studies in eval/ as a user runs them: on a tiny model, stopped and started again."""

import csv
import json
import subprocess
from pathlib import Path

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
    timeless = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    resumed = [{k: v for k, v in row.items() if k != "seconds"} for row in _rows(file) if row["seconds"]]
    assert sorted(map(json.dumps, resumed)) == sorted(map(json.dumps, timeless))
    assert again.stdout == done.stdout


def test_perplexity_of_two_texts_in_one_table_each(language_directory, tmp_path):
    for name, line in (("a", "the cat sat on the mat"), ("b", "alice said that it was the best")):
        (tmp_path / f"{name}.txt").write_text(f"{line}\n" * 40)
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    arguments = ["--model", language_directory, "--data", "demo", "--samples", 4, "--sequence-length", 64]
    arguments += ["--eval-data", *texts, "--seeds", 0, "--out", tmp_path / "out"]
    first = _study("perplexity_table", *arguments, "--methods", "wanda", "oats", "--rates", "0.5")
    assert first.returncode == 0, first.stderr
    rows = _rows(tmp_path / "out" / "perplexity_table.csv")
    assert [(row["method"], Path(row["eval_data"]).stem) for row in rows] == [
        ("wanda", "a"),
        ("wanda", "b"),
        ("oats", "a"),
        ("oats", "b"),
    ]
    for row in rows:
        ratio = float(row["perplexity"]) / float(row["dense_perplexity"])
        assert float(row["ratio"]) == pytest.approx(ratio, rel=1e-3)
    for text in "ab":
        assert (tmp_path / "out" / f"perplexity_{text}.md").read_text().count("oats") == 1
        assert (tmp_path / "out" / f"perplexity_{text}.png").stat().st_size > 5000


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
        assert (run.solver, run.iterations, run.refit, run.tolerance) == ("exact", 80, False, 0.0)
        assert run.rank_ratio == {"llama3_8b": 0.3, "phi3_mini": 0.25, "phi3_medium": 0.25}.get(config.stem, 0.2)
