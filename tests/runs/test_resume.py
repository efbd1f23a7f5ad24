"""A whole run that was stopped: the same command goes on, and anything else is refused."""

import json
from pathlib import Path

import pytest

import command
import oats_vision as ov
from disk import small_disk
from oats_vision.compression import pipeline
from oats_vision.compression.journal import Journal
from oats_vision.display import Display
from oats_vision.errors import CheckpointError, ConfigError, notes
from oats_vision.runs import run as runs
from oats_vision.runs import search, sweep
from oats_vision.runs.config import RunConfig
from oats_vision.runs.grid import sweep_config
from oats_vision.under_way import LAYERS, read_layers, under_way

FIELDS = {"data": "demo", "samples": 16, "iterations": 3, "quality": "fast"}
FEW = FIELDS | {"eval": False, "report": False}
FEW_PLAIN = {name: value for name, value in FEW.items() if name != "quality"}


class Stopped(SystemExit):
    """As a signal does it."""


@pytest.fixture
def stopping(monkeypatch):
    """Let runs compress so many blocks, and stop at the next one."""

    def after(blocks: int) -> list[str]:
        compressed: list[str] = []

        def compress_block(job, index, name, *rest):
            if len(compressed) == blocks:
                raise Stopped
            own(job, index, name, *rest)
            compressed.append(name)

        monkeypatch.setattr(pipeline, "compress_block", compress_block)
        return compressed

    own = pipeline.compress_block
    return after


@pytest.fixture(scope="module")
def whole(model_directory, tmp_path_factory) -> bytes:
    """The weights that a run ends with which nobody stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    runs.run(RunConfig(model=str(model_directory), out=out, **FEW), Display())
    return (out / "model.safetensors").read_bytes()


def words(model: Path, *others: object) -> list[object]:
    return ["compress", "--model", model, "--data", "demo", "--samples", 16, "--iterations", 3, "--quality", "fast",
            "--no-eval", "--no-report", "--out", "out", *others]  # fmt: skip


def test_the_same_command_goes_on_and_another_one_is_refused(model_directory, tmp_path, stopping, whole):
    stopping(1)
    assert command.run(*words(model_directory), cwd=tmp_path).returncode == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.partial"]
    left = stopping(9)
    other = command.run(*words(model_directory, "--rate", 0.4, "--seed", 7), cwd=tmp_path)
    assert other.returncode == 1
    assert "after block 1 of 2, and that differs: --rate was 0.5 and is 0.4; --seed was 42 and is 7" in other.stderr
    assert "--restart to begin again" in other.stderr
    assert other.stderr.count("\n") == 1
    done = command.run(*words(model_directory), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"going on after block 1 of 2, from {tmp_path / 'out.partial'}\n" in done.stderr
    assert left == ["blocks.1"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    again = command.run(*words(model_directory), cwd=tmp_path)
    assert "out exists" in again.stderr  # it is complete


def test_restart_begins_again(model_directory, tmp_path, stopping):
    stopping(1)
    command.run(*words(model_directory), cwd=tmp_path)
    compressed = stopping(9)
    done = command.run(*words(model_directory, "--rate", 0.4, "--restart"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert compressed == ["blocks.0", "blocks.1"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_was_stopped_while_it_measured_goes_on(model_directory, tmp_path, monkeypatch, overwrite, stopping):
    """Its checkpoint is there: no other run may replace it, and its own needs no leave to."""
    config = RunConfig(model=str(model_directory), out=tmp_path / "out", overwrite=overwrite, **FIELDS)
    if overwrite:
        runs.run(
            RunConfig(model=str(model_directory), out=tmp_path / "out", method="magnitude", **FEW_PLAIN), Display()
        )

    def stop(*given):
        raise Stopped

    measure = runs.measure_stored
    monkeypatch.setattr(runs, "measure_stored", stop)
    with pytest.raises(Stopped) as stopped:
        runs.run(config, Display())
    assert notes(stopped.value) == ["all blocks are kept, and the same command does the rest"]
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert not (tmp_path / "out" / "report.json").exists()
    assert under_way(tmp_path / "out").status["written"] is True
    assert len(read_layers(tmp_path / "out" / LAYERS)) == 8
    monkeypatch.setattr(runs, "measure_stored", measure)
    with pytest.raises(ConfigError, match="`seed` was 42 and is 1"):
        runs.run(config.model_copy(update={"seed": 1}), Display())
    compressed = stopping(9)
    runs.run(config, Display())
    assert compressed == []
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "out" / "report.json").read_text())["cost"]
    assert len(read_layers(tmp_path / "out" / LAYERS)) == 8
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_full_at_the_end_keeps_all_blocks(model_directory, tmp_path, whole):
    disk = tmp_path / "small"
    config = RunConfig(model=str(model_directory), out=disk / "out", **FEW)
    with small_disk(disk, 3 * len(whole) // 2) as make_room:
        with pytest.raises(CheckpointError, match=r"small/out.* cannot be written: the disk is full") as full:
            runs.run(config, Display())
        kept = Journal(disk / "out.partial").done
        assert [entry.name for entry in disk.iterdir()] == ["out.partial"]
        if kept == 2:  # with a disk of its own
            assert notes(full.value) == ["all blocks are kept, and the same command does the rest"]
        make_room()
        runs.run(config, Display())
        assert (disk / "out" / "model.safetensors").read_bytes() == whole
        assert [entry.name for entry in disk.iterdir()] == ["out"]


def test_a_trial_of_a_search_goes_on_within(model_directory, tmp_path, stopping):
    size = sum(file.stat().st_size for file in model_directory.iterdir()) / 1e6
    config = RunConfig(model=str(model_directory), out=tmp_path / "out", target_mb=0.75 * size, **FEW)
    stopping(1)
    with pytest.raises(Stopped) as stopped:
        search.search(config)
    assert notes(stopped.value) == ["the same command goes on after block 1 of 2"]
    compressed = stopping(9)
    search.search(config)
    assert compressed == ["blocks.1"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_cell_of_a_sweep_goes_on_within(model_directory, tmp_path, stopping, keep):
    config = sweep_config(model=str(model_directory), out=tmp_path / "out", rate=[0.4, 0.5], keep=keep, **FEW)
    stopping(3)
    with pytest.raises(Stopped) as stopped:
        sweep.sweep(config)
    assert notes(stopped.value) == ["the same command goes on after block 1 of 2"]
    compressed = stopping(9)
    made = sweep.sweep(config)
    assert compressed == ["blocks.1"]
    assert [row.settings.rate for row in made.rows] == [0.4, 0.5]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(".") or ".partial" in path.name]


def test_slicing_keeps_nothing_and_begins_again(model_directory, tmp_path):
    config = RunConfig(model=str(model_directory), out=tmp_path / "out", method="slicegpt", **FEW_PLAIN)
    runs.run(config, Display())
    ov.load(tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
