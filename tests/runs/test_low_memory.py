import errno
import json
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from oats_vision.compression import block_files
from oats_vision.display import Display
from oats_vision.errors import CheckpointError, ConfigError, notes
from oats_vision.runs import run as whole_run
from oats_vision.runs.config import load_run_config
from oats_vision.runs.run import dry_run, run


def _options(directory: Path, out: Path, **others) -> dict:
    options = {"model": str(directory), "data": "demo", "samples": 8, "batch_size": 4, "quality": "fast"}
    return options | {"iterations": 2, "out": str(out), "report": False} | others


def _config(*args, **others):
    return load_run_config(None, _options(*args, **others))


def test_a_run_block_by_block_writes_the_same_and_measures_the_same(model_directory, tmp_path):
    found = {}
    for low_memory in (False, True):
        config = _config(model_directory, tmp_path / str(low_memory), low_memory=low_memory)
        found[low_memory] = run(config, Display())
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("False", "True")]
    assert files[0].keys() == files[1].keys()
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("False", "True")]
    assert contents[0] == contents[1]
    assert found[True].result.cost == found[False].result.cost
    assert found[True].result.sizes == found[False].result.sizes
    assert "block by block" in found[True].result.untimed
    assert {path.name for path in tmp_path.iterdir()} == {"False", "True"}  # the finished blocks' files are gone
    assert json.loads((tmp_path / "True" / "report.json").read_text())["planned_memory"] > 0


def test_the_plan_says_how_often_weights_are_read(model_directory, tmp_path):
    whole, _ = dry_run(_config(model_directory, tmp_path / "out", low_memory=False), Display())
    told, estimate = dry_run(_config(model_directory, tmp_path / "out", low_memory=True), Display())
    assert "weights" not in whole.lines()
    assert "read from their files block by block" in told.lines()["weights"]
    assert told.memory.model < whole.memory.model
    assert told.sizes == whole.sizes
    assert estimate.total > 0


def test_a_compressed_model_that_fits_is_loaded_whole(model_directory, tmp_path, monkeypatch):
    from oats_vision.models.loading import load

    monkeypatch.setattr(load, "available_memory", lambda device: 1e5)
    finished = run(_config(model_directory, tmp_path / "out"), Display())
    assert not any(parameter.is_meta for parameter in finished.result.model.parameters())
    monkeypatch.setattr(whole_run, "available_memory", lambda device: 1e4)
    finished = run(_config(model_directory, tmp_path / "small"), Display())
    assert any(parameter.is_meta for parameter in finished.result.model.parameters())


@pytest.mark.parametrize("given", [{"recover": 5}, {"merge": True}, {"method": "slicegpt"}, {"target_mb": 1.0}])
def test_what_needs_the_whole_model_is_refused(model_directory, tmp_path, given):
    options = {name: value for name, value in _options(model_directory, tmp_path).items() if name != "quality"}
    with pytest.raises(ConfigError, match=rf"low_memory`? is given, and `{next(iter(given))}`.* needs the whole model"):
        load_run_config(None, options | given | {"low_memory": True})
    config = load_run_config(None, options | given)
    assert config.block_by_block is False


def test_a_disk_that_is_full_of_finished_blocks_is_said_and_the_run_goes_on(model_directory, tmp_path, monkeypatch):
    config = _config(model_directory, tmp_path / "out", low_memory=True, eval=False)

    def full(*given):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(block_files, "save_file", full)
        with pytest.raises(CheckpointError, match="cannot be written: the disk is full: free some space") as stopped:
            run(config, Display())
    assert notes(stopped.value) == ["the same command goes on after block 1 of 2"]
    run(config, Display())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
