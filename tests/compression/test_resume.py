"""A compression that was stopped goes on after its last finished block, and ends with the same bits."""

import copy
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import nn

import oats_vision as ov
from disk import small_disk
from oats_vision import checkpoint
from oats_vision.compression.journal import Journal
from oats_vision.errors import CheckpointError, ConfigError, DataError, notes, saying
from oats_vision.progress import Step

FAST = {"rate": 0.5, "quality": "fast", "iterations": 5}


class Stopped(BaseException):
    """As a signal does, it may come anywhere."""


def stop_in(block: int):
    def progress(step: Step) -> None:
        if step.block == block and step.activity == "decomposing":
            raise Stopped

    return progress


def equal(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def timeless(result: ov.Result) -> list[dict]:
    return [{k: v for k, v in layer.to_dict().items() if k != "seconds"} for layer in result.report.layers]


@pytest.mark.parametrize(
    "options",
    [
        FAST,
        {"rate": 0.5, "iterations": 5},  # the default quality: targets, measured budgets, gradients
        {"rate": 0.5, "iterations": 5, "storage_dtype": "float16", "skip": ["blocks.1", "*.proj"]},
        {"method": "sparsegpt", "rate": 0.5, "pattern": "2:4", "activation_memory": 1e-9},
        {"method": "gptq", "values": "int3", "targets": True},
    ],
    ids=["fast", "best", "skip", "sparsegpt", "gptq"],
)
@pytest.mark.parametrize("block", [2, 3])
def test_the_same_call_goes_on_and_ends_with_the_same_bits(tiny_vit, pictures, tmp_path, options, block):
    whole, model, folder = copy.deepcopy(tiny_vit), copy.deepcopy(tiny_vit), tmp_path / "kept"
    expected = ov.compress(whole, pictures, **options)
    with pytest.raises(Stopped):
        ov.compress(model, pictures, resume=folder, progress=stop_in(3 if "skip" in options else block), **options)
    done = Journal(folder).done
    assert done > 0
    times = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    model, steps = copy.deepcopy(tiny_vit), list[Step]()
    result = ov.compress(model, pictures, resume=folder, progress=steps.append, **options)
    assert equal(model, whole)
    assert timeless(result) == timeless(expected)
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}.items() >= times.items()
    assert not [step for step in steps if step.activity == "decomposing" and step.block <= done]
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    again = copy.deepcopy(tiny_vit)
    assert timeless(ov.compress(again, pictures, resume=folder, **options)) == timeless(expected)
    assert equal(again, whole)  # from its blocks alone
    assert result.report.seconds["decomposing"] > 0


def test_a_language_model_with_padding_goes_on(language_directory, tmp_path):
    dense, _ = ov.load_model(language_directory)
    ids = torch.randint(0, 300, (8, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::2, 16:] = 0
    data = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(4), mask.split(4), strict=True)]
    whole, model = copy.deepcopy(dense), copy.deepcopy(dense)
    ov.compress(whole, data, rate=0.5, iterations=5)
    with pytest.raises(Stopped):
        ov.compress(model, data, rate=0.5, iterations=5, resume=tmp_path / "kept", progress=stop_in(2))
    model = copy.deepcopy(dense)
    ov.compress(model, data, rate=0.5, iterations=5, resume=tmp_path / "kept")
    assert equal(model, whole)
    others = [data[0], data[1] | {"attention_mask": mask[4:].flip(0)}]
    with pytest.raises(ConfigError, match="SHA-256 of the calibration data differs"):
        ov.compress(copy.deepcopy(dense), others, rate=0.5, iterations=5, resume=tmp_path / "kept")


@pytest.fixture
def begun(tiny_vit, pictures, tmp_path) -> Path:
    """What is kept of a run whose first block is finished."""
    with pytest.raises(Stopped):
        ov.compress(copy.deepcopy(tiny_vit), pictures, resume=tmp_path / "kept", progress=stop_in(2), **FAST)
    return tmp_path / "kept"


def test_another_run_is_refused_and_the_message_says_what_differs(tiny_vit, pictures, begun):
    before = {file.name: file.read_bytes() for file in begun.iterdir()}
    changes = [
        ({"rate": 0.4}, pictures, "stopped after block 1 of 3, and that differs: `rate` was 0.5 and is 0.4"),
        ({"skip": ["*.proj"]}, pictures, r"`skip` was not given and is \*\.proj"),
        ({}, pictures[:1], "SHA-256 of the calibration data differs"),
        ({}, [pictures[0], 2 * pictures[1]], "SHA-256 of the calibration data differs"),
    ]
    for options, data, message in changes:
        with pytest.raises(ConfigError, match=message):
            ov.compress(copy.deepcopy(tiny_vit), data, resume=begun, **FAST | options)
    tiny_vit.head.bias.data += 1
    with pytest.raises(ConfigError, match="SHA-256 of the dense weights differs"):
        ov.compress(tiny_vit, pictures, resume=begun, **FAST)
    assert {file.name: file.read_bytes() for file in begun.iterdir()} == before


def test_where_no_block_is_finished_another_run_begins(tiny_vit, pictures, tmp_path):
    with pytest.raises(Stopped):
        ov.compress(copy.deepcopy(tiny_vit), pictures, resume=tmp_path / "kept", progress=stop_in(1), **FAST)
    ov.compress(tiny_vit, pictures, resume=tmp_path / "kept", **FAST | {"rate": 0.4})
    assert Journal(tmp_path / "kept").done == 3


def test_another_machine_may_go_on_and_it_is_said(tiny_vit, pictures, begun, caplog):
    state = json.loads((begun / "run.json").read_text())
    state["machine"]["threads"] = 99
    (begun / "run.json").write_text(json.dumps(state))
    ov.compress(tiny_vit, pictures, resume=begun, **FAST)
    assert "`threads` was 99 and is" in caplog.text


def test_one_run_at_a_time_and_only_a_folder_of_ours(tiny_vit, pictures, begun):
    with checkpoint.locked(begun), pytest.raises(CheckpointError, match="another run"):
        ov.compress(copy.deepcopy(tiny_vit), pictures, resume=begun, **FAST)
    (begun / ".0001.safetensors.cut").write_bytes(b"cut")  # as a killed run leaves it
    (begun / ".nfs0001").touch()  # which is not ours
    (begun / ".ipynb_checkpoints").mkdir()
    Journal(begun)
    there = [".ipynb_checkpoints", ".nfs0001", "0000.safetensors", "run.json"]
    assert sorted(file.name for file in begun.iterdir()) == there
    (begun / ".ipynb_checkpoints").rmdir()
    (begun / ".nfs0001").unlink()
    for content, message in (("{", "is damaged"), ("[]", "no run is in it")):
        (begun / "run.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            Journal(begun)
    (begun / "run.json").unlink()
    (begun / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex, which is not ours"):
        Journal(begun)
    (begun / "thesis.tex").unlink()
    (begun / ".status.json.cut").write_bytes(b"cut")
    Journal(begun)  # which was about to be removed
    assert not begun.exists()


def test_a_damaged_block_is_named_and_done_again_once_it_is_deleted(tiny_vit, pictures, begun):
    file = begun / "0000.safetensors"
    content = file.read_bytes()
    whole = load(content)
    file.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=r"0000\.safetensors is damaged .*: delete it"):
        ov.compress(copy.deepcopy(tiny_vit), pictures, resume=begun, **FAST)
    file.unlink()
    ov.compress(tiny_vit, pictures, resume=begun, **FAST)
    again = load(file.read_bytes())
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_disk_that_is_full_in_the_middle_costs_the_block_in_work(tiny_vit, pictures, tmp_path):
    whole = copy.deepcopy(tiny_vit)
    ov.compress(whole, pictures, resume=tmp_path / "elsewhere", rate=0.5, iterations=5)
    first, second, _, state = (file.stat().st_size for file in sorted((tmp_path / "elsewhere").iterdir()))
    folder = tmp_path / "small" / "kept"
    with small_disk(tmp_path / "small", 2 * state + first + second // 2) as make_room:
        with pytest.raises(CheckpointError, match=f"{folder} cannot be written: the disk is full: free some space"):
            ov.compress(copy.deepcopy(tiny_vit), pictures, resume=folder, rate=0.5, iterations=5)
        assert not list(folder.glob(".*"))
        before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
        if os.path.ismount(tmp_path / "small"):  # else even the first file may be too large
            assert list(before) == ["0000.safetensors"]
        make_room()
        ov.compress(tiny_vit, pictures, resume=folder, rate=0.5, iterations=5)
        assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}.items() >= before.items()
    assert equal(tiny_vit, whole)


def test_a_disk_that_is_full_of_activations_loses_nothing(tiny_vit, pictures, begun, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "small"))
    with small_disk(tmp_path / "small", 8192) as make_room:
        with pytest.raises(DataError, match=f"TMPDIR {tmp_path / 'small'} has no room"):
            ov.compress(copy.deepcopy(tiny_vit), pictures, resume=begun, activation_memory=1e-9, **FAST)
        assert Journal(begun).done == 1
        make_room()
        ov.compress(tiny_vit, pictures, resume=begun, activation_memory=1e-9, **FAST)
    assert Journal(begun).done == 3


def test_what_stops_a_run_says_how_to_go_on(begun):
    journal = Journal(begun)
    assert journal.how_to_go_on == "the same command goes on after block 1 of 3"
    for error, said in ((Stopped, [journal.how_to_go_on]), (DataError, [journal.how_to_go_on]), (ConfigError, [])):
        with pytest.raises(error) as raised, saying(lambda: "outside"), saying(lambda: journal.how_to_go_on):
            raise error
        assert notes(raised.value) == said
    with pytest.raises(CheckpointError) as raised, saying(lambda: journal.how_to_go_on):
        raise CheckpointError("it is complete; what comes after it failed") from ConfigError()
    assert not notes(raised.value)
