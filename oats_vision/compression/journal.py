"""What is done of a run, on disk: one that was stopped goes on from there.

A journal is a folder beside what the run makes. `run.json` says what the run is of and what it has found so far;
`0000.safetensors`, ... hold what became of a block each. Every file is whole, and on the disk, before the run goes on.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oats_vision import ranks
from oats_vision.errors import CheckpointError, ConfigError
from oats_vision.files import replacing, sync, why
from oats_vision.under_way import LAYERS, RUN_LOG, STATUS

log = logging.getLogger(__name__)

STATE = "run.json"
FORMAT, VERSION = "oats_vision run", 1
RECOVERY = "recovery"  # the journal of a run's recovery, in its own
_OWN = ("[0-9]*.safetensors", ".[0-9]*.safetensors.*", f".{STATE}.*", RECOVERY)
_WATCHED = (RUN_LOG, LAYERS, STATUS, f".{STATUS}.*")  # what a run says of itself, in the same folder
_UNFINISHED = tuple(pattern for pattern in (*_OWN, *_WATCHED) if pattern.startswith("."))  # what was being written
_SHOWN = 4  # differences that a message lists


class Block(NamedTuple):
    """A finished block: tensors by name, and all else that is to be known of it, as JSON has it."""

    tensors: dict[str, Tensor]
    figures: dict[str, Any]


class Journal:
    """The folder of a run that may be stopped; it is made once the run has begun.

    With several ranks the main one reads and writes, and the others know what it knows.

    done: how many blocks are finished, from the first on.

    Args:
        folder: whose parent exists. One run at a time may use it, which is for the caller to see to.
        again: what a message tells to do for a fresh start.

    Raises:
        CheckpointError: the folder holds something else, or is damaged.
    """

    def __init__(self, folder: Path, again: str = "delete that folder") -> None:
        self.folder, self.again = folder, again
        self._facts: dict[str, Any] = {}
        self._state, self.done = ranks.on_main(lambda: (state := self._read(), self._finished(state)))

    @property
    def blocks(self) -> int:
        """How many the run has in all; 0 if none has begun."""
        blocks: int = self._state.get("blocks", 0)
        return blocks

    def _finished(self, state: Mapping[str, Any]) -> int:
        """How many blocks of a run are in their files, from the first on."""
        blocks: int = state.get("blocks", 0)
        return next(i for i in range(blocks + 1) if i == blocks or not self._file(i).is_file())

    @property
    def how_to_go_on(self) -> str:
        """What becomes of a run that is stopped now, in words; empty if nothing is kept of it."""
        if self.blocks and self.done == self.blocks:
            return "all blocks are kept, and the same command does the rest"
        return f"the same command goes on after block {self.done} of {self.blocks}" if self.done else ""

    def see(self, facts: Mapping[str, Any]) -> None:
        """See that the run that was stopped here, if there is one, was of these facts; they are noted when it begins.

        Args:
            facts: what decides the result, by the names of arguments or in words, as JSON can hold it.

        Raises:
            ConfigError: it was not; the message says what differs.
        """
        self._facts |= facts
        begun = self._state.get("facts", {})
        differ = [_words(name, begun[name], now) for name, now in facts.items() if begun.get(name, now) != now]
        if differ and not self.done:
            self.restart()  # nothing is lost
        elif differ:
            more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
            raise ConfigError(
                f"{self.folder} holds a run that was stopped after block {self.done} of {self.blocks}, and that "
                f"differs: {'; '.join(differ[:_SHOWN])}{more}. Give the same to go on, or {self.again} to begin again"
            )

    def begin(self, facts: Mapping[str, Any], blocks: int, machine: Mapping[str, Any]) -> None:
        """Note what the run is of, or see that it is the one that was stopped here.

        Args:
            facts: as for `see`. blocks: that the run has. machine: that it is on; another one may go on.

        Raises:
            ConfigError: another one was stopped here.
            CheckpointError: the folder cannot be written.
        """
        self.see({**facts, "version of oats_vision": version("oats_vision")})
        before = self._state.get("machine", machine)
        if differ := [_words(name, before.get(name), now) for name, now in machine.items() if before.get(name) != now]:
            log.warning(
                "%s was begun on another machine (%s): what comes out is as good, and may differ in the last bits",
                self.folder,
                "; ".join(differ),
            )
        if not self.blocks:
            self._state = {"format": FORMAT, "format_version": VERSION} | self._state
            if ranks.is_main():
                with self._writing():
                    self.folder.mkdir(exist_ok=True)
                    sync(self.folder.resolve().parent)
            self.note(facts=self._facts, machine=dict(machine), blocks=blocks)

    def note(self, **found: Any) -> None:
        """Keep something that the run has found, by name, as JSON can hold it.

        Raises:
            CheckpointError: it cannot be written.
        """
        state = self._state | found
        if ranks.is_main():
            with self._writing(), replacing(self.folder / STATE) as temporary:
                temporary.write_text(json.dumps(state, indent=2) + "\n")
        self._state = state

    def noted(self, name: str) -> Any:
        """What was noted under a name; None if nothing was."""
        return self._state.get(name)

    def add(self, index: int, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
        """Keep a finished block.

        Raises:
            CheckpointError: it cannot be written.
        """
        if ranks.is_main():
            stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            with self._writing(), replacing(self._file(index)) as temporary:
                save_file(stored, temporary, metadata={"figures": json.dumps(figures)})
        self.done += index == self.done

    def block(self, index: int) -> Block | None:
        """A finished block.

        Raises:
            CheckpointError: its file is damaged.
        """
        return ranks.on_main(lambda: self._block(index))

    def _block(self, index: int) -> Block | None:
        file = self._file(index)
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as stored:
                figures = json.loads(stored.metadata()["figures"])
                # copies, in memory as aligned as any tensor's: products may depend on that
                return Block({name: stored.get_tensor(name).clone() for name in stored.keys()}, figures)  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as damaged:
            raise CheckpointError(f"{file} is damaged ({damaged}): delete it, and its block is done again") from None

    def remove(self) -> None:
        """Remove the folder, of a run that is finished or that is to begin again."""
        if ranks.is_main():
            (self.folder / STATE).unlink(missing_ok=True)  # first: without it the rest is no run
            self._clear()
        self._state, self.done = {}, 0

    def restart(self) -> None:
        """Begin again, but for what has become of the output."""
        written = self.noted("written")
        self.remove()
        self._state = {"written": written} if written else {}

    @property
    def recovery(self) -> Path:
        """Where the run's recovery keeps its blocks."""
        return self.folder / RECOVERY

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:04}.safetensors"

    def _read(self) -> dict[str, Any]:
        """The state that is there, none if there is no run; what a killed one was writing is removed."""
        file = self.folder / STATE
        try:
            state: Any = json.loads(file.read_text())
        except FileNotFoundError:
            self._tidy()
            return {}
        except OSError as problem:
            raise CheckpointError(f"{file} cannot be read: {why(problem)}") from None
        except (ValueError, RecursionError) as damaged:
            raise CheckpointError(f"{file} is damaged ({damaged}): {self.again} to begin again") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("facts"), dict):
            raise CheckpointError(f"{file} is damaged (no run is in it): {self.again} to begin again")
        if state.get("format_version") != VERSION:
            raise CheckpointError(f"{file} was written by another release: {self.again} to begin again")
        self._remove_unfinished()
        return state

    def _tidy(self) -> None:
        """Remove what a run has left that was killed before it began, or while it removed its folder."""
        if not self.folder.exists():
            return
        ours = {entry for pattern in (*_OWN, *_WATCHED) for entry in self.folder.glob(pattern)}
        if foreign := sorted(entry.name for entry in self.folder.iterdir() if entry not in ours):
            raise CheckpointError(
                f"{self.folder} is where a run keeps what is done, and holds {foreign[0]}, which is not ours: move it"
            )
        self._remove_unfinished()
        self._clear()

    def _remove_unfinished(self) -> None:
        for left in [entry for pattern in _UNFINISHED for entry in self.folder.glob(pattern)]:
            left.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Remove what is kept of blocks, and the folder unless something else is in it."""
        for entry in [entry for pattern in _OWN for entry in self.folder.glob(pattern)]:
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as problem:
            raise CheckpointError(f"{self.folder} cannot be written: {why(problem)}") from problem


def _words(name: str, before: Any, now: Any) -> str:
    """What differs; of digests only that they do."""
    if name.isidentifier():
        return f"`{name}` was {_plain(before)} and is {_plain(now)}"
    return f"{name} was {before} and is {now}" if len(str(now)) < 32 else f"{name} differs"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)
