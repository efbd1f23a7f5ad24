"""Whether all processes of a run are alive: each says so through a common store, and sees when another one is not."""

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EVERY = 0.5  # seconds between two looks
SILENCE = 40.0  # seconds after which a process on another machine is taken for dead


@dataclass(frozen=True)
class Trouble:
    """Why a run cannot go on.

    rank: of the process that it comes from. what: in words. kind: `error`, which that process raised; `refused`, which
    all of them raise; `stopped`, by a signal that it could catch; `lost`, without a word.
    """

    rank: int
    what: str
    kind: str


class Heartbeat(threading.Thread):
    """Beats for one rank, and listens to the others.

    Once there is trouble anywhere, `trouble` says what, and the main thread is sent SIGUSR1, in case it is computing.

    Args:
        store: of torch.distributed; used by this thread alone. rank: of `world`.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.store, self.rank, self.world = store, rank, world
        self.trouble: Trouble | None = None
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._heard = dict.fromkeys(range(world), (b"", time.monotonic()))
        store.set(f"place/{rank}", json.dumps([socket.gethostname(), os.getpid()]))
        places = [json.loads(store.get(f"place/{other}")) for other in range(world)]
        # processes of this machine are looked for among its processes
        self.here = {r: pid for r, (host, pid) in enumerate(places) if host == socket.gethostname()}
        self.machines = len({host for host, _ in places})

    def run(self) -> None:
        beats = 0
        while not self._ended.wait(EVERY):
            beats += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beats))
                self.look()
            except RuntimeError:  # of torch.distributed, where nobody answers
                with self._lock:
                    self.trouble = Trouble(0, "it is gone, or the store that torchrun keeps for all ranks is", "lost")
            if self.trouble and not self._ended.is_set():
                os.kill(os.getpid(), signal.SIGUSR1)
                return

    def look(self) -> None:
        """See whether there is trouble."""
        with self._lock:
            if self.trouble is None and self.store.check(["trouble"]):
                self.trouble = Trouble(**json.loads(self.store.get("trouble")))
            for other in range(self.world):
                if self.trouble is None and self._lost(other):
                    what = "it ended without a word: killed, out of memory, or its machine is gone"
                    self._report(Trouble(other, what, "lost"))

    def _lost(self, other: int) -> bool:
        """Whether another rank is gone, and has not said goodbye."""
        if other == self.rank:
            return False
        if other in self.here:
            gone = not _alive(self.here[other])
        elif self.rank and other:
            return False  # the first rank listens to all, and all to it
        else:
            key, (last, since) = f"beat/{other}", self._heard[other]
            beat = self.store.get(key) if self.store.check([key]) else b""
            if beat != last:
                self._heard[other] = (beat, time.monotonic())
            gone = beat == last and time.monotonic() - since > SILENCE
        return gone and not self.store.check([f"goodbye/{other}"]) and not self.store.check(["trouble"])

    def report(self, what: str, kind: str) -> None:
        """Tell the others of trouble of this rank's own; the first one to do so is heard."""
        with self._lock, suppress(RuntimeError):
            self._report(Trouble(self.rank, what, kind))

    def _report(self, trouble: Trouble) -> None:
        said = self.store.compare_set("trouble", "", json.dumps(asdict(trouble)))
        self.trouble = Trouble(**json.loads(said))

    def stop(self) -> None:
        """Say goodbye."""
        self._ended.set()
        with self._lock, suppress(RuntimeError):
            self.store.set(f"goodbye/{self.rank}", "")

    def wait_for(self, rank: int, seconds: float) -> None:
        """Until a rank has ended, so that what it has to say is said before this process ends, but not for ever."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and (rank not in self.here or _alive(self.here[rank])):
            time.sleep(0.1)


def _alive(process: int) -> bool:
    """Whether a process of this machine is there, and not only its number that nobody has asked for."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "ZX"
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return False
    except (OSError, IndexError):
        pass
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
