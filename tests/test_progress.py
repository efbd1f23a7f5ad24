import io

import nbformat
import pytest
from nbclient import NotebookClient
from rich.console import Console

from oats_vision.display import Display
from oats_vision.progress import Clock, Step, duration, shares

BLOCK = {"statistics": 6.0, "decomposing": 3.0, "applying": 1.0}  # seconds


def run(blocks: int, reading: float, seconds=lambda block: BLOCK, work=None) -> tuple[list[Step], list[float], Clock]:
    """The steps of a run, and the time of each, where each stage of a block takes the seconds that are given."""
    time, steps, times = 0.0, [], []

    def note(step: Step) -> None:
        steps.append(step)
        times.append(time)

    clock = Clock(work or [1000] * blocks, "pictures", note, now=lambda: time)
    for samples in (50, 100):
        time += reading / 2
        clock.read(samples, 100)
    for block in range(blocks):
        for stage, taken in seconds(block).items():
            if stage == "applying" and block + 1 == blocks:
                break
            for tenth in range(11):
                clock.at(stage, block, tenth / 10)
                time += taken / 10 if tenth < 10 else 0.0
    clock.finish()
    return steps, times, clock


@pytest.mark.parametrize("reading", [0.0, 20.0, 300.0])
@pytest.mark.parametrize("blocks", [2, 3, 24])
def test_the_share_done_follows_the_time_of_equal_blocks(blocks, reading):
    steps, times, clock = run(blocks, reading)
    done = [step.done for step in steps]
    assert done == sorted(done)
    assert done[-1] == 1.0
    whole = times[-1]
    assert clock.seconds["total"] == pytest.approx(whole)
    for step, now in zip(steps, times, strict=True):
        if step.block > 1:
            assert step.done == pytest.approx(now / whole, abs=1e-6)
        if step.left is not None:
            assert step.left == pytest.approx(whole - now, abs=1e-6)
            assert step.estimate.total == pytest.approx(whole)
    assert {step.block for step in steps if step.left is None and step.activity != "done"} == {0, 1}


def test_a_slow_first_block_and_a_slow_last_one_are_seen_through():
    def seconds(block):
        scale = {0: 3.0, 11: 1.3}.get(block, 1.0)
        return {stage: scale * taken for stage, taken in BLOCK.items()}

    steps, times, _ = run(12, 10.0, seconds)
    for step, now in zip(steps, times, strict=True):
        if 2 < step.block < 12 and step.left is not None:
            assert step.left == pytest.approx(times[-1] - now, rel=0.25)


def test_blocks_of_other_sizes_take_time_by_their_weights():
    work = [1000, 4000, 2000, 2000, 1000]

    def seconds(block):
        return {"statistics": 2.0, "decomposing": work[block] / 100, "applying": 1.0}

    steps, times, _ = run(5, 5.0, seconds, work)
    late = [(step, now) for step, now in zip(steps, times, strict=True) if step.left is not None]
    assert all(step.left == pytest.approx(times[-1] - now, abs=1e-6) for step, now in late)


def test_no_time_is_told_from_a_block_that_was_left_dense():
    steps, _, _ = run(3, 1.0, lambda block: {**BLOCK, "decomposing": 0.0 if block == 0 else 3.0}, [0, 1000, 1000])
    assert {step.block for step in steps if step.left is None} == {0, 1, 2, 3}  # 3 is done
    assert {step.block for step in steps if step.left is not None} == {3}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 s"),
        (0.35, "0.35 s"),
        (3.21, "3.2 s"),
        (41.4, "41 s"),
        (98, "98 s"),
        (700, "12 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations_are_short(seconds, words):
    assert duration(seconds) == words


def test_the_shares_of_the_time_are_shown_whatever_an_older_release_called_them():
    now = {"reading": 3.0, "statistics": 22.0, "decomposing": 12.0, "applying": 4.0, "total": 41.0}
    assert shares(now) == "41 s: reading 3 s, statistics 22 s, decomposing 12 s, applying 4 s"
    before = {"calibration": 29.0, "solver": 12.0, "total": 41.0}
    assert shares(before) == "41 s: calibration 29 s, solver 12 s"
    assert shares({}) == "0 s"


def test_once_the_first_block_is_done_a_line_says_how_long_the_whole_takes():
    console = Console(file=io.StringIO(), width=80)
    with Display(console).compression() as progress:
        for step in run(24, 20.0, lambda block: {stage: 3 * taken for stage, taken in BLOCK.items()})[0]:
            progress(step)
    written = console.file.getvalue().splitlines()
    assert written[0] == "about 12 min in all: 24 blocks of 30 s, reading pictures 20 s"
    assert len(written) == 2 + (written[-1] == "")
    assert "block 24/24" in written[1]


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_fits_its_line_whatever_the_linear_is_called(width, monkeypatch):
    monkeypatch.setattr("oats_vision.display.LOGGED_EVERY", 0)
    console = Console(file=io.StringIO(), width=width)
    name = "block_sparse_moe.experts.127.gate_up_proj"
    with Display(console).compression() as progress:
        progress(Step(0.5, 24, 32, "decomposing", 0.0312, name, 900.0))
    line = console.file.getvalue().splitlines()[0]
    assert len(line) <= width
    for words in ("block 24/32", "50%", "decomposing", "gate_up_proj"[-6:], "error 0.031", "~15 min left"):
        assert words in line


NOTEBOOK = """
from rich.console import Console
from oats_vision.display import Display
from oats_vision.progress import Step
for console in (Console(), Console(quiet=True), None):
    with Display(console).compression() as progress:
        for done in range(101):
            progress(Step(done / 100, done // 4 + 1, 26, "statistics"))
"""


def test_in_a_notebook_a_bar_is_one_output_that_changes():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    NotebookClient(notebook, timeout=120).execute()
    (output,) = notebook.cells[0].outputs
    for kind in ("text/plain", "text/html"):
        assert "block 26/26" in output.data[kind]
        assert "100% statistics" in output.data[kind]
        assert "\x1b" not in output.data[kind]


def test_lines_of_a_plan_are_columns_that_fit_80():
    console = Console(file=io.StringIO(), width=80)
    path = "/a/" + "long" * 30
    Display(console).lines("plan of [x]", {"model": "one two three " * 12, "data": path})
    title, *lines = console.file.getvalue().splitlines()
    assert title == "plan of [x]"
    assert lines[-1].strip() == path or lines[-1].endswith(path)  # whole
    assert all(len(line) < 80 for line in lines if path not in line)
    assert all(line.startswith(("  model  one", "  data   ", "         ")) for line in lines)
    assert not any(line.endswith(" ") for line in lines[:-2])
