"""`oats-vision doctor`: what it finds on this machine, and what it says where something is wrong."""

import json
import os
import re
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from huggingface_hub import constants
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from typer.testing import CliRunner

from oats_vision import kernels
from oats_vision.analysis import doctor
from oats_vision.cli.commands import app
from oats_vision.kernels import native


def found(part) -> dict[str, doctor.Check]:
    return {check.name: check for check in part()}


def test_the_command_prints_all_and_as_json(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1" if name == "timm" else doctor.version(name))
    page = CliRunner().invoke(app, ["doctor"])
    assert page.exit_code == 1
    assert "\n   failed  requirements      timm>=" in page.stdout
    assert "-> reinstall oats_vision with its dependencies" in page.stdout
    assert page.stdout.rstrip().endswith(", 1 failed")
    monkeypatch.setattr(doctor, "_version", lambda name: "missing" if name == "scipy" else doctor.version(name))
    monkeypatch.setattr(SpecifierSet, "contains", lambda self, here, **more: bool(Version(here)))  # as in packaging 25
    assert re.fullmatch(r"scipy>=[0-9.]+, here missing", found(doctor._versions)["requirements"].value)
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["failed"] is False
    names = {check["name"] for check in told["checks"]}
    assert {"oats_vision", "Python", "torch", "processor", "threads", "memory", "GPU", "self-test", "speed"} <= names
    assert {"Hugging Face hub", "torch.hub", "temporary files", "extra llm"} <= names
    assert all(check["advice"] for check in told["checks"] if check["status"] != "ok")


def test_kernels_that_are_right_pass_and_wrong_ones_fail(monkeypatch):
    checks = found(doctor._kernels)
    assert checks["compiled"].value.startswith("yes, for ")
    assert checks["instruction set"].value.startswith(native.active())
    assert checks["self-test"].status == "ok"
    assert " x dense at rate 0.5" in checks["speed"].value
    # a tolerance that no sum in float32 meets stands for a kernel that is wrong
    monkeypatch.setitem(doctor.TOLERANCE, doctor.torch.float32, 1e-12)
    wrong = doctor._self_test()
    assert wrong.status == "failed"
    assert "wrong for" in wrong.value
    assert "OATS_VISION_INSTRUCTION_SET=portable" in wrong.advice


def test_kernels_that_give_nan_fail(monkeypatch):
    forward = doctor.SparseLowRankLinear.forward
    monkeypatch.setattr(doctor.SparseLowRankLinear, "forward", lambda layer, x: forward(layer, x) * float("nan"))
    assert doctor._self_test().status == "failed"


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (None, "warning", "no, there was no working compiler at the install"),
        (b"no library", "failed", "yes, but they cannot be loaded"),
    ],
)
def test_missing_and_broken_kernels_are_told_apart(monkeypatch, tmp_path, content, status, words):
    if content:
        (tmp_path / f"_native{EXTENSION_SUFFIXES[0]}").write_bytes(content)
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "oats_vision.kernels._native")
    check = doctor._why_not_compiled()
    assert check.status == status
    assert check.value.startswith(words)
    assert "pip install --force-reinstall" in check.advice


def test_instruction_sets_that_are_forced_are_said(monkeypatch):
    monkeypatch.setenv(native.FORCED, "abacus")
    native.available.cache_clear()
    check = found(doctor._kernels)["instruction set"]
    assert (check.status, check.advice) == ("failed", f"unset {native.FORCED}")
    native.available.cache_clear()
    monkeypatch.setenv(native.FORCED, "portable")
    with native.instruction_set("portable"):
        check = found(doctor._kernels)["instruction set"]
    native.available.cache_clear()
    assert check.status == ("warning" if len(native.instruction_sets()) > 1 else "ok")
    assert check.value == f"portable ({native.FORCED} forces it)"


def test_threads_are_held_against_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(doctor, "_control_group", lambda name: "400000 100000" if name == "cpu.max" else "max")
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 8)
    assert "OMP_NUM_THREADS=4" in found(doctor._machine)["threads"].advice
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    check = found(doctor._machine)["threads"]
    assert check.advice == "unset OMP_NUM_THREADS to use all of 4 cores"


def test_a_containers_memory_is_what_counts(monkeypatch):
    told = {"memory.max": "3000000000", "memory.current": "2000000000"}
    monkeypatch.setattr(doctor, "_control_group", lambda name: told.get(name, ""))
    check = found(doctor._machine)["memory"]
    assert check.value == "1.0 GB free of 3.0 GB"
    assert check.status == "warning"


def test_folders_are_measured_and_need_not_exist(monkeypatch, tmp_path):
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert found(doctor._folders)["Hugging Face hub"].value.startswith(f"{cache}, ")
    (cache / "blobs").mkdir(parents=True)
    with (cache / "blobs" / "weights").open("wb") as file:
        file.truncate(300_000_000)
    (cache / "link").symlink_to(cache / "blobs" / "weights")
    assert found(doctor._folders)["Hugging Face hub"].value.startswith(f"{cache}, 0.3 GB, ")
    assert not list(tmp_path.glob("**/*.log"))
    if Path("/proc").is_dir():
        monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/nowhere")
        assert found(doctor._folders)["Hugging Face hub"].status == "warning"


def test_the_network_is_asked_for_two_seconds_at_most(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    check = found(doctor._network)["Hugging Face hub"]
    assert check.status == "warning"
    assert check.value == "http://127.0.0.1:9 (HF_ENDPOINT) cannot be reached (Connection refused)"
