"""A block on all batches, stopped before each of its linears, so that one can be replaced before the next is reached.

Nothing is computed twice: each batch's forward pass waits, at the call of the linear, in a greenlet of its own, and
goes on once the linear is replaced. What waits takes memory; batches beyond a limit are run again from the start.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Any

from greenlet import greenlet
from torch import Tensor, nn

from oats_vision import ranks

Start = Callable[[int], Tensor]  # the block's output for a batch, by its number


class Run:
    """One batch on its way through a block.

    waits_at: the linear before which it is stopped; "" before the start and after the end. inputs: of that linear.
    stream: the residual stream that the linear's output is added to, where the block's norm was watched.
    answer: what the linear returns, if the caller has computed it. output: of the block, at the end.
    """

    def __init__(self, walk: "Walk", batch: int, kept: bool) -> None:
        self.walk, self.batch, self.kept = walk, batch, kept
        self.begin()

    def begin(self) -> None:
        """To the start."""
        self.waits_at = ""
        self.inputs: Tensor | None = None
        self.stream: Tensor | None = None
        self.answer: Tensor | None = None
        self.output: Tensor | None = None
        self._pass: greenlet | None = None

    def go_to(self, linear: str) -> bool:
        """Go on until the run waits at a linear ("": to the end of the block); whether it came there."""
        while not (self.waits_at == linear and (linear or self.output is not None)):
            if self.output is not None:
                return False
            self._go_on()
        return True

    def _go_on(self) -> None:
        """To the next linear, or to the end."""
        if self._pass is None:
            self._pass = greenlet(lambda: self.walk.start(self.batch))
        self.walk.running, self.waits_at = self, ""
        output = self._pass.switch()
        if self._pass.dead:
            self.output, self.inputs, self.stream = output, None, None

    def stop(self, linear: str, inputs: Tensor) -> Tensor | None:
        """Wait at a linear; called in the forward pass. Returns the answer that was left meanwhile."""
        assert self._pass is not None
        assert self._pass.parent is not None
        self.waits_at, self.inputs, self.answer = linear, inputs, None
        self._pass.parent.switch()
        answer, self.answer, self.inputs = self.answer, None, None
        return answer

    def release(self) -> None:
        """Give its memory back, unless it is kept waiting: it is run from the start when it is wanted again."""
        if not self.kept:
            self.close()
            self.begin()

    def close(self) -> None:
        """End the forward pass where it is."""
        if self._pass is not None and not self._pass.dead:
            self._pass.throw()


class Walk:
    """All batches on their way through a block; a context manager, in which the block's linears stop them.

    Args:
        block: its linears may be replaced on the way.
        linears: before which to stop, by name in the block.
        start: runs the block on a batch.
        batches: how many there are.
        waiting: bytes that each batch takes while it waits; memory: that there are for all of them.
        norm: in the block, whose inputs are the residual stream of what comes after it, if there is one.
    """

    def __init__(
        self,
        block: nn.Module,
        linears: Sequence[str],
        start: Start,
        waiting: Sequence[int],
        memory: float,
        norm: str = "",
    ) -> None:
        self.block, self.start, self.norm = block, start, norm
        self.linears = {name: block.get_submodule(name) for name in linears}
        self.runs: list[Run] = []
        for batch, size in enumerate(waiting):
            memory -= size
            self.runs.append(Run(self, batch, kept=memory >= 0 or not batch))
        self.running: Run | None = None

    def __enter__(self) -> "Walk":
        for name, linear in self.linears.items():
            linear.forward = _Stopping(self, name, linear)
        norm = dict(self.block.named_modules()).get(self.norm) if self.norm else None
        self._hook = norm.register_forward_pre_hook(self._note_stream) if norm is not None else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for run in self.runs:
            run.close()
        for linear in self.linears.values():
            del linear.forward
        if self._hook is not None:
            self._hook.remove()
        # runs refer to the walk, and with it would keep the block's weights in memory
        self.runs, self.running, self.linears = [], None, {}

    def _note_stream(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert self.running is not None
        self.running.stream = args[0].detach()

    def stops(self) -> Iterator[str]:
        """The linears in the order in which batches come to them, on any rank; all are waited for before the next."""
        order, passed = list(self.linears), set[str]()
        while True:
            for run in self.runs:
                while run.kept and (not run.waits_at or run.waits_at in passed) and run.output is None:
                    run._go_on()
            own = [run.waits_at for run in self.runs if run.kept and run.output is None]
            waited_for = list(chain.from_iterable(ranks.everyones(own)))
            rest = waited_for or [linear for linear in order if linear not in passed][:1]  # of batches that do not wait
            if not rest:
                return
            linear = min(rest, key=order.index)
            passed.add(linear)
            yield linear

    def at(self, linear: str) -> Iterator[Run]:
        """The runs that come to a linear, each stopped before it; the others are left where they are."""
        for run in self.runs:
            if run.kept and run.waits_at != linear:
                continue
            if run.go_to(linear):
                yield run
            run.release()

    def outputs(self) -> Iterator[tuple[int, Tensor]]:
        """Run all batches to the end: their numbers and the block's outputs."""
        for run in self.runs:
            run.go_to("")
            assert run.output is not None
            yield run.batch, run.output
            run.begin()


@dataclass(frozen=True)
class _Stopping:
    """In the place of a linear's forward: stops the run, and then asks what is in the linear's place by now."""

    walk: Walk
    name: str
    linear: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        run = self.walk.running
        assert run is not None
        answer = run.stop(self.name, x)
        if answer is not None:
            return answer
        module = self.walk.block.get_submodule(self.name)
        result: Tensor = nn.Linear.forward(self.linear, x) if module is self.linear else module(x)  # type: ignore[arg-type]
        return result
