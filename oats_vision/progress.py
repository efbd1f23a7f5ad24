"""How far a compression is: what is being done, where the time went, and how long the rest will take."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Stage = Literal["reading", "gradients", "budgets", "statistics", "decomposing", "applying"]
Unit = Literal["pictures", "sequences"]
STAGES: tuple[Stage, ...] = ("statistics", "decomposing", "applying")  # of each block
# shares of a block's time before any block was timed
_GUESS: dict[Stage, float] = {"statistics": 0.5, "decomposing": 0.4, "applying": 0.1}


@dataclass(frozen=True)
class Estimate:
    """Seconds that a whole run takes, and of these the reading of what it is calibrated on, and sharing out budgets."""

    total: float
    reading: float
    blocks: int
    unit: Unit
    budgets: float = 0.0

    def __str__(self) -> str:
        block = duration((self.total - self.reading - self.budgets) / self.blocks)
        budgets = f", budgets {duration(self.budgets)}" if self.budgets else ""
        return (
            f"about {duration(self.total)} in all: {count(self.blocks, 'block')} of {block}, "
            f"{reading(self.unit)} {duration(self.reading)}{budgets}"
        )


@dataclass(frozen=True)
class Step:
    """Where a run stands.

    done: share of its time, in [0, 1]. block: number from 1; 0 while pictures are read. activity: in words. error:
    relative, of the last layer. detail: the linear that is decomposed, or how many pictures were read. left: seconds,
    once they are known. estimate: of the whole run, as soon as `left` is known.
    """

    done: float
    block: int
    blocks: int
    activity: str
    error: float | None = None
    detail: str = ""
    left: float | None = None
    estimate: Estimate | None = None


class Clock:
    """A stopwatch over the stages of a run, which tells each step, and how long the rest takes by the blocks so far.

    The time between two calls of `at` belongs to the stage that the first of them names. The first block, in which
    threads and memory are new, no longer counts once there is another.

    Args:
        work: weights to decompose, of each block.
        unit: that calibration data are counted in.
        progress: called with each step.
        now: the time in seconds. start: when the run began, if not now.
    """

    def __init__(
        self,
        work: Sequence[int],
        unit: Unit,
        progress: Callable[[Step], None] = lambda step: None,
        now: Callable[[], float] = time.perf_counter,
        start: float | None = None,
    ) -> None:
        self.work, self.unit, self.progress, self.now = work, unit, progress, now
        self._before: dict[Stage, float] = {"reading": 0.0}  # the first block
        self._taken: list[dict[Stage, float]] = []  # of each block begun
        self._shares: dict[Stage, float] = {}  # done of each stage of this block
        self._stage: Stage = "reading"
        self._last = now() if start is None else start
        self._done = 0.0
        self._error: float | None = None  # of the last layer

    @property
    def seconds(self) -> dict[str, float]:
        """Where the time went so far, by stage, and the total."""
        taken: dict[str, float] = {stage: seconds for stage, seconds in self._before.items()}
        taken |= {stage: sum(block.get(stage, 0.0) for block in self._taken) for stage in STAGES}
        return taken | {"total": sum(taken.values())}

    def read(self, samples: int, expected: int | None) -> None:
        """So many pictures or sequences were read."""
        self._charge()
        self._stage = "reading"
        detail = "" if not samples else f"{samples:,}" if expected is None else f"{samples:,} of {expected:,}"
        self.progress(Step(0.0, 0, len(self.work), reading(self.unit), detail=detail))

    def gradients(self, share: float) -> None:
        """So much of the work is done to see what errors do to the model's output."""
        self._first("gradients", "what errors do to the output", share)

    def sharing(self, share: float) -> None:
        """So much of the work is done to share out the budget over the layers."""
        self._first("budgets", "sharing out the budget", share)

    def _first(self, stage: Stage, words: str, share: float) -> None:
        """Something that comes before the first block."""
        self._charge()
        self._stage = stage
        self.progress(Step(0.0, 0, len(self.work), words, detail=f"{share:.0%}"))

    def at(self, stage: Stage, block: int, share: float, detail: str = "", error: float | None = None) -> None:
        """A block, by its number from 0, has this share of a stage's work behind it."""
        self._charge()
        self._stage = stage
        self._error = self._error if error is None else error
        while len(self._taken) <= block:
            self._taken.append({})
            self._shares = {}
        self._shares[stage] = share
        left = self._left()
        if left is None:
            done = (block + sum(self._shares.get(name, 0.0) * part for name, part in _GUESS.items())) / len(self.work)
        else:
            done = 1 - left / max(self.seconds["total"] + left, 1e-9)
        self._done = max(self._done, done)
        blocks, estimate = len(self.work), None
        if left is not None:
            reading = self._before["reading"]
            others = sum(self._before.values()) - reading
            estimate = Estimate(self.seconds["total"] + left, reading, blocks, self.unit, others)
        self.progress(Step(self._done, block + 1, blocks, stage, self._error, detail, left, estimate))

    def of_block(self, block: int) -> dict[str, float]:
        """Where the time of a block went so far, by its number from 0 and by stage."""
        self._charge()
        return {stage: seconds for stage, seconds in self._taken[block].items()}

    def went_on(self, block: int, seconds: Mapping[str, float]) -> None:
        """A block was finished before the run was stopped, and took so long then; calls of `at` add to that."""
        self.at("applying", block, 0.0)
        for stage in STAGES:
            if stage in seconds:
                self._taken[block][stage] = self._taken[block].get(stage, 0.0) + seconds[stage]

    def finish(self) -> None:
        """All is done."""
        self._charge()
        self.progress(Step(1.0, len(self.work), len(self.work), "done", self._error))

    def _charge(self) -> None:
        """Add the time since the last call to the stage that was going on."""
        now = self.now()
        if self._stage not in STAGES:
            self._before[self._stage] = self._before.get(self._stage, 0.0) + now - self._last
        else:
            block = self._taken[-1]
            block[self._stage] = block.get(self._stage, 0.0) + now - self._last
        self._last = now

    def _left(self) -> float | None:
        """Seconds that the rest takes; None as long as no block is done that had weights to decompose."""
        current = len(self._taken) - 1
        known = [i for i in range(1, current)] or list(range(current))
        work = sum(self.work[i] for i in known)
        if not work:
            return None
        mean = {stage: sum(self._taken[i].get(stage, 0.0) for i in known) / len(known) for stage in STAGES}

        def expected(stage: Stage, block: int) -> float:
            if stage == "decomposing":
                return mean[stage] * len(known) * self.work[block] / work
            return 0.0 if stage == "applying" and block == len(self.work) - 1 else mean[stage]

        rest = sum(expected(stage, current) * (1 - self._shares.get(stage, 0.0)) for stage in STAGES)
        return rest + sum(expected(stage, i) for stage in STAGES for i in range(current + 1, len(self.work)))


def reading(unit: Unit) -> str:
    """The first stage in words."""
    return "reading pictures" if unit == "pictures" else "reading text"


def shares(seconds: Mapping[str, float]) -> str:
    """Where the time of a run went, in words; earlier releases had other stages."""
    parts = ", ".join(f"{name} {duration(taken)}" for name, taken in seconds.items() if name != "total")
    return f"{duration(seconds.get('total', 0.0))}: {parts}" if parts else duration(seconds.get("total", 0.0))


def duration(seconds: float) -> str:
    """As people say it: 0.35 s, 3.2 s, 41 s, 12 min, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds >= 0.005 else "0 s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def count(number: int, what: str) -> str:
    """A number and its noun: 1 block, 24 blocks."""
    return f"{number:,} {what}{'s' * (number != 1)}"
