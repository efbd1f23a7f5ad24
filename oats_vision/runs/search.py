"""`oats-vision compress --max-drop` and `--target-mb`: the rate, or the bits, are found by compressing at several.

A search is a sweep whose next cell depends on the rows: each trial is measured and written down before the next begins,
in a hidden folder beside the output, and a search that was stopped goes on there. Of the checkpoints only the best one
is kept, which becomes the output.
"""

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from oats_vision import checkpoint
from oats_vision.calibration.origin import NotFiniteError
from oats_vision.compression.common import Common, Costs, costs_of, plain
from oats_vision.compression.exceptions import UnusableLayerError
from oats_vision.compression.journal import Journal
from oats_vision.compression.record import record
from oats_vision.compression.settings import CompressionSettings
from oats_vision.data.pictures import Batches
from oats_vision.data.text import Sequences
from oats_vision.display import Display
from oats_vision.errors import CheckpointError, ConfigError, ModelError, one_line, saying
from oats_vision.evaluation.results import LINE
from oats_vision.evaluation.searched import Loss, Searched, Tried
from oats_vision.machine import dtype_of
from oats_vision.progress import Estimate, count
from oats_vision.runs import bracket, losses
from oats_vision.runs.bracket import Bracket, Trial, next_step
from oats_vision.runs.compress import describe
from oats_vision.runs.config import RunConfig
from oats_vision.runs.file_size import FINER, candidates, highest_possible, settings_at, size_of
from oats_vision.runs.finished import FinishedRun
from oats_vision.runs.forecast import Forecast
from oats_vision.runs.grid import cell_name
from oats_vision.runs.kept import kept
from oats_vision.runs.losses import KINDS, Judged
from oats_vision.runs.partial import journal_of, see_same
from oats_vision.runs.run import (
    CalibrationSet,
    PreparedRun,
    after_the_checkpoint,
    compress_and_write,
    measure_stored,
    prepare,
    try_out,
    write_merged,
    written,
)
from oats_vision.runs.search_table import plan_lines, show_headings, show_line, show_trial
from oats_vision.runs.sweep import said_once
from oats_vision.runs.sweep_folder import read_rows, read_state, write_row, write_state

OVERSIZED = 5  # of `FINER` steps in one, where files are larger than was told
COSTS = "costs.json"  # of formats


class Planned(NamedTuple):
    """What a search comes to.

    most: trials. seconds: of all of them.
    """

    most: int
    seconds: float


def search(config: RunConfig, display: Display | None = None) -> FinishedRun:
    """Find the rate, or the bits, that `max_drop` or `target_mb` asks for, and return the model that was made with it.

    Args:
        config: of a run whose rate is not given.

    Raises:
        OatsVisionError: something that was given is wrong, or nothing does what is asked for. Trials that are finished
            are kept then, and a search with another `max_drop` begins with them.
    """
    if not config.searched_for:
        raise ConfigError("`max_drop` or `target_mb` must be given for a search")
    start, display = time.perf_counter(), display or Display()
    with checkpoint.locked(config.out), said_once():
        folder = folder_of(config.out)
        if config.restart:
            shutil.rmtree(folder, ignore_errors=True)
        state = read_state(folder, config, "search")
        trials = sorted(read_rows(folder, Tried), key=lambda one: one.number) if state else []
        if not _is_one_of(trials, config.out):  # it is the search's own where only the measurement is missing
            checkpoint.check_target(config.out, config.overwrite)
        found = _Search.begun(config, display, folder, state, trials)
        with saying(lambda: f"the same command goes on after {count(len(trials), 'trial')}" * bool(trials)):
            best = found.for_a_drop() if config.max_drop else found.for_a_size()
            finished = found.finish(best, start)
    shutil.rmtree(folder, ignore_errors=True)
    return finished


def folder_of(out: Path) -> Path:
    """Where a search keeps its trials until its output is complete."""
    place = out.resolve()
    return place.with_name(f".{place.name}.search")


def dry_search(
    config: RunConfig, display: Display, tell: Callable[[Forecast], None] = lambda planned: None
) -> tuple[Forecast, Estimate, Planned]:
    """What a search would begin with, how long one trial would take, and what all of them come to.

    Args:
        tell: called with what is known before a block is tried, which takes a while.

    Raises:
        OatsVisionError: something that was given is wrong, or nothing reaches the size.
    """
    checkpoint.check_target(config.out, config.overwrite)
    model, prepared = prepare(config, display)
    first, *others = candidates(config, model, prepared) if config.target_mb else [prepared.settings]
    if config.max_drop:
        losses.choose(config.drop_of, model, prepared)
    planned, estimate = try_out(model, prepared, first, display, tell)
    most = 1 + len(others) if config.target_mb else bracket.MOST
    later = estimate.total - (estimate.budgets if first.bits else 0.0)  # formats are measured once
    return planned, estimate, Planned(most, estimate.total + (most - 1) * later)


@dataclass
class _Search:
    """A search that is under way.

    judged: what trials are judged by; None if there is no choice. target: settings that reach the size. common: what
    trials have found that others use again, by the precision that weights are stored in.
    """

    config: RunConfig
    display: Display
    folder: Path
    model: nn.Module
    prepared: PreparedRun
    batches: Batches | Sequences
    judged: Judged | None
    target: list[CompressionSettings]
    trials: list[Tried] = field(default_factory=list)
    common: dict[str | None, Common] = field(default_factory=dict)

    @classmethod
    def begun(
        cls, config: RunConfig, display: Display, folder: Path, state: dict[str, Any] | None, trials: list[Tried]
    ) -> "_Search":
        """Load the model, set the data apart, and ask the dense model about them; or go on where it was stopped."""
        model, prepared = prepare(config, display)
        target = candidates(config, model, prepared) if config.target_mb else []
        name = losses.judged_by(config, model, prepared, len(target))
        held_out = losses.needed(name, config.max_drop or 1.0) if name else None
        if state and held_out is not None:  # as many as for the limit that it began with
            held_out = state.get("held_out") or held_out
        batches = kept(prepared.open(config.seed, held_out))
        display.lines(
            "plan", plan_lines(prepared.forecast(model, batches, (target or [prepared.settings])[0]).lines(), config)
        )
        judged = losses.judged(name, model, prepared, batches.held_out, display) if name else None
        now = {"dense_sha256": prepared.source.dense_sha256, "by": name, "on": judged.samples if judged else 0}
        if state is None:
            others = {"by": now["by"], "on": now["on"], "held_out": held_out}
            write_state(folder, config, prepared.task.unit, prepared.source.dense_sha256, "search", **others)
        elif differ := [key for key, value in now.items() if state.get(key) != value]:
            words = "; ".join(f"{_KEYS[key]} {state.get(key)} there and {now[key]} here" for key in differ)
            raise ConfigError(f"{folder} holds a search that differs: {words}. Remove that folder, or give another out")
        return cls(config, display, folder, model, prepared, batches, judged, target, trials)

    def for_a_drop(self) -> Tried:
        """The trial of the smallest model that stays below the limit."""
        assert self.judged
        limit, scale, options = float(self.config.max_drop or 0), self.config.scale, self.config.compression
        steps = {
            "first": scale.step(self.prepared.settings),
            "lowest": scale.lowest,
            "highest": highest_possible(self.model, options, scale),
        }
        self.show_before(f"{self.judged.kind.words} of less than {limit:g} {self.judged.kind.unit}")
        while (step := next_step(self.judgements, limit, **steps)) is not None:
            tried = self.trial(settings_at(options, scale, step, self.prepared.settings.storage_dtype))
            self.keep(self.below(limit))
            below = tried.loss is not None and tried.loss.high < limit
            show_trial(self.display, tried, tried.failed or ("below the limit" if below else "too much"))
        if best := self.below(limit):
            return best
        least = min(self.trials, key=self.step)
        if least.loss is None:
            raise self.unmeasured(least)
        kind, more = self.judged.kind, ", or more data for a narrower interval" * (least.loss.value < limit)
        raise ConfigError(
            f"`max_drop` {limit:g} is not reached: at {least.settings.size} it is {least.loss} {kind.unit} "
            f"({kind.words}, on {self.judged.samples} {self.judged.of}): give a larger `max_drop`{more}"
        )

    def for_a_size(self) -> Tried:
        """The trial that loses least of those that reach the size."""
        self.show_before(f"at most {self.config.target_mb:g} MB")
        for i in range(len(self.target)):
            # where a method shares out its budget by what it measures, the bytes are known only afterwards
            while not self.fits(tried := self.trial(self.target[i])):
                finer = self.config.scale.finer(FINER)
                smaller: dict[str, Any] = {finer.name: finer.at(finer.step(self.target[i]) + OVERSIZED)}
                self.target[i] = self.target[i].model_copy(update=smaller)
            self.keep(self.least())
            share = f"{(tried.bytes or 0) / 1e6 / float(self.config.target_mb or 1):.1%} of the size"
            show_trial(self.display, tried, tried.failed or share)
        best = self.least()
        if best is None:
            raise self.unmeasured(self.trials[-1])
        return best

    def unmeasured(self, one: Tried) -> ModelError:
        """What ends a search with a trial that could not be measured.

        Where none could, something else may be to blame than their rates: the search begins anew the next time.
        """
        if all(trial.failed for trial in self.trials):
            self.trials.clear()
            shutil.rmtree(self.folder)
        return ModelError(f"{one.failed} (at {one.settings.size})")

    @property
    def judgements(self) -> list[Trial]:
        return [Trial(self.step(one), one.loss.high if one.loss else math.inf) for one in self.trials]

    def step(self, one: Tried) -> int:
        return self.config.scale.step(one.settings)

    def below(self, limit: float) -> Tried | None:
        """The smallest model so far that stays below the limit."""
        scale = self.config.scale
        low = Bracket.of(self.judgements, limit, scale.lowest, scale.highest).low
        return next((one for one in self.trials if self.step(one) == low), None)

    def fits(self, one: Tried) -> bool:
        """Whether a trial's files are as small as was asked for; one without files is not too large."""
        return (one.bytes or 0) <= 1e6 * float(self.config.target_mb or 0)

    def least(self) -> Tried | None:
        """The model so far that loses least, of those that are to be tried and fit; None if none could be measured."""
        tried = [one for one in self.trials if one.settings in self.target and self.fits(one) and not one.failed]
        return min(tried, key=lambda one: one.loss.value if one.loss else one.settings.rate, default=None)

    def show_before(self, what: str) -> None:
        show_headings(self.display, what, self.judged, self.prepared.settings)
        for one in self.trials:
            show_trial(self.display, one, "done before")

    def trial(self, settings: CompressionSettings) -> Tried:
        """What compressing with these settings gives: measured, or as it is written down."""
        known = next((one for one in self.trials if one.settings == settings), None)
        return known or self.done(settings, len(self.trials) + 1)

    def done(self, settings: CompressionSettings, number: int) -> Tried:
        """Make a trial, and write it down."""
        journal = journal_of(self.folder / _name(settings))
        tried = self.compressed(settings, number, journal)
        write_row(self.folder, _name(settings), tried)
        journal.remove()
        self.trials[number - 1 : number] = [tried]
        return tried

    def compressed(self, settings: CompressionSettings, number: int, journal: Journal) -> Tried:
        """Compress a copy of the model, write it to the folder, read it as its users will, and judge it."""
        start, directory = time.perf_counter(), self.folder / _name(settings)
        own = self.config.model_copy(update={"out": directory, "overwrite": True})
        own = self.prepared.task.completed(own)
        see_same(journal, own, settings, self.display)
        common = self.common.setdefault(settings.storage_dtype, Common(costs=self.costs()))
        try:
            finished = compress_and_write(
                copy.deepcopy(self.model),
                own,
                settings,
                self.prepared,
                CalibrationSet(self.batches, None),
                journal,
                self.display,
                common=common,
            )
        except (NotFiniteError, UnusableLayerError) as problem:  # as may be at a high rate
            return Tried(
                number=number, settings=settings, failed=one_line(problem, LINE), seconds=time.perf_counter() - start
            )
        if common.costs:
            checkpoint.write_json(self.folder / COSTS, plain(common.costs))
        loss, failed = self.lost(directory)
        return Tried(
            number=number,
            settings=settings,
            bytes=size_of(directory),
            loss=loss,
            failed=failed,
            seconds=time.perf_counter() - start,
            skipped=finished.skipped,
            weights_sha256=checkpoint.read_config(directory).weights_sha256,
        )

    def lost(self, directory: Path) -> tuple[Loss | None, str | None]:
        """What a trial's checkpoint loses, or why that could not be measured; neither if there is no choice."""
        if self.judged is None:
            return None, None
        compressed = self.load(directory)
        try:
            return self.judged.judge(compressed), None
        except ModelError as problem:  # at a high rate outputs may not be finite
            return None, one_line(problem, LINE)

    def costs(self) -> Costs | None:
        """What formats cost, as the search found before it was stopped; None if that is not known."""
        try:
            return costs_of(json.loads((self.folder / COSTS).read_text()))
        except (OSError, ValueError, KeyError):  # not there, or of another version's formats
            return None

    def load(self, directory: Path) -> nn.Module:
        return checkpoint.load(
            directory,
            device=self.prepared.device,
            dtype=dtype_of(self.config.dtype),
            trust_remote_code=self.config.trust_remote_code,
        )

    def keep(self, best: Tried | None) -> None:
        """Remove all checkpoints but the best."""
        for directory in filter(checkpoint.is_checkpoint, self.folder.iterdir()):
            if best is None or directory.name != _name(best.settings):
                shutil.rmtree(directory)

    def finish(self, best: Tried, start: float) -> FinishedRun:
        """Make the best trial the output, and measure it on what the search did not see."""
        config, judged = self.prepared.config, self.judged
        if not _is_one_of([best], config.out):
            directory = self.folder / _name(best.settings)
            if not _is_one_of([best], directory):  # it was not the best for another limit
                show_line(self.display, "the chosen one is compressed again")
                best = self.done(best.settings, best.number)
            own = _is_one_of(self.trials, config.out)  # the best one for another limit, of a search that was stopped
            checkpoint.put(directory, config.out, config.overwrite or own)
        with after_the_checkpoint(config, self.prepared.task):
            prepared = judged.prepared if judged else self.prepared
            batches: Any = replace(self.batches, held_out=judged.held_out) if judged else self.batches  # type: ignore[arg-type]
            calibration = prepared.calibration_set(self.model, batches, self.display)
            before = prepared.score(self.model, "dense", self.display)
            del self.model
            model = self.load(config.out)
            result = describe(model, record(model).report, prepared.parameters)
            finished = written(result, config, best.settings, prepared, best.skipped)
            del model
            measure_stored(finished, prepared, calibration, before, self.display)
            finished.searched = self.told(best, finished)
            finished.seconds = time.perf_counter() - start
            finished.write(self.display)
            if config.merge:
                write_merged(finished, prepared)
        return finished

    def told(self, best: Tried, finished: FinishedRun) -> Searched:
        config, judged = self.config, self.judged
        final, samples = judged.final(finished.evaluation, finished.result.cost) if judged else (None, 0)
        kind = judged.kind if judged else KINDS["error"]
        return Searched(
            sort="max_drop" if config.max_drop else "target_mb",
            limit=config.max_drop or 1e6 * float(config.target_mb or 0),
            loss=kind.words,
            unit=kind.unit,
            samples=judged.samples if judged else 0,
            of=judged.of if judged else "pictures",
            trials=self.trials,
            chosen=best.number,
            final=final,
            final_samples=samples,
        )


_KEYS = {"dense_sha256": "the dense weights are", "by": "trials are judged by", "on": "trials are judged on"}


def _name(settings: CompressionSettings) -> str:
    return f"{cell_name(settings)}-{settings.storage_dtype}"


def _is_one_of(trials: Sequence[Tried], directory: Path) -> bool:
    """Whether a directory holds the checkpoint of one of the trials."""
    if not checkpoint.is_checkpoint(directory):
        return False
    try:
        return checkpoint.read_config(directory).weights_sha256 in {one.weights_sha256 for one in trials}
    except CheckpointError:  # damaged, or of another release
        return False
