"""Signals at awkward moments, in real processes: one line, the shells' status, temporary files removed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# what a command is doing when the signal comes: it prints `ready` first, and `cleaned` at its end
MOMENTS = {
    "waits": "time.sleep(60)",
    "waits for a server": "import socket; s = socket.create_server(('127.0.0.1', 0)); s.accept()",
    "is in another's code, which makes another error of it": (
        "try:\n        time.sleep(60)\n    except BaseException:\n        raise ImportError('numpy is broken')"
    ),
    "waits for a thread": "import threading; t = threading.Thread(target=time.sleep, args=(60,), daemon=True)\n"
    "    t.start()\n"
    "    t.join()",
    "reads pictures in workers": (
        "from torch.utils.data import DataLoader\n"
        "    class Slow(list):\n"
        "        def __getitem__(self, i):\n"
        "            time.sleep(0.2)\n"
        "            return i\n"
        "    for batch in DataLoader(Slow(range(10**4)), num_workers=2): print('batch', flush=True)"
    ),
    "waits for a worker that fails": (  # as the thread does that hands pictures over, now and then
        "import os\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        print('batch', flush=True)\n"
        "        time.sleep(0.5)\n"
        "        sys.excepthook(EOFError, EOFError(), None)\n"
        "        os._exit(0)\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        os.waitpid(child, 0)"
    ),
}


def start(code: str, tmp_path: Path, **options: object) -> subprocess.Popen[str]:
    """A process in a group of its own, as a shell starts one, that runs a command."""
    script = (
        "import pathlib, sys, time\n"
        "from oats_vision.cli.interrupt import guarded\n"
        f"temporary = pathlib.Path({str(tmp_path / 'temporary')!r})\n"
        "def work():\n"
        f"    print('ready', flush=True)\n"
        f"    {code}\n"
        "def command():\n"
        "    temporary.write_text('')\n"
        "    try:\n"
        "        work()\n"
        "    finally:\n"
        "        temporary.unlink()\n"
        "guarded(command)\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, text=True, start_new_session=True, cwd=Path(__file__).parent, **pipes, **options)


@pytest.mark.parametrize("code", MOMENTS.values(), ids=MOMENTS.keys())
def test_the_keys_end_a_command_in_one_line(tmp_path, code):
    process = start(code, tmp_path)
    assert process.stdout.readline() == "ready\n"
    if "batch" in code:
        assert process.stdout.readline() == "batch\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "stopped by SIGINT\n")
    assert not (tmp_path / "temporary").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_a_command_too(tmp_path, number):
    hangs_up = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731  # if the tests run under nohup
    process = start(MOMENTS["waits"], tmp_path, preexec_fn=hangs_up)
    process.stdout.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, f"stopped by {number.name}\n")
    assert not (tmp_path / "temporary").exists()


def test_the_line_says_how_to_go_on(tmp_path):
    code = (
        "from oats_vision.errors import saying\n"
        "    with saying(lambda: 'the same command goes on'):\n"
        "        print('begun', flush=True)\n"
        "        time.sleep(60)"
    )
    process = start(code, tmp_path)
    for _ in ("ready", "begun"):
        process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "stopped by SIGTERM: the same command goes on\n")


def test_a_run_under_nohup_outlives_its_terminal(tmp_path):
    process = start(
        "time.sleep(0.5); print('done')",
        tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "done\n", "")


def test_signals_count_from_before_the_imports_of_the_command_line(tmp_path):
    """A module that is imported on the way is where the signal comes."""
    (tmp_path / "typer.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "oats_vision", "compress"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        cwd=tmp_path,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "stopped by SIGINT\n")
