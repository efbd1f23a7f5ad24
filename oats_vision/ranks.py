"""One run on many processes, by torch.distributed. Each has a rank; with a single process all here is the identity.

`torchrun` starts the processes; within `joined` they share what this module deals out. All ranks call its functions in
the same order. CPU tensors go by gloo, those of GPUs by NCCL.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from oats_vision.errors import ConfigError, OatsVisionError, RankError
from oats_vision.heartbeat import Heartbeat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
FOREVER = timedelta(days=30)  # whether the others are alive is the heartbeat's to say, not how long they take
PATIENCE = 10.0  # seconds for the rank that speaks to say why the run ends
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Group:
    rank: int
    world: int
    heartbeat: Heartbeat
    ending: bool = False  # an error is on its way

    def check(self) -> None:
        """Raises RankError if another rank is in trouble."""
        trouble = self.heartbeat.trouble
        if trouble and not self.ending:
            self.ending = True
            if trouble.kind == "lost" and trouble.rank == 0:
                global _speaker
                _speaker = 1
            # what all refuse is no one rank's error, whichever has said so first
            whose = "" if trouble.kind == "refused" else f"rank {trouble.rank} of {self.world}: "
            raise RankError(f"{whose}{trouble.what}")

    def finish(self, work: Any) -> None:
        """Wait for the others, in such a way that trouble is noticed."""
        pause = 1e-5
        while not work.is_completed():
            self.check()
            time.sleep(pause)
            pause = min(1.5 * pause, 5e-3)
        try:
            work.wait()
        except RuntimeError as problem:  # a connection is lost: why is known soon
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                self.check()
                time.sleep(0.1)
            raise RankError(f"the connection between the ranks is lost: {problem}") from problem


_group: _Group | None = None
_speaker = 0  # the rank that tells the user


def launched() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return all(name in os.environ for name in _ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


def speaks() -> bool:
    """Whether what this process has to say is for the user: all ranks find the same things wrong."""
    return not launched() or int(os.environ["RANK"]) == _speaker


def count() -> int:
    """How many ranks share the work."""
    return _group.world if _group else 1


def rank() -> int:
    """Which of them this process is, from 0."""
    return _group.rank if _group else 0


def beside() -> int:
    """How many of them are on this machine, this process among them, and share its memory."""
    return len(_group.heartbeat.here) if _group else 1


def is_main() -> bool:
    """Whether this is the rank that prints, writes and locks."""
    return rank() == 0


def refuse(what: str) -> None:
    """Raises ConfigError if there are several ranks, for something that cannot be shared."""
    if count() > 1:
        raise _RefusedError(
            f"{what} runs in one process, and torchrun has started {count()}: start it without torchrun"
        )


class _RefusedError(ConfigError):
    """Raised by all ranks alike."""


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Share the work with the other processes of torchrun, if there are any.

    An error on one rank, or its death, ends all: the first rank that is left raises RankError.

    Args:
        device: `auto`, `cpu` or `cuda`: each rank of a machine takes a GPU of its own.

    Raises:
        ConfigError: there are not enough GPUs, or one of them is asked for by its number.
    """
    global _group
    if not launched() or _group is not None:
        yield
        return
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    backend = _backend(device)
    store, number, world = next(rendezvous("env://"))
    dist.init_process_group(
        backend, store=PrefixStore("oats_vision", store), rank=number, world_size=world, timeout=FOREVER
    )
    heartbeat = Heartbeat(PrefixStore("heartbeat", store.clone()), number, world)
    _group = group = _Group(number, world, heartbeat)
    log.info("rank %d of %d, on %d machines, by %s", number, world, heartbeat.machines, backend)
    before = _on_trouble(group)
    heartbeat.start()
    try:
        yield
        everyones(None)  # nobody leaves while others are at work
    except BaseException as problem:
        _end(group, problem)
        raise
    finally:
        group.ending = True
        heartbeat.stop()
        if before is not None:
            signal.signal(signal.SIGUSR1, before)
        _group = None
        if heartbeat.trouble is None:
            dist.destroy_process_group()


def _backend(device: str) -> str:
    """gloo, and NCCL for the GPU that this rank takes."""
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "gloo"
    if device not in ("auto", "cuda"):
        raise ConfigError(f"`device` must be auto, cpu or cuda where torchrun starts several ranks, got {device!r}")
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"there are {torch.cuda.device_count()} GPUs: start as many processes with torchrun, or fewer"
        )
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def _on_trouble(group: _Group) -> Any:
    """Let the heartbeat interrupt what the main thread does; what was there before."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGUSR1, lambda *_: group.check())


def _end(group: _Group, problem: BaseException) -> None:
    """Tell the others why, and give the one that speaks the time to say it."""
    group.ending, heartbeat = True, group.heartbeat
    known, stopped = isinstance(problem, OatsVisionError), not isinstance(problem, Exception)
    if not known:  # torchrun ends all ranks by a signal as soon as one is gone, which may come out as any error
        heartbeat.look()
        if heartbeat.trouble and heartbeat.trouble.kind != "stopped":
            group.ending = False
            group.check()
    if heartbeat.trouble is None:
        what = str(problem) if known else f"{type(problem).__name__}: {problem}"
        what = "it was stopped by a signal" if stopped else what
        kind = "stopped" if stopped else "refused" if isinstance(problem, _RefusedError) else "error"
        heartbeat.report(" ".join(what.split()), kind)
    if not stopped and not speaks():
        heartbeat.wait_for(_speaker, PATIENCE)


def mine(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """Those of the items that are this rank's, and their numbers: they are dealt in turn."""
    return ((number, item) for number, item in enumerate(items) if number % count() == rank())


def on_main(function: Callable[[], T]) -> T:
    """What a function gives on the main rank, on all ranks; the others do not call it."""
    return broadcast(function() if is_main() else None)  # type: ignore[return-value]


def everyones(value: T) -> list[T]:
    """A small value of each rank, in their order."""
    if _group is None:
        return [value]
    return [broadcast(value, source) for source in range(_group.world)]


def in_order(found: Mapping[int, T]) -> list[T]:
    """What all ranks have found, in the order of its numbers."""
    every = {number: value for part in everyones(found) for number, value in part.items()}
    return [every[number] for number in sorted(every)]


def each(function: Callable[[T], R], items: Sequence[T], costs: Sequence[float]) -> Iterator[R]:
    """`function` of each item, called on one rank and given to all; within it that rank shares nothing.

    Args:
        costs: of the items, about, and the same on all ranks: the dearest first, each goes to the rank that has the
            least to do.
    """
    if _group is None:
        yield from map(function, items)
        return
    owners, loads = [0] * len(items), [0.0] * _group.world
    for i in sorted(range(len(items)), key=lambda i: -costs[i]):
        owners[i] = min(range(_group.world), key=loads.__getitem__)
        loads[owners[i]] += costs[i]
    number = _group.rank
    with _alone():
        own = {i: function(item) for i, item in enumerate(items) if owners[i] == number}
    for i, owner in enumerate(owners):
        yield broadcast(own.pop(i, None), owner)  # type: ignore[misc]


@contextmanager
def _alone() -> Iterator[None]:
    """As if there were no other ranks."""
    global _group
    group, _group = _group, None
    try:
        yield
    finally:
        _group = group


def broadcast(value: T, source: int = 0) -> T:
    """What rank `source` has, on all ranks: anything that can be pickled; tensors keep the kind of their device."""
    if _group is None:
        return value
    import torch

    own, tensors, content, sizes = _group.rank == source, list[Any](), b"", torch.zeros(1, dtype=torch.int64)
    if own:
        stream = io.BytesIO()
        _Packer(stream, tensors).dump(value)
        forms = [(tuple(tensor.shape), tensor.dtype, tensor.device.type) for tensor in tensors]
        content = pickle.dumps((stream.getvalue(), forms))
        sizes[0] = len(content)
    _send(sizes, source)
    payload = torch.empty(int(sizes), dtype=torch.uint8)
    if own:
        payload.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    _send(payload, source)
    if not own:
        content, forms = pickle.loads(payload.numpy().tobytes())
        tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in forms]
    for tensor in tensors:
        if tensor.numel():
            _send(tensor.detach().contiguous().view(-1).view(torch.uint8), source)
    return value if own else _Unpacker(io.BytesIO(content), tensors).load()


def combined(tensors: Sequence[Tensor], combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """An elementwise function of what all ranks have, each of which computes a part of it.

    Args:
        tensors: of one shape, on each rank.
        combine: given these of all ranks, flat, (ranks, elements) each, it gives (elements,).
    """
    if _group is None:
        return combine([tensor.reshape(1, -1) for tensor in tensors]).view(tensors[0].shape)
    import torch
    import torch.distributed as dist

    size = -(-tensors[0].numel() // _group.world)
    given = []
    for tensor in tensors:
        out = tensor.new_zeros(_group.world, size)
        out.view(-1)[: tensor.numel()] = tensor.reshape(-1)
        got = torch.empty_like(out)
        _group.finish(dist.all_to_all_single(got, out, async_op=True))
        given.append(got)
    own = combine(given)
    parts = [torch.empty_like(own) for _ in range(_group.world)]
    _group.finish(dist.all_gather(parts, own, async_op=True))
    return torch.cat(parts)[: tensors[0].numel()].view(tensors[0].shape)


def _send(tensor: torch.Tensor, source: int) -> None:
    import torch.distributed as dist

    assert _group is not None
    _group.finish(dist.broadcast(tensor, source, async_op=True))


class _Packer(pickle.Pickler):
    """Leaves tensors out, which are sent as they are."""

    def __init__(self, file: Any, tensors: list[Any]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        import torch

        if type(value) is not torch.Tensor:
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    """Puts them back."""

    def __init__(self, file: Any, tensors: list[Any]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: Any) -> Any:
        return self.tensors[number]
