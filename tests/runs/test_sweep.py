"""Sweeps: which cells a grid has, what is measured and written, and how one that was stopped goes on."""

import csv
import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import oats_vision as ov
from command import run
from oats_vision import checkpoint
from oats_vision.analysis.tables import as_text
from oats_vision.compression import methods
from oats_vision.errors import CheckpointError, ConfigError, DataError
from oats_vision.runs.grid import cell_name, cell_words, expand, load_sweep_config, sweep_config
from oats_vision.runs.sweep import Sweep, sweep
from oats_vision.runs.sweep_table import mean_runs, sweep_table

BYTES = {"data": "demo", "samples": 20, "batch_size": 20, "iterations": 2, "eval": False}
QUICK = BYTES | {"eval": True, "eval_data": "demo", "eval_samples": 40}


def names(**grid) -> list[str]:
    return [cell_name(cell) for cell in expand({}, **grid).cells]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "sweep.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def times(out: Path) -> dict[str, int]:
    """When each cell was written."""
    return {file.name: file.stat().st_mtime_ns for file in (out / "cells").iterdir()}


GRIDS = {
    "nothing given": ({}, ["oats-0.5-0.2-row"]),
    "rates by rank ratios": (
        {"rate": [0.3, 0.5], "rank_ratio": [0.1, "auto"]},
        ["oats-0.3-0.1-row", "oats-0.3-auto-row", "oats-0.5-0.1-row", "oats-0.5-auto-row"],
    ),
    "twice the same": ({"rate": [0.5, 0.5], "rank_ratio": [None, 0.2]}, ["oats-0.5-0.2-row"]),
    "baselines once for all rank ratios": (
        {"method": ["oats", "wanda", "svd"], "rate": [0.5], "rank_ratio": [0.1, 0.2]},
        ["oats-0.5-0.1-row", "oats-0.5-0.2-row", "wanda-0.5-row", "svd-0.5"],
    ),
    "no pattern without a sparse matrix": (
        {"method": ["svd", "slicegpt", "magnitude"], "pattern": ["row", "layer", "2:4"]},
        ["svd-0.5", "slicegpt-0.5", "magnitude-0.5-row", "magnitude-0.5-layer", "magnitude-0.5-2of4"],
    ),
    "N:M and rank ratios: the rate follows": (
        {"pattern": ["2:4"], "rate": [0.3, 0.5], "rank_ratio": [0.2, 0.0]},
        ["oats-0.375-0.2-2of4", "oats-0.5-0-2of4"],
    ),
    "N:M and rates: the rank ratio follows": (
        {"pattern": ["2:4"], "rate": [0.375, 0.5]},
        ["oats-0.375-0.2-2of4", "oats-0.5-0-2of4"],
    ),
    "methods without a rate once": (
        {"method": ["oats", "rtn", "gptq"], "rate": [0.3, 0.5]},
        ["oats-0.3-0.2-row", "oats-0.5-0.2-row", "rtn-int4x64", "gptq-int4x64"],
    ),
    "bits after rates, once for all rank ratios and patterns": (
        {"rate": [0.3, 0.5], "bits": [4, 3.5, 4], "rank_ratio": [0.1, 0.2]},
        ["oats-0.3-0.1-row", "oats-0.3-0.2-row", "oats-0.5-0.1-row", "oats-0.5-0.2-row", "oats-4bits", "oats-3.5bits"],
    ),
    "bits alone": ({"bits": [3, 4], "pattern": ["layer"]}, ["oats-3bits", "oats-4bits"]),
    "a method with a format of its own once for all bits": (
        {"method": ["oats", "gptq", "wanda"], "bits": [3, 4]},
        ["oats-3bits", "oats-4bits", "gptq-int4x64"],
    ),
    "what cannot be is left out": (
        {"pattern": ["row", "2:4"], "rate": [0.7], "rank_ratio": ["auto"]},
        ["oats-0.7-auto-row"],
    ),
}


@pytest.mark.parametrize(("grid", "expected"), GRIDS.values(), ids=GRIDS.keys())
def test_a_grid_has_every_cell_that_can_be_once(grid, expected):
    assert names(**grid) == expected


def test_what_a_grid_leaves_out_is_said_once():
    grid = expand({}, method=["oats", "wanda"], rate=[0.3, 0.7], rank_ratio=[0.1, "auto"], pattern=["row", "2:4"])
    said = [
        "oats, rate 0.444444, rank ratio 0.1, 2:4: the rate follows from the pattern and the rank ratio",
        "wanda has its own rank ratio, 0: it runs once for all of the grid's",
        "wanda, rate 0.5, 2:4: the rate follows from the pattern and the rank ratio",
    ]
    assert list(grid.notes) == said
    assert [reason.partition(":4, ")[0] for reason in grid.skipped] == ["oats, pattern 2", "oats, pattern 2"]
    assert all("rank_ratio auto is for method oats with pattern row or layer" in reason for reason in grid.skipped)
    assert expand({}, method=["gptq"], rate=[0.5]).notes == ("gptq has no rate: it runs once for all of the grid's",)
    assert not expand({}, method=["wanda"], rate=[0.5], pattern=["2:4"]).notes  # what was asked for is what follows


def test_formats_tell_cells_apart():
    grid = expand({"values": "int3", "symmetric": False}, method=["oats", "gptq"], rate=[0.5])
    assert [cell_name(cell) for cell in grid.cells] == ["oats-0.5-0.2-row-int3x64z", "gptq-int3x64z"]
    assert [cell_words(cell) for cell in grid.cells] == [
        "oats, rate 0.5, int3 in groups of 64, own zeros, rank ratio 0.2",
        "gptq, int3 in groups of 64, own zeros",
    ]
    (cell,) = expand({}, bits=[3.5]).cells
    assert (cell_name(cell), cell_words(cell)) == ("oats-3.5bits", "oats, 3.5 bits a weight")


def test_settings_of_all_cells_reach_those_that_they_are_for():
    config = sweep_config(method=["oats", "wanda"], iterations=7, refit=True, skip="*.fc2", samples=5, seeds=3, seed=4)
    oats, wanda = config.grid.cells
    assert (oats.iterations, oats.refit, oats.skip) == (7, True, ("*.fc2",))
    assert (wanda.iterations, wanda.refit, wanda.skip) == (7, False, ("*.fc2",))
    assert config.base.samples == 5
    assert config.seeds == (4, 5, 6)
    assert [cell_words(cell) for cell in config.grid.cells] == ["oats, rate 0.5, rank ratio 0.2", "wanda, rate 0.5"]


WRONG = {
    "rate": ({"rate": [0.5, 1.2]}, "rate must be in (0, 1), got 1.2"),
    "rank ratio": ({"rank_ratio": -1}, "rank_ratio must be in [0, 1] or auto, got"),
    "method": ({"method": "magic"}, "'magic'"),
    "pattern": ({"pattern": ["row", "4:2"]}, "pattern must be"),
    "unknown": ({"speed": 3}, "speed"),
    "seeds": ({"seeds": 0}, "seeds must be at least 1"),
    "samples": ({"samples": 0}, "samples"),
    "for one run": ({"merge": True}, "merge is not a setting of a sweep"),
    "one board": ({"tensorboard": "board"}, "tensorboard is not a setting of a sweep"),
    "one model": ({"low_memory": True}, "low_memory is not a setting of a sweep"),
    "bits": ({"bits": [3, 9]}, "bits must be in [2.125, 8.25] or auto, got 9"),
    "bits of a search": ({"bits": [4, "auto"]}, "bits auto is not for a sweep: give a number"),
    "nothing that can be": (
        {"pattern": "2:4", "rate": 0.7},
        "no cell of the grid is possible: oats, pattern 2:4, rate 0.7",
    ),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_in_every_cell_is_seen_before_the_work(fields, message):
    with pytest.raises(ConfigError) as wrong:
        sweep_config(**fields)
    assert message in str(wrong.value)


def test_a_file_gives_lists_and_flags_override_them(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("rate: [0.3, 0.4]\npattern: [row, 2:4]\nmethod: wanda\nseeds: 2\nsamples: 9\n")
    config = load_sweep_config(file, {"rate": ["0.6"], "method": None})
    assert [cell_name(cell) for cell in config.grid.cells] == ["wanda-0.6-row", "wanda-0.5-2of4"]
    assert (config.seeds, config.base.samples) == ((42, 43), 9)
    file.write_text("rate: [0.3, half]\n")
    with pytest.raises(ConfigError, match=rf"`config` {file}: .*half"):
        load_sweep_config(file, {})


@pytest.fixture(scope="module")
def made(model_directory, tmp_path_factory) -> Sweep:
    """OATS and Wanda at two rates and two seeds; a rank ratio that leaves no rank fails."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    grid = {"method": ["oats", "wanda"], "rate": [0.3, 0.6], "rank_ratio": [0.2, 1e-4], "seeds": 2}
    return sweep(sweep_config(model=str(model_directory), out=out, **QUICK, **grid))


def test_cells_without_a_rate_run(model_directory, tmp_path):
    grid = {"method": ["oats", "rtn"], "bits": [4.5, 2.6], "rate": 0.5, "quality": "fast"}
    done = sweep(sweep_config(model=str(model_directory), out=tmp_path / "out", **BYTES, **grid))
    names = ["oats-0.5-0.2-row", "oats-4.5bits", "oats-2.6bits", "rtn-int4x64"]
    assert [cell_name(row.settings) for row in done.rows] == names
    assert all(row.run.bytes < row.run.dense_bytes for row in done.rows)
    assert done.rows[1].run.bytes > done.rows[2].run.bytes
    sizes = [(line["rate"], line["bits"], line["rank_ratio"]) for line in rows(tmp_path / "out")]
    assert sizes == [("0.5", "", "0.2"), ("", "4.5", ""), ("", "2.6", ""), ("", "", "0.0")]
    shown = [line.split() for line in as_text(sweep_table(done)).splitlines()]
    assert ["method", "rate", "bits", "rank", "ratio", "pattern"] in [line[:6] for line in shown]
    assert [line[1] for line in shown if line[:1] == ["oats"]] == ["0.5", "4.5", "2.6"]


def test_every_cell_and_seed_is_measured_as_compress_measures(made):
    assert [(row.settings.method, row.settings.rate, row.seed) for row in made.rows] == [
        (method, rate, seed) for method in ("oats", "wanda") for rate in (0.3, 0.6) for seed in (42, 43)
    ]
    for row in made.rows:
        run = row.run
        assert [metric.name for metric in run.cost.metrics] == ["same class", "relative error of features"]
        assert run.cost.samples == 64
        assert [timing.what for timing in run.speed] == ["forward, batch 1", "forward, batch 20"]
        assert run.labelled.compared == "top-1"
        assert run.bytes < run.dense_bytes
        assert row.parameters[1] < row.parameters[0]
    slight, strong = (made.rows[i].run.cost.metrics[1].value for i in (0, 2))
    assert slight < strong
    first, second = made.rows[:2]
    assert first.run.cost != second.run.cost  # of other calibration and other held-out pictures
    assert first.run.labelled.dense == second.run.labelled.dense  # of the same labelled ones


def test_the_csv_file_has_every_figure_and_what_failed(made):
    lines = rows(made.config.out)
    assert len(lines) == 12
    done, failed = [line for line in lines if not line["failed"]], [line for line in lines if line["failed"]]
    for line, row in zip(done, made.rows, strict=True):
        assert line["name"] == row.name
        assert (float(line["rate"]), int(line["seed"])) == (row.settings.rate, row.seed)
        assert int(line["bytes"]) == row.run.bytes
        assert float(line["same_class_low"]) <= float(line["same_class"]) <= float(line["same_class_high"])
        speedup = float(line["forward_batch_20_dense_ms"]) / float(line["forward_batch_20_ms"])
        assert float(line["forward_batch_20_speedup"]) == pytest.approx(speedup, rel=1e-4)
        assert float(line["top1_change"]) == pytest.approx(float(line["top1"]) - float(line["top1_dense"]), abs=1e-3)
        assert 0 < float(line["error"]) < 1
    assert {line["rank_ratio"] for line in failed} == {"0.0001"}
    assert all("leaves rank 0" in line["failed"] for line in failed)
    assert len(made.notes) == 2  # one for each cell, not for each seed


def test_the_table_has_means_over_seeds_the_dense_model_and_what_failed(made):
    text = as_text(sweep_table(made))
    assert f"{made.config.base.model}, pattern row: mean ± standard deviation over the seeds" in " ".join(text.split())
    lines = [line.split() for line in text.splitlines()]
    begin = [line[:2] for line in lines if line and line[0] in ("dense", "oats", "wanda", "failed")]
    assert begin[0][0] == "dense"
    assert begin[1:] == [
        ["oats", "0.3"],
        ["oats", "0.6"],
        ["wanda", "0.3"],
        ["wanda", "0.6"],
        *[["failed", "oats"]] * 2,
    ]
    values = [row.run.cost.metrics[1].value for row in made.rows[:2]]
    mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    assert f"{mean:.4f}" in text
    assert f"± {deviation:.4f}" in text
    speedup = sum(row.run.speed[0].speedup for row in made.rows[:2]) / 2
    assert f"{speedup:.2f} x" in text
    first = mean_runs(made.rows)[0]
    assert first.speed[0].speedup == pytest.approx(speedup)
    metric = first.cost.metrics[1]
    assert (metric.value, metric.high - metric.value) == pytest.approx((mean, deviation))


def test_means_are_of_what_was_measured_where_a_seed_lacks_a_timing_or_a_block(made):
    first, second, *_ = made.rows
    lacking = replace(second.run, speed=second.run.speed[1:], errors={1: second.run.errors[1]})
    mean = mean_runs([first, second.model_copy(update={"run": lacking})])[0]
    assert [timing.what for timing in mean.speed] == ["forward, batch 1", "forward, batch 20"]
    assert mean.speed[0].speedup == pytest.approx(first.run.speed[0].speedup)
    both = first.run.speed[1].speedup + second.run.speed[1].speedup
    assert mean.speed[1].speedup == pytest.approx(both / 2)
    assert mean.errors == {1: pytest.approx((first.run.errors[1] + second.run.errors[1]) / 2)}


def test_the_page_shows_each_cell_the_dense_model_and_what_failed(made):
    page = (made.config.out / "sweep.html").read_text()
    for words in (
        "top-1 against bytes",
        "top-1 against latency",
        "dense",
        "leaves rank 0",
        "mean over its seeds",
    ):
        assert words in page
    assert all(row.run.name in page for row in made.rows)


def test_the_figures_are_json(made):
    figures = json.loads(json.dumps(made.to_dict()))
    assert [row["name"] for row in figures["rows"]] == [row.name for row in made.rows]
    assert figures["rows"][0]["run"]["cost"]["samples"] == 64
    assert len(figures["failed"]) == 4


def test_more_values_are_added_and_nothing_is_done_twice(model_directory, tmp_path):
    def go(**grid) -> Sweep:
        return sweep(sweep_config(model=str(model_directory), out=tmp_path / "out", **BYTES, **grid))

    first = go(rate=0.3)
    written = times(tmp_path / "out")
    assert [row.settings.rate for row in first.rows] == [0.3]
    assert first.rows[0].run.cost is None
    assert not first.rows[0].run.speed
    assert "error of layers" in as_text(sweep_table(first))
    second = go(rate=[0.5, 0.3], method=["oats", "wanda"])
    assert [(row.settings.method, row.settings.rate) for row in second.rows] == [
        ("oats", 0.3),
        ("oats", 0.5),
        ("wanda", 0.3),
        ("wanda", 0.5),
    ]
    assert times(tmp_path / "out").items() >= written.items()
    assert second.to_dict()["rows"][0] == first.to_dict()["rows"][0]
    written = times(tmp_path / "out")
    assert go(rate=[0.3, 0.6], dry_run=True).missing == ("oats-0.6-0.2-row-seed42",)
    third = go(rate=0.5)
    assert third.to_dict()["rows"] == second.to_dict()["rows"]  # what was there stays in the table
    assert times(tmp_path / "out") == written


def test_checkpoints_are_kept_if_asked(model_directory, tmp_path):
    options = BYTES | {"model": str(model_directory), "out": tmp_path / "out", "method": "wanda"}
    sweep(sweep_config(**options))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *["cells", "sweep.csv", "sweep.html", "sweep.json"],
    ]
    made = sweep(sweep_config(**options, keep=True))
    kept = tmp_path / "out" / "wanda-0.5-row-seed42"
    ov.load(kept)
    assert json.loads((kept / "report.json").read_text())["run"]["method"] == "wanda"
    assert made.rows[0].run.bytes == pytest.approx((kept / "model.safetensors").stat().st_size, rel=0.1)


@pytest.fixture
def begun(model_directory, tmp_path) -> dict[str, object]:
    """The settings of a sweep that is finished."""
    options = BYTES | {"model": str(model_directory), "out": tmp_path / "out", "method": "wanda"}
    sweep(sweep_config(**options))
    return options


def test_another_sweep_is_refused_in_the_same_folder(begun, tmp_path):
    before = {file: file.read_bytes() for file in begun["out"].rglob("*.json")}
    with pytest.raises(ConfigError, match=r"samples is 20 there and 21 here; iterations is 2 there and 3|iterations"):
        sweep(sweep_config(**begun | {"samples": 21, "iterations": 3}))
    with checkpoint.locked(begun["out"]), pytest.raises(CheckpointError, match="being written by another run"):
        sweep(sweep_config(**begun))
    assert {file: file.read_bytes() for file in begun["out"].rglob("*.json")} == before

    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.md").write_text("precious")
    with pytest.raises(CheckpointError, match="is not a folder of a sweep"):
        sweep(sweep_config(**begun | {"out": tmp_path / "papers"}))
    assert [entry.name for entry in (tmp_path / "papers").iterdir()] == ["thesis.md"]


def test_other_weights_under_the_same_name_are_refused(begun, model_directory):
    weights = model_directory / "model.safetensors"
    tensors, before = load_file(weights), weights.read_bytes()
    try:
        save_file({**tensors, "head.bias": tensors["head.bias"] + 1}, weights)
        sweep(sweep_config(**begun))  # nothing is missing
        with pytest.raises(ConfigError, match="have changed since"):
            sweep(sweep_config(**begun, rate=0.3))
    finally:
        weights.write_bytes(before)


def test_other_data_under_the_same_name_are_refused(model_directory, tmp_path):
    (tmp_path / "data").mkdir()

    def pictures(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for number in range(20):
            values = generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(values).save(tmp_path / "data" / f"{number}.png")

    def go(rate: float, out: str = "out") -> Sweep:
        given = BYTES | {"data": str(tmp_path / "data"), "model": str(model_directory), "method": "wanda"}
        return sweep(sweep_config(**given, out=tmp_path / out, rate=rate))

    pictures(1)
    go(0.3)
    go(0.4)
    pictures(2)
    with pytest.raises(ConfigError, match="the data of seed 42 have changed since: give another out"):
        go(0.5)
    assert len(go(0.5, "other").rows) == 1


def test_wrong_data_leave_nothing_behind(model_directory, tmp_path):
    options = QUICK | {"model": str(model_directory), "data": str(tmp_path / "none")}
    with pytest.raises(DataError, match="does not exist"):
        sweep(sweep_config(**options, out=tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_warnings_are_not_repeated_for_each_cell(model_directory, tmp_path, caplog):
    logging.getLogger().addHandler(caplog.handler)
    options = QUICK | {"model": str(model_directory), "out": tmp_path / "out", "method": ["wanda", "magnitude"]}
    sweep(sweep_config(**options))
    said = [record.getMessage() for record in caplog.records]
    assert said
    assert len(set(said)) == len(said)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.slow
def test_a_stopped_sweep_goes_on_where_it_was(model_directory, tmp_path, number):
    out = tmp_path / "out"
    shared = ["--data", "demo", "--samples", 20, "--no-eval", "--iterations", 400, "--tolerance", 0]
    grid = ["--rate", 0.3, "--rate", 0.4, "--rate", 0.5, "--rate", 0.6]
    arguments = ["sweep", "--model", model_directory, *shared, *grid, "--out", out]
    stopped = subprocess.Popen(
        [sys.executable, "-m", "oats_vision", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
    while not (out / "sweep.csv").exists() or not list((out / ".cell").glob("*.partial/0000*")):  # in the second cell
        assert stopped.poll() is None
        time.sleep(0.02)
    stopped.send_signal(number)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert "Traceback" not in errors
    done = times(out)
    assert 0 < len(done) < 4
    assert rows(out)
    if number == signal.SIGINT:
        assert errors.splitlines()[-1].startswith("stopped by SIGINT: the same command goes on after ")
        return
    (out / "cells" / "oats-0.6-0.2-row-seed42.json").write_text('{"settings": {"met')  # as a disk may leave it
    (out / "sweep.csv").write_text((out / "sweep.csv").read_text()[:-20])

    fields = {"data": "demo", "samples": 20, "eval": False, "iterations": 400, "tolerance": 0}
    made = sweep(sweep_config(model=str(model_directory), out=out, rate=[0.3, 0.4, 0.5, 0.6], **fields))
    assert [row.settings.rate for row in made.rows] == [0.3, 0.4, 0.5, 0.6]
    assert times(out).items() >= done.items()
    assert [float(line["rate"]) for line in rows(out)] == [0.3, 0.4, 0.5, 0.6]
    assert sorted(path.name for path in out.iterdir()) == ["cells", "sweep.csv", "sweep.html", "sweep.json"]
    assert not list((out / "cells").glob(".*"))


def test_the_command_prints_json_and_fails_with_a_cell(model_directory, tmp_path):
    options = ["--data", "demo", "--samples", 20, "--no-eval", "--iterations", 1, "--json", "--out", "out"]
    grid = ["--rank-ratio", 0.2, "--rank-ratio", 0.0001, "--pattern", "row", "--pattern", "7:8", "--rate", 0.5]
    done = run("sweep", "--model", model_directory, *options, *grid, cwd=tmp_path)
    assert done.returncode == 1
    figures = json.loads(done.stdout)
    assert [row["name"] for row in figures["rows"]] == ["oats-0.5-0.2-row-seed42"]
    assert figures["failed"][0]["name"] == "oats-0.5-0.0001-row-seed42"
    assert len(figures["skipped"]) == 1
    assert "cell 1/3: oats, rate 0.5, rank ratio 0.2" in done.stderr
    assert "error: " not in done.stderr


@pytest.mark.parametrize("problem", [ValueError("no positive matrix"), RuntimeError("no memory"), MemoryError()])
def test_what_goes_wrong_in_one_cell_leaves_the_others(model_directory, tmp_path, monkeypatch, problem):
    def broken(*given):
        raise problem

    monkeypatch.setattr(methods.find("magnitude"), "decompose", broken)
    done = sweep(
        sweep_config(
            model=str(model_directory), out=tmp_path / "out", **BYTES, rate=[0.5], method=["magnitude", "wanda"]
        )
    )
    assert [row.settings.method for row in done.rows] == ["wanda"]
    (failure,) = done.failures
    assert failure.settings.method == "magnitude"
    assert (str(problem) or "MemoryError") in failure.reason
