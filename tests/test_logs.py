"""Where messages go: ours to the console, everybody's to the log file, and nothing twice."""

import io
import logging
import os
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from oats_vision import logs
from oats_vision.errors import ConfigError


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


def start(console: Console, file: Path) -> None:
    """As a command starts, with its log in that file."""
    logs.start("compress", console)
    logging.root.handlers[1] = logs._LogFile(file)


def messages() -> None:
    """What a run's modules and libraries say; the library's logger is made as theirs are, with a handler."""
    library = logging.getLogger("some_library_that_comes_late")
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    library.warning("Retrying in 1s")
    library.info("downloaded")
    logging.getLogger("oats_vision.data.pictures").warning(
        "3 pictures of [red]/a/very/long/folder/name/indeed[/red] skipped"
    )
    logging.getLogger("oats_vision.data.pictures").debug("details")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("xFormers is not available", stacklevel=1)


def test_the_console_shows_ours_alone_and_the_file_all(console, tmp_path, capsys):
    file = tmp_path / "logs" / "run.log"
    start(console, file)
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
        "DEBUG oats_vision.data.pictures: details",
        "UserWarning: xFormers",
    ):
        assert text.count(part) == 1
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_verbose_shows_all_once(console, tmp_path, capsys):
    start(console, tmp_path / "run.log")
    logs.set_up(verbose=True)  # as a command's option does later
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
        handler.emit(
            logging.makeLogRecord(
                {"name": "oats_vision", "levelno": logging.WARNING, "levelname": "WARNING", "msg": "a word"}
            )
        )
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
    start(console, tmp_path / place)
    messages()
    messages()
    assert shown(console).count("3 pictures") == 2
    assert capsys.readouterr().err == ""


def test_names_of_files_may_be_no_unicode(console, tmp_path, monkeypatch):
    """Python has bytes that are no UTF-8 as lone surrogates, which no encoding takes."""
    monkeypatch.setattr("sys.argv", ["oats-vision", "compress", "--data", "Fotos_M\udcfcller"])
    start(console, tmp_path / "run.log")
    messages()
    logging.getLogger("oats_vision.data").warning("%s is skipped", "M\udcfcller.png")
    written = (tmp_path / "run.log").read_text()
    assert "--data Fotos_M\\udcfcller" in written
    assert "M\\udcfcller.png is skipped" in written


def test_the_last_ten_files_are_kept_in_the_users_cache(console, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "oats_vision" / "logs"
    folder.mkdir(parents=True)
    for number in range(14):
        (folder / f"20260101-0000{number:02}-compress-{2**22 + 9}.log").write_text("old")
    logs.start("eval-top1", console)
    messages()
    kept = sorted(file.name for file in folder.iterdir())
    assert len(kept) == logs.KEPT
    assert kept[0] == f"20260101-000005-compress-{2**22 + 9}.log"
    assert logs.written() == folder / kept[-1]
    assert "-eval-top1-" in kept[-1]


def test_a_file_of_the_users_own_takes_all_and_no_other_is_removed(console, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(20):
        (tmp_path / f"{number}.log").write_text("the user's")
    logs.start("compress", console)
    logs.set_up(log_file=tmp_path / "mine.log")
    messages()
    assert logs.written() == tmp_path / "mine.log"
    assert "Retrying" in (tmp_path / "mine.log").read_text()
    assert len(list(tmp_path.glob("*.log"))) == 21
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match=r"`log_file` .*/none/mine.log cannot be written: No such file or directory"):
        logs.set_up(log_file=tmp_path / "none" / "mine.log")


def test_the_folder_of_logs_is_below_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert logs.folder() == tmp_path / "home" / ".cache" / "oats_vision" / "logs"


def test_the_log_of_a_run_in_progress_is_kept(tmp_path, monkeypatch, console):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    logs.folder().mkdir(parents=True)
    running = logs.folder() / f"20200101-000000-compress-{os.getppid()}.log"
    running.touch()
    for day in range(10, 22):
        (logs.folder() / f"202001{day}-000000-compress-{2**22 + 9}.log").touch()
    logs.start("compress", console)
    messages()
    assert running.exists()
    assert len(list(logs.folder().glob("*.log"))) == logs.KEPT + 1
