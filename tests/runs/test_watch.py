"""What a run says of itself while it goes on, and what `inspect` shows of it."""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from oats_vision import logs
from oats_vision.compression import methods
from oats_vision.compression.methods import LinearMethod, register
from oats_vision.compression.record import LayerReport
from oats_vision.core.oats import Factors
from oats_vision.nn.sparse_low_rank import LayerSpec, PartSpec
from oats_vision.progress import Step
from oats_vision.runs.watch import watching
from oats_vision.under_way import LAYERS, RUN_LOG, STATUS, folder_of, is_held, lock_of, read_layers, under_way
from tests.helpers.command import run

QUICK = ["--data", "demo", "--samples", 20, "--iterations", 3, "--no-report"]
FIELDS = {
    "time": str,
    "block": str,
    "name": str,
    "error": float,
    "errors": dict,
    "output_error": float,
    "output_errors": dict,
    "rank": int,
    "nonzeros": int,
    "density": float,
    "bits": float,
    "iterations": dict,
    "seconds": float,
    "tokens": int,
    "peak_memory": int,
}


@pytest.fixture
def opposite():
    """A method that is worse than zeros on each second linear of an MLP."""

    @register
    class Opposite(LinearMethod):
        name = "opposite"
        citation = "None, 2026"

        def decompose(self, weight, statistic, budget, settings):
            if weight.shape == (48, 192):
                return Factors.sparse(weight.float(), -weight.float(), torch.ones(192))
            return methods.find("magnitude").decompose(weight, statistic, budget, settings)

    yield
    methods.unregister("opposite")


def test_a_run_leaves_its_log_and_a_line_for_each_linear(model_directory, tmp_path):
    board, out = tmp_path / "board", tmp_path / "out"
    done = run("compress", "--model", model_directory, *QUICK, "--tensorboard", board, "--out", out)
    assert done.returncode == 0, done.stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["board", "out"]
    names = [layer["name"] for layer in json.loads((out / "config.json").read_text())["layers"]]
    lines = [json.loads(line) for line in (out / LAYERS).read_text().splitlines()]
    assert [line["name"] for line in lines] == names
    assert [line["block"] for line in lines] == ["blocks.0"] * 4 + ["blocks.1"] * 4
    for line in lines:
        assert {name: type(value) for name, value in line.items()} == FIELDS
        assert 0 < line["density"] < 1
        assert line["bits"] == pytest.approx(16 * line["density"] + 1, abs=0.2)  # and a bit for each position
    log = (out / RUN_LOG).read_text()
    for said in ("oats_vision 0", "compress --model", "machine: cpu", "versions: Python", "linears:", names[-1]):
        assert said in log, said
    shown = [line for line in done.stdout.splitlines() if line]
    assert log.splitlines()[-1].endswith(shown[-1])
    assert sum(name.split(".")[-1] in log for name in names) == len(names)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board)).Reload()
    assert [event.step for event in events.Scalars("layers/error")] == list(range(8))
    assert [event.value for event in events.Scalars("layers/rank")] == [line["rank"] for line in lines]


def test_the_log_goes_on_through_a_recovery(model_directory, tmp_path):
    board, out = tmp_path / "board", tmp_path / "out"
    options = ["--recover", 2, "--quality", "fast", "--tensorboard", board, "--out", out]
    done = run("compress", "--model", model_directory, *QUICK, *options)
    assert done.returncode == 0, done.stderr
    log = (out / RUN_LOG).read_text()
    assert log.count("oats_vision 0") == 1
    assert log.index("machine: cpu") < log.index("holds the one-shot model") < log.index("Recovered by 2 steps")
    assert len(read_layers(out / LAYERS)) == 8
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "recovery/blocks.0" in EventAccumulator(str(board)).Reload().Tags()["scalars"]


def test_what_was_done_otherwise_is_said_everywhere(model_directory, opposite, tmp_path):
    out = tmp_path / "out"
    options = [*QUICK[:-1], "--method", "opposite", "--out", out]
    done = run("compress", "--model", model_directory, *options)
    assert done.returncode == 0, done.stderr
    line = "blocks.1.mlp.fc2 stays dense: it came out with a relative error of 2, no better than zeros."
    report = json.loads((out / "report.json").read_text())
    assert [one["name"] for one in report["exceptions"]] == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    shown = run("inspect", out).stdout
    for text in (done.stdout, shown, (out / "report.html").read_text(), (out / RUN_LOG).read_text()):
        assert line in " ".join(text.replace("│", " ").split()), text
        assert "and not the 0.5 asked for" in " ".join(text.replace("│", " ").split())
    assert "2 exceptions:" in done.stdout
    assert "warning: blocks.1.mlp.fc2 stays dense" in done.stderr
    stays = [line for line in read_layers(out / LAYERS) if line.get("dense")]
    assert [line["name"] for line in stays] == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    again = run("eval", "top1", out, "--data", "demo", "--samples", 8, "--no-dense")
    assert again.returncode == 0, again.stderr


def test_a_missing_tensorboard_is_said_before_anything_is_done(model_directory, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = ["--tensorboard", tmp_path / "board", "--out", tmp_path / "out"]
    done = run("compress", "--model", model_directory, *QUICK, *options)
    assert done.returncode == 1
    assert "--tensorboard needs a package that is not there: pip install tensorboard" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_inspect_shows_a_run_that_goes_on_and_one_that_was_killed(model_directory, tmp_path):
    out = tmp_path / "out"
    command = [*QUICK[:4], "--iterations", 10_000, "--tolerance", 0, "--quality", "plain", "--no-eval", "--out", out]
    with subprocess.Popen(
        [sys.executable, "-m", "oats_vision", "compress", "--model", model_directory, *map(str, command)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as process:
        end = time.monotonic() + 120
        while not read_layers(folder_of(out) / LAYERS) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        running = run("inspect", out)
        as_json = json.loads(run("inspect", out, "--json").stdout)
        page = run("inspect", out, "--html", tmp_path / "page.html")
        os.kill(process.pid, signal.SIGKILL)
    assert running.stdout.startswith(f"{out}: running, block 1 of 2, decomposing")
    assert "blocks.0.attn.qkv" in running.stdout
    assert (as_json["state"], as_json["block"], as_json["blocks"]) == ("running", 1, 2)
    assert as_json["layers"][0]["name"] == "blocks.0.attn.qkv"
    assert as_json["elapsed"] > 0
    assert "is not written yet" in page.stderr
    stopped = run("inspect", out)
    assert stopped.stdout.startswith(f"{out}: stopped at block 1 of 2, ")
    assert json.loads(run("inspect", out, "--json").stdout)["state"] == "stopped"
    done = run("compress", "--model", model_directory, *QUICK, "--no-eval", "--out", out)
    assert done.returncode == 0, done.stderr
    assert not folder_of(out).exists()
    assert len(read_layers(out / LAYERS)) == 8
    assert "compressed layers" in run("inspect", out).stdout


def test_a_run_that_fails_says_so_in_its_log_and_leaves_none_without_a_layer(tmp_path):
    out = tmp_path / "out"

    def fail(layers: str) -> None:
        with watching(out) as watch:
            watch.step(Step(0.1, 1, 3, "statistics"))
            assert (folder_of(out) / RUN_LOG).is_file()
            if layers:
                (folder_of(out) / LAYERS).write_text(layers)
            raise ZeroDivisionError("by two")

    with pytest.raises(ZeroDivisionError):
        fail("")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        fail('{"name": "a"}\n')
    assert (folder_of(out) / RUN_LOG).read_text().splitlines()[-1].endswith("stopped by ZeroDivisionError: by two")
    found = under_way(out)
    assert found is not None
    assert (found.running, found.status["block"], found.layers) == (False, 1, [{"name": "a"}])
    assert len(found.warnings) == 0
    with watching(out, resumed=True):
        logging.getLogger("oats_vision.here").warning("it is warm")
        assert under_way(out).warnings == ["it is warm"]
        assert len(read_layers(folder_of(out) / LAYERS)) == 1
    with watching(out):
        assert not (folder_of(out) / LAYERS).exists()


def test_of_a_run_that_measures_its_checkpoint_the_files_are_read_there(tmp_path):
    out = tmp_path / "out"
    with watching(out) as watch:
        watch.step(Step(1.0, 3, 3, "done"))
        (folder_of(out) / LAYERS).write_text('{"name": "a"}\n')
        out.mkdir()
        watch.move(out)
        found = under_way(out)
        assert (found.status["activity"], found.layers, found.log) == ("measuring", [{"name": "a"}], out / RUN_LOG)
        with watch.aside():
            assert not list(out.iterdir())
            assert under_way(out).layers == [{"name": "a"}]
        assert under_way(out).layers == [{"name": "a"}]
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["layers.jsonl", "out", "run.log"]
    with pytest.raises(SystemExit), watching(out):
        sys.exit(143)


def test_a_run_that_is_stopped_while_it_measures_is_shown_and_takes_up_its_own_files_alone(tmp_path):
    out = tmp_path / "out"

    def stop() -> None:
        with watching(out) as watch:
            (folder_of(out) / LAYERS).write_text('{"name": "a"}\n')
            (folder_of(out) / "run.json").write_text("{}")  # as a journal leaves it
            out.mkdir()
            watch.move(out)
            sys.exit(143)

    with pytest.raises(SystemExit):
        stop()
    found = under_way(out)
    assert found is not None
    assert (found.running, found.status["written"], found.layers) == (False, True, [{"name": "a"}])
    with watching(out, resumed=True):  # what is there is another run's
        assert not (folder_of(out) / LAYERS).exists()
    with watching(out, resumed=True, written=True):
        assert read_layers(folder_of(out) / LAYERS) == [{"name": "a"}]
        assert not (out / LAYERS).exists()


def test_a_run_that_goes_on_adds_to_the_files_and_counts_on(tmp_path):
    out, board = tmp_path / "out", tmp_path / "board"

    def layer(name: str, error: float) -> LayerReport:
        spec = LayerSpec(8, 4, False, (PartSpec("fc", 4, 1, 8),))
        return LayerReport(name, spec, {"fc": error}, {}, {"fc": 3}, 0.1, 64)

    def some(resumed: bool, *layers: LayerReport) -> None:
        with watching(out, board, resumed=resumed) as watch:
            for one in layers:
                watch.layer_done("blocks.0", one)
            sys.exit(137)

    for resumed, layers in (
        (False, [layer("a", 0.1), layer("b", 0.2)]),
        (True, [layer("b", 0.3), layer("c", 0.4)]),
    ):
        with pytest.raises(SystemExit):
            some(resumed, *layers)
        with (folder_of(out) / LAYERS).open("a") as stream:
            stream.write('{"name": "b", "er')  # as a kill or a full disk leaves it
    lines = read_layers(folder_of(out) / LAYERS)
    assert [(line["name"], line["error"], line["output_error"]) for line in lines] == [
        ("a", 0.1, None),
        ("b", 0.3, None),
        ("c", 0.4, None),
    ]
    assert (folder_of(out) / RUN_LOG).read_text().count("stopped by SIGKILL") == 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board), size_guidance={"scalars": 0}).Reload().Scalars("layers/density")
    assert {event.step for event in events} == {0, 1, 2}


def test_of_two_lines_of_a_linear_the_later_counts_and_half_a_line_does_not(tmp_path):
    file = tmp_path / LAYERS
    file.write_text('{"name": "a", "error": 1}\n{"name": "b"}\n[3]\n{"name": "a", "error": 2}\n{"name": "c", "er')
    assert read_layers(file) == [{"name": "b"}, {"name": "a", "error": 2}]
    assert read_layers(tmp_path / "none") == []


def test_a_damaged_status_is_that_of_a_stopped_run_at_most(tmp_path):
    folder = folder_of(tmp_path / "out")
    folder.mkdir()
    for text in ("", "[]", "null", '{"block": "x"}', "\xff"):
        (folder / STATUS).write_text(text)
        found = under_way(tmp_path / "out")
        assert found is None or (not found.running and found.elapsed == 0)
        assert run("inspect", tmp_path / "out").returncode in (0, 1)


def test_a_log_may_be_moved_and_is_made_again_when_its_folder_goes(tmp_path):
    ours, first, second = logging.getLogger("oats_vision.here"), tmp_path / "a" / RUN_LOG, tmp_path / "b" / RUN_LOG
    before = logging.getLogger("oats_vision").level, list(logging.root.handlers)
    with logs.also_in(first) as move:
        ours.info("one")
        second.parent.mkdir()
        move(second)
        ours.info("two")
        assert [line.rpartition(" ")[2] for line in second.read_text().splitlines()[1:]] == ["one", "two"]
        assert not first.exists()
        second.unlink()
        second.parent.rmdir()
        ours.info("three")
        assert [line.rpartition(" ")[2] for line in second.read_text().splitlines()[1:]] == ["three"]
    ours.info("four")
    assert "four" not in second.read_text()
    assert (logging.getLogger("oats_vision").level, list(logging.root.handlers)) == before


def test_a_lock_is_held_as_long_as_its_owner_lives(tmp_path):
    from oats_vision.checkpoint.place import locked

    assert not is_held(tmp_path / "out")
    with locked(tmp_path / "out"):
        assert is_held(tmp_path / "out")
        assert is_held(Path(os.path.relpath(tmp_path / "out")))
    assert not is_held(tmp_path / "out")


def test_a_run_may_begin_while_another_process_looks_whether_one_is_there(tmp_path, monkeypatch):
    from oats_vision.checkpoint import place

    looking = os.open(lock_of(tmp_path / "out"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(place.time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
    with place.locked(tmp_path / "out"):
        assert is_held(tmp_path / "out")
    os.close(looking)
