"""Runs on several ranks, each a process of its own: what they come to, and how they end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import on_ranks
from oats_vision import ranks

SCRIPT = Path(on_ranks.__file__)
QUICK = ("vit fast", "vit best", "llama fast", "llama best", "demo fast", "top1", "features", "perplexity")
OTHERS = ("vit wanda", "vit dsnot", "vit median", "vit owl", "mixtral fast", "mixtral best", "demo best", "gaps")


def _start(world: int, *words: object) -> list[subprocess.Popen[str]]:
    """The processes as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def _finish(processes: list[subprocess.Popen[str]], seconds: float = 600) -> list[tuple[int, str, str]]:
    """Status, output and errors of each."""
    try:
        outputs = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def _same(world: int, names: tuple[str, ...], out: Path) -> None:
    """See that scenarios come to the same as on one rank."""
    found = _finish(_start(world, SCRIPT, out, *names))
    assert [status for status, _, _ in found] == [0] * world, found
    several = json.loads(out.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in names:
            assert json.loads(json.dumps(on_ranks.SCENARIOS[name]())) == several[name], name
    finally:
        torch.set_num_threads(threads)


def test_one_rank_is_all():
    assert (ranks.count(), ranks.rank(), ranks.is_main(), ranks.speaks()) == (1, 0, True, True)
    assert list(ranks.mine("abc")) == [(0, "a"), (1, "b"), (2, "c")]
    assert ranks.in_order({2: "c", 0: "a"}) == ["a", "c"]
    assert ranks.everyones(3) == [3]
    assert list(ranks.each(str, [1, 2], [1.0, 1.0])) == ["1", "2"]
    assert ranks.on_main(lambda: 5) == 5


@pytest.mark.slow
def test_two_ranks_come_to_the_same(tmp_path):
    _same(2, QUICK, tmp_path / "found.json")


@pytest.mark.slow
def test_two_ranks_come_to_the_same_by_other_ways(tmp_path):
    _same(2, OTHERS, tmp_path / "found.json")


@pytest.mark.slow
def test_a_layer_that_one_rank_cannot_decompose_stays_dense_on_all(tmp_path):
    _same(2, ("stays dense", "stays dense, with targets"), tmp_path / "found.json")


@pytest.mark.slow
def test_what_was_stopped_goes_on_with_the_same_bits(tmp_path):
    _same(2, ("goes on", "vit best"), tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["goes on"] == found["vit best"] | {"blocks": 1}


@pytest.mark.slow
def test_recovery_is_refused_from_python_too(tmp_path):
    found = _finish(_start(2, SCRIPT, tmp_path / "found.json", "recovers"))
    assert [status for status, _, _ in found] == [1, 1]
    assert re.fullmatch(r"error: recover runs in one process.*\n", found[0][2])


@pytest.mark.slow
def test_four_ranks_come_to_the_same_though_some_have_no_batch(tmp_path):
    _same(4, ("vit fast", "vit best", "llama fast", "llama best", "demo best", "mixtral best"), tmp_path / "found.json")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_that_is_killed_ends_the_run_within_a_minute(tmp_path, victim):
    processes = _start(3, SCRIPT, tmp_path / "found.json", "for ever")
    assert processes[0].stdout is not None
    assert processes[0].stdout.readline() == "begun\n"
    processes[victim].kill()
    start = time.monotonic()
    found = _finish(processes, 60)
    assert time.monotonic() - start < 60
    assert [status for status, _, _ in found] == [-signal.SIGKILL if rank == victim else 1 for rank in range(3)]
    errors = [errors for rank, (_, _, errors) in enumerate(found) if rank != victim]
    # PyTorch has words of its own where the first rank, which keeps the store, is gone
    assert re.search(rf"^error: rank {victim} of 3: it .*gone", errors[0], re.MULTILINE)
    assert "error: rank" not in errors[1]


@pytest.mark.slow
def test_an_error_on_one_rank_ends_all_and_is_said_once(tmp_path):
    found = _finish(_start(3, SCRIPT, tmp_path / "found.json", "broken"))
    assert [status for status, _, _ in found] == [1, 1, 1]
    said = r"error: rank 1 of 3: the outputs of blocks\.0 .* It begins in the output of blocks\.0\.norm1 .*\n"
    assert re.fullmatch(said, found[0][2])
    assert [errors for _, _, errors in found[1:]] == ["", ""]


@pytest.mark.slow
def test_an_error_on_all_ranks_is_said_once(tmp_path):
    command = ["-m", "oats_vision", "compress", "--out", tmp_path / "out", "--recover", 5, "--samples", 64]
    found = _finish(_start(2, *command))
    assert [status for status, _, _ in found] == [1, 1]
    assert re.fullmatch(r"error: --recover runs in one process.*\n", found[0][2])
    assert found[1][2] == ""


@pytest.mark.slow
def test_what_all_ranks_refuse_is_no_one_ranks_error_whichever_is_first(tmp_path):
    found = _finish(_start(2, SCRIPT, tmp_path / "found.json", "refused"))
    assert [status for status, _, _ in found] == [1, 1]
    assert re.fullmatch(r"error: this runs in one process.*\n", found[0][2])
    assert found[1][2] == ""


@pytest.mark.slow
def test_the_command_under_torchrun_writes_what_it_writes_alone(tmp_path, model_directory):
    words = ["compress", "--model", model_directory, "--quality", "fast", "--samples", 48, "--batch-size", 8]
    words += ["--no-report", "--data", "demo", "--eval-data", "demo", "--eval-samples", 64]
    shared = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True, "check": False}
    for name, start in {
        "one": [],
        "two": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2],
    }.items():
        low_memory = "--low-memory" if name == "two" else "--no-low-memory"  # neither changes anything
        command = [sys.executable, *start, "-m", "oats_vision", *words, low_memory, "--out", tmp_path / name]
        done = subprocess.run([*map(str, command)], **shared)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written:") == 1
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    for same in ("cost", "parameters", "samples", "settings", "skipped_pictures"):
        assert one[same] == two[same], same
