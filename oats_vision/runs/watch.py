"""What a run says of itself while it is under way: a log, a line of JSON for each linear, and where it stands."""

import json
import logging
import os
import platform
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from oats_vision import logs
from oats_vision.compression.record import LayerException, LayerReport, RecoveryReport
from oats_vision.files import replacing
from oats_vision.machine import machine, machine_line, peak_memory
from oats_vision.progress import Step, duration
from oats_vision.runs.board import Board
from oats_vision.under_way import LAYERS, RUN_LOG, STATUS, folder_of, read_layers

log = logging.getLogger(__name__)

LIBRARIES = ("torch", "torchvision", "timm", "transformers", "safetensors", "numpy")
EVERY = 1.0  # seconds, between two notes of where a run stands


class Watch:
    """Writes what a run says of itself. A disk that is full is said once, and no reason to stop.

    Args:
        folder: to write to; made if it is missing.
        log_file: moves the log to a folder.
        board: for TensorBoard, if one is wanted.
    """

    def __init__(self, folder: Path, log_file: Callable[[Path], None], board: Board | None = None) -> None:
        self.folder, self.home, self.board = folder, folder, board
        self._move_log = log_file
        self._storage, self._device = torch.float32, torch.device("cpu")
        self._status: dict[str, Any] = {"started": time.time()}
        self._last = 0.0
        self._failed = False
        self._numbers = {layer["name"]: number for number, layer in enumerate(read_layers(folder / LAYERS))}
        self._note()

    def begin(self, model: str, storage: torch.dtype, device: torch.device) -> None:
        """The run's model is loaded, and what it will be stored in is known."""
        self._storage, self._device = storage, device
        self._status["model"] = model
        libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        log.info("machine: %s; %s", machine_line(machine(device)), platform.platform())
        log.info("versions: Python %s, %s", platform.python_version(), libraries)

    def telling(self, progress: Callable[[Step], None]) -> Callable[[Step], None]:
        """The same, which also notes where the run stands."""

        def tell(step: Step) -> None:
            progress(step)
            self.step(step)

        return tell

    def step(self, step: Step) -> None:
        """Note where the run stands, once in a second at most."""
        now = time.time()
        if now - self._last < EVERY and step.block == self._status.get("block"):
            return
        self._last = now
        fields = ("done", "block", "blocks", "activity", "detail", "error", "left")
        self._note(**{name: getattr(step, name) for name in fields})

    def _note(self, **fields: Any) -> None:
        self._status |= {"time": time.time()} | fields
        with self._writing(), replacing(self.home / STATUS) as temporary:
            temporary.write_text(json.dumps(self._status) + "\n")

    def layer_done(self, block: str, layer: LayerReport | LayerException) -> None:
        """Add a line for a linear that is done, or stays dense."""
        number = self._numbers.setdefault(layer.name, len(self._numbers))  # the same where it is done again
        line: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "block": block, "name": layer.name}
        line |= self._figures(layer) if isinstance(layer, LayerReport) else asdict(layer)
        line["peak_memory"] = peak_memory(self._device)
        with self._writing(), (self.folder / LAYERS).open("a+b") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                stream.write(b"" if stream.read() == b"\n" else b"\n")  # the last line was cut short
            stream.write(json.dumps(line).encode() + b"\n")
        if isinstance(layer, LayerReport):
            log.info(
                "%s: error %.4f, rank %d, density %.3f, %.2f bits a weight, %s",
                *(line[name] for name in ("name", "error", "rank", "density", "bits")),
                duration(layer.seconds),
            )
            if self.board:
                with self._writing():
                    self.board.layer(number, line)

    def recovered(self, report: RecoveryReport | None) -> None:
        """A recovery is done."""
        if self.board and report:
            with self._writing():
                self.board.recovery(report)

    def move(self, folder: Path) -> None:
        """Go on in another folder, with what was written so far."""
        with self._writing():
            for name in (RUN_LOG, LAYERS):
                if (self.folder / name).is_file():
                    if name == RUN_LOG:
                        self._move_log(folder / name)
                    else:
                        shutil.move(self.folder / name, folder / name)
        self.folder = folder
        self._note(written=folder != self.home, activity="measuring", detail="", left=None)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep out of a folder that is replaced by another one meanwhile."""
        before = self.folder
        self.move(self.home)
        try:
            yield
        finally:
            self.move(before)

    def _figures(self, layer: LayerReport) -> dict[str, Any]:
        spec = layer.spec
        return {
            "error": layer.error,
            "errors": layer.errors,
            "output_error": max(layer.output_errors.values(), default=None),
            "output_errors": layer.output_errors,
            "rank": max(part.rank for part in spec.parts),
            "nonzeros": spec.nonzeros,
            "density": spec.parameters / spec.dense_parameters,
            "bits": 8 * spec.stored_bytes(self._storage.itemsize) / spec.dense_parameters,
            "iterations": layer.iterations,
            "seconds": layer.seconds,
            "tokens": layer.tokens,
        }

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.home.mkdir(exist_ok=True)
            yield
        except OSError as problem:
            if not self._failed:
                log.warning("%s: what the run says of itself is not complete: %s", self.folder, problem)
            self._failed = True


@contextmanager
def watching(
    out: Path, tensorboard: Path | None = None, *, resumed: bool = False, written: bool = False
) -> Iterator[Watch]:
    """Write what a run says of itself, beside its output; of a run that fails before its first linear nothing stays.

    Args:
        out: the run's output, whose lock it holds.
        tensorboard: a folder for TensorBoard.
        resumed: whether the run goes on where it was stopped, and adds to what is there. written: whether the
            checkpoint in `out` is this run's own.

    Raises:
        ConfigError: TensorBoard is missing.
    """
    board = Board(tensorboard) if tensorboard else None
    folder = folder_of(out)
    for name in (RUN_LOG, LAYERS):
        if not resumed:
            (folder / name).unlink(missing_ok=True)
        elif written and (out / name).is_file() and not (folder / name).exists():  # it was stopped while it measured
            shutil.move(out / name, folder / name)
    with ExitStack() as end:
        if board:
            end.callback(board.close)
        watch = Watch(folder, end.enter_context(logs.also_in(folder / RUN_LOG)), board)
        try:
            yield watch
        except BaseException as problem:
            if not isinstance(problem, GeneratorExit):
                log.error("stopped by %s", _why(problem), extra=logs.SHOWN)
            if (folder / LAYERS).is_file() or (watch.folder != folder and _goes_on(folder)):
                raise
            if watch.folder == folder:
                (folder / RUN_LOG).unlink(missing_ok=True)
            _leave(folder)
            raise
        _leave(folder)


def _why(problem: BaseException) -> str:
    """What ends a run, in a line; signals come as exits with their number above 128."""
    if isinstance(problem, SystemExit) and isinstance(problem.code, int) and problem.code > 128:
        return signal.Signals(problem.code - 128).name
    return " ".join(f"{type(problem).__name__}: {problem}".split())


def _goes_on(folder: Path) -> bool:
    """Whether something is kept for the same command to go on, besides what a run says of itself."""
    return folder.is_dir() and any(entry.name != STATUS for entry in folder.iterdir())


def _leave(folder: Path) -> None:
    """Remove what says that a run is under way, and the folder if nothing else is in it."""
    with suppress(OSError):
        (folder / STATUS).unlink(missing_ok=True)
        folder.rmdir()
