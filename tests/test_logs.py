"""Where messages go: ours to the console, everybody's to the log file, and nothing twice."""

import io
import logging
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from oats_vision import logs


@pytest.fixture
def console(monkeypatch) -> Console:
    """What the user sees; the process's logging is as before afterwards."""
    root, ours = logging.root, logging.getLogger("oats_vision")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root.manager, "loggerDict", {**root.manager.loggerDict})
    levels = root.level, ours.level
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "0")
    yield Console(file=io.StringIO(), width=40, force_terminal=False)
    for handler in root.handlers:
        handler.close()
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(False)
    logging.setLoggerClass(logging.Logger)


def shown(console: Console) -> str:
    return console.file.getvalue()


def messages() -> None:
    """What a run's modules and libraries say; the library's logger is made as theirs are, with a handler."""
    library = logging.getLogger("some_library_that_comes_late")
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    library.warning("Retrying in 1s")
    library.info("downloaded")
    logging.getLogger("oats_vision.data").warning("3 pictures of [red]/a/very/long/folder/name/indeed[/red] skipped")
    logging.getLogger("oats_vision.data").debug("details")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("xFormers is not available", stacklevel=1)


def test_the_console_shows_ours_alone_and_the_file_all(console, tmp_path, capsys):
    file = tmp_path / "logs" / "run.log"
    logs.set_up(log_file=file, console=console)
    assert logs.written() is None
    messages()
    assert shown(console) == "warning: 3 pictures of [red]/a/very/long/folder/name/indeed[/red] skipped\n"
    assert logs.written() == file
    text = file.read_text()
    assert text.splitlines()[0].startswith("oats_vision ")
    for part in (
        "Retrying in 1s",
        "downloaded",
        "3 pictures",
        "DEBUG oats_vision.data: details",
        "UserWarning: xFormers",
    ):
        assert text.count(part) == 1
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_verbose_shows_all_once(console, tmp_path, capsys):
    logs.set_up(log_file=tmp_path / "run.log", console=console)
    logs.set_up(verbose=True, console=console)  # as a command's option does later
    messages()
    for part in ("Retrying in 1s", "downloaded", "3 pictures", "details", "UserWarning: xFormers"):
        assert shown(console).count(part) == 1
    assert capsys.readouterr().err == ""
    assert "Retrying" in (tmp_path / "run.log").read_text()


def test_a_message_stands_above_a_progress_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    handler = logs._Shown(console)
    with Progress(console=console) as bar:
        bar.add_task("working", total=2)
        handler.emit(logging.makeLogRecord({"levelno": logging.WARNING, "levelname": "WARNING", "msg": "a word"}))
    lines = [line for line in shown(console).splitlines() if "a word" in line]
    assert len(lines) == 1
    assert "working" not in lines[0]


@pytest.mark.parametrize("place", ["/proc/nowhere/run.log", "a-file/run.log", "/dev/full"])
def test_a_log_that_cannot_be_written_disturbs_nobody(console, tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("")
    if place == "/dev/full":  # accepts being opened, and never a byte
        place = "full.log"
        Path(place).symlink_to("/dev/full")
    logs.set_up(log_file=tmp_path / place, console=console)
    messages()
    messages()
    assert shown(console).count("3 pictures") == 2
    assert capsys.readouterr().err == ""


def test_the_last_ten_files_are_kept(console, tmp_path):
    for number in range(14):
        (tmp_path / f"20260101-0000{number:02}-compress-1.log").write_text("old")
    logs.set_up(log_file=tmp_path / "20260102-000000-compress-1.log", console=console)
    messages()
    kept = sorted(file.name for file in tmp_path.iterdir())
    assert len(kept) == logs.KEPT
    assert kept[-1] == "20260102-000000-compress-1.log"
    assert kept[0] == "20260101-000005-compress-1.log"


def test_the_folder_of_logs_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert logs.new_file("compress").parent == tmp_path / "oats_vision" / "logs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert logs.folder() == tmp_path / "home" / ".cache" / "oats_vision" / "logs"
