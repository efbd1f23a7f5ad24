"""`oats_vision.compress`: compress a model, and say what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn

from oats_vision import checkpoint, ranks
from oats_vision.analysis.tables import as_html, as_text, megabytes, ratio, run_table
from oats_vision.compression import methods, pipeline
from oats_vision.compression import recover as recovery
from oats_vision.compression.journal import Journal
from oats_vision.compression.record import CompressionReport
from oats_vision.compression.settings import CompressionOptions, no_recovery, resolve
from oats_vision.display import Display
from oats_vision.errors import ConfigError, ModelError, one_line
from oats_vision.evaluation.reference import Reference
from oats_vision.evaluation.results import Cost, Example
from oats_vision.evaluation.speed import Timing, dense_twin
from oats_vision.evaluation.stored import read_report
from oats_vision.evaluation.tasks import task_of
from oats_vision.models.families import Family
from oats_vision.models.record import record_of
from oats_vision.progress import Step
from oats_vision.runs.advice import BUSY, SLOW, UNTIMED, advice_on_cost, advice_on_layers, advice_on_speed

ROUNDS, SECONDS = 7, 10.0  # of each measurement of speed, see `benchmark.in_turns`


@dataclass
class Result:
    """A compressed model, and what it cost.

    parameters: of the whole model, dense and compressed. sizes: in bytes, as stored. cost: on held-out inputs, if there
    were any; one_shot: the same before a recovery; speed: beside the dense model, measured with it.
    """

    model: nn.Module = field(repr=False)
    report: CompressionReport
    parameters: tuple[int, int]
    sizes: checkpoint.Sizes
    cost: Cost | None = None
    one_shot: Cost | None = None
    examples: list[Example] = field(default_factory=list, repr=False)
    speed: list[Timing] = field(default_factory=list)
    untimed: str = ""  # why the speed could not be measured

    @property
    def advice(self) -> list[str]:
        """What came out worse than it should, and what to do about it."""
        return [
            *([f"{UNTIMED}: {self.untimed}"] if self.untimed else []),
            *advice_on_speed(self.speed, self.report.settings, next(self.model.parameters()).device),
            *advice_on_layers(self.report),
            *advice_on_cost(self.cost),
        ]

    def save(self, path: str | Path, *, overwrite: bool = False, tokenizer: Any = None) -> None:
        """Write the model to a directory, as `oats_vision.save` does."""
        checkpoint.save(self.model, path, overwrite=overwrite, tokenizer=tokenizer)

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "settings": self.report.settings.model_dump(),
            "samples": self.report.samples,
            "parameters": dict(zip(("dense", "compressed"), self.parameters, strict=True)),
            "bytes": asdict(self.sizes) | {"layer_ratio": self.sizes.layer_ratio},
            "cost": self.cost.model_dump() if self.cost else None,
            **({"one_shot": {"cost": self.one_shot.model_dump()}} if self.one_shot else {}),
            **({"recovery": asdict(self.report.recovery)} if self.report.recovery else {}),
            **({"exceptions": [asdict(one) for one in self.report.exceptions]} if self.report.exceptions else {}),
            "speed": [timing.to_dict() for timing in self.speed],
            "advice": self.advice,
            "seconds": dict(self.report.seconds),
        }

    def rows(self) -> list[list[str]]:
        """Name, dense, compressed and change of each figure, as the tables show them."""
        return [*self.cost_rows(), *self.speed_rows(), *self.size_rows()]

    def cost_rows(self) -> list[list[str]]:
        if self.cost is None:
            return []
        rows, before = (
            [[f"{metric.name} *", "", metric.figure, metric.interval] for metric in cost.metrics] if cost else []
            for cost in (self.cost, self.one_shot)
        )
        return with_one_shot(rows, before)

    def speed_rows(self) -> list[list[str]]:
        return [
            [
                timing.what,
                *(f"{seconds * 1e3:.1f} ms" for seconds in (timing.dense, timing.compressed)),
                timing.change,
            ]
            for timing in self.speed
        ]

    def size_rows(self) -> list[list[str]]:
        sizes = self.sizes
        return [
            ["parameters", *(f"{count / 1e6:.2f} M" for count in self.parameters), ratio(*self.parameters)],
            _bytes_row("bytes on disk", sizes.dense_total, sizes.total),
            _bytes_row("  compressed layers", sizes.dense_layers, sizes.layers),
            *([["  of which bitmask of S", "", megabytes(sizes.positions), ""]] if sizes.positions else []),
            *([["  of which scales", "", megabytes(sizes.scales), ""]] if sizes.scales else []),
            ["  bits a weight", f"{sizes.bits / sizes.layer_ratio:.3g}", f"{sizes.bits:.2f}", ""],
        ]

    @property
    def footnote(self) -> str:
        """What the star in the table means."""
        if self.cost is None:
            return ""
        return f"* beside the dense model, on {self.cost.samples} {self.cost.unit} held out from calibration"

    @property
    def notes(self) -> list[str]:
        """What is said below the table."""
        recovered = self.report.recovery.summary if self.report.recovery else ""
        return list(filter(None, [self.footnote, recovered, *self.report.exceptions_made, *self.advice]))

    def __str__(self) -> str:
        return "\n".join([as_text(run_table(self.report.settings.summary, self.rows())), *self.notes])

    def _repr_html_(self) -> str:
        """For notebooks."""
        return as_html(self.report.settings.summary, self.rows(), self.notes)


def compress(
    model: nn.Module,
    calibration: Any,
    *,
    held_out: Any = None,
    method: str = "oats",
    rate: float | None = None,
    rank_ratio: float | Literal["auto"] | None = None,
    pattern: str | None = None,
    values: Literal["int8", "int6", "int5", "int4", "int3", "int2", "nf4", "nf3", "nf2"] | None = None,
    factors: Literal["int8", "floating"] | None = None,
    density: float | None = None,
    bits: float | None = None,
    group_size: int = 64,
    symmetric: bool = True,
    act_order: bool = False,
    budget: Literal["uniform", "measured", "owl", "alphapruning"] | None = None,
    skip: str | Sequence[str] = (),
    storage_dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    quality: Literal["best", "fast", "plain"] | None = None,
    refit: bool | None = None,
    joint: bool | None = None,
    targets: bool | None = None,
    sensitivity: bool | None = None,
    iterations: int = 80,
    solver: Literal["fast", "exact"] = "fast",
    tolerance: float = 1e-3,
    scaling: Literal["second_moment", "median", "none"] = "second_moment",
    fused_qkv: Literal["split", "joint"] = "split",
    error_tolerance: float = 0.05,
    latency_tokens: int | None = None,
    on_bad_layer: Literal["stop", "dense"] = "stop",
    recover: int = 0,
    family: type[Family] | Family | None = None,
    activation_memory: float = 8.0,
    resume: str | Path | None = None,
    progress: bool | Callable[[Step], None] = False,
) -> Result:
    """Compress the linears of a model's blocks, in place, as OATS does it (section 3.3), or by a baseline.

    Args:
        model: of a known family; put in eval mode and changed in place. An error that comes before
            its first layer is replaced leaves it as it was.
        calibration: batches, iterated once: tensors or arrays, (tensor, ...) or mappings of keyword arguments, or
            single pictures (sequences), in an iterable or a Dataset; or one tensor of many.
        held_out: more of the same that calibration does not hold; what compression cost is measured on it. By default
            what `load_pictures(held_out=)` or `load_sequences(held_out=)` kept apart.
        method: `oats`, or a baseline to compare with: `oats-vision models` lists them.
        rate: share of the parameters removed, in (0, 1); 0.5 if not given.
        rank_ratio: share of what is kept that goes to the low-rank term, in [0, 1]; `auto`: for each layer the ratio
            that is fastest here; 0.2 for `oats` if not given.
        pattern: where S keeps its non-zeros: `row`, `layer`, or N:M such as `2:4`; the method's own if not given.
        values: format of the values of S, which all count in the file; floating ones if not given (`rtn` and `gptq`:
            int4). `nf4`: 4 bits too, levels as dense as the values of a normal distribution. What stays floating is
            stored in float16 then, unless `storage_dtype` says otherwise.
        factors: with values: U and V in 8 bits, with a scale for each row, or floating; `int8` if not given.
        density: in place of the rate, share of the weights that S keeps, in (0, 1]; at 1 no positions are stored, and
            rank_ratio is 0 if not given.
        bits: in place of a rate: bits a weight of all compressed linears, all counted, from 2.125 to 8.25. Each linear
            gets the format that measured errors say.
        group_size: with values: columns of a row that share a scale, a multiple of 16; 0: all.
        symmetric: with values: levels symmetric about 0; else each group has a zero of its own.
        act_order: of `gptq`: columns of the largest inputs first.
        budget: how the rate is shared out over the linears; as much is kept in all. `uniform`: each loses the same
            share; `measured`: those lose more whose errors cost the model's output less; `owl`, `alphapruning`: blocks
            by their outliers, or by their weights' spectra.
        skip: linears or blocks to leave dense, by name, such as `*.mlp.fc2`.
        storage_dtype: precision that the weights are rounded to and stored in; the model's if not given.
        quality: of `oats`. `best`, the default: joint, refit, targets and sensitivity; `fast`: refit alone; `plain`:
            the paper's algorithm and nothing else.
        refit: fit S's values, U and V to the inputs' full second moments by least squares.
        joint: choose the positions of S, and the low-rank term with them, by the inputs' full second moments.
        targets: aim each layer at what the dense model says, given what the compressed layers before it do; off for
            baselines, unless it is asked for.
        sensitivity: weigh errors of each layer's outputs by what they do to the model's output, to first order.
        iterations: of alternating thresholding, at most; before joint rounds 20 at most.
        solver: `fast` is warm-started and extrapolated; `exact` takes an SVD in each iteration, as the paper does.
        tolerance: `fast` stops when ten iterations lower the error by less than this share; 0: never.
        scaling: statistic of the inputs that scales the columns.
        fused_qkv: decompose a fused qkv as three matrices or as one.
        error_tolerance: `rank_ratio="auto"` may raise a layer's error by this share over the lowest of all ratios.
        latency_tokens: tokens that `rank_ratio="auto"` times a layer with.
        on_bad_layer: what is done with a layer that cannot be decomposed or stored: `stop`, or leave it `dense` and go
            on. One that comes out no better than zeros is left dense either way.
        recover: then train what was kept, without labels, for so many steps a block towards the dense model's outputs,
            and for as many of all blocks together; the weights that are best on an eighth of the calibration data are
            kept, and nothing that does not gain there. Copies of both models take memory meanwhile. 0: not.
        family: that the model is of, a class or an instance; found by itself if not given.
        activation_memory: GB of activations to keep in memory; what is beyond lives in temporary files.
        resume: folder, made if it is not there, that keeps each block as soon as it is finished: where a run was
            stopped, the same call goes on from there. Delete it once the model is saved.
        progress: True for a bar (in notebooks too), or a function that is called with each step.

    Returns:
        The model, each layer's budget and error, sizes, and with held-out inputs the cost (also before a recovery) and
        the speed. It prints as a table.

    Raises:
        ConfigError: a setting is out of range, leaves a layer without rank or non-zeros, or differs from those of the
            run that `resume` holds.
        ModelError: no family fits the model, it does not run block by block, has linears that are more than
            nn.Linear, or values that are not finite.
        DataError: no calibration batch, or one that the model cannot take; or a layer cannot be decomposed.
        CheckpointError: `resume` is in use by another run, or cannot be written.
    """
    given = locals()
    settings = resolve(**{name: given[name] for name in CompressionOptions.model_fields})
    if isinstance(family, type):
        family = family()
    if family is not None and not isinstance(family, Family):
        raise ConfigError(f"family must be a class of ov.Family, such as you register, got {family!r}")
    display = Display(Console() if progress is True else None)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    others = getattr(calibration, "held_out", None) if held_out is None else held_out
    if not isinstance(recover, int) or recover < 0:
        raise ConfigError(f"recover must be a whole number of steps from 0 on, got {recover!r}")
    if recover and not methods.find(settings.method).keeps_shapes:
        raise ConfigError(f"recover is for methods that keep the layers' shapes, and {settings.method} does not")
    if recover and settings.grid:
        raise ConfigError(no_recovery(method, values, bits))
    if recover:
        ranks.refuse("recover")
    if recover and record_of(model).on_disk:
        raise ConfigError("recover needs the whole model: load it with `low_memory=False`")
    if recover and isinstance(calibration, Iterator):
        calibration = list(calibration)  # it is read again
    if recover:
        recovery.check_enough(calibration)
    references: list[Reference] = []
    twins: list[nn.Module] = []

    def ask(dense: nn.Module) -> None:
        if recover:
            twins.append(deepcopy(dense))
        if others is not None:
            references.append(task_of(dense).reference(dense, others))

    with ExitStack() as held:
        journal = None
        if resume is not None:
            if ranks.is_main():
                held.enter_context(checkpoint.locked(Path(resume)))
            journal = Journal(Path(resume))
        with nullcontext(progress) if callable(progress) else display.compression() as step:
            report = pipeline.compress(
                model,
                calibration,
                settings,
                family=family,
                activation_memory=activation_memory,
                progress=step,
                before=ask,
                journal=journal,
            )
        one_shot: Cost | None = None
        if recover:
            for reference in references:
                with pipeline.plain_arithmetic(model):
                    one_shot, _ = reference.compare(model)
            with nullcontext(progress) if callable(progress) else display.compression() as step:
                report.recovery = recovery.recover(
                    model,
                    twins.pop(),
                    calibration,
                    steps=recover,
                    activation_memory=activation_memory,
                    state=journal.recovery if journal else None,
                    progress=step,
                )
    result = describe(model, report, parameters)
    result.one_shot = one_shot
    for reference in references:
        with pipeline.plain_arithmetic(model):
            measure(result, model, reference, display)
    return result


def describe(model: nn.Module, report: CompressionReport, parameters: int) -> Result:
    """The result of a compression, without what has to be measured.

    Args:
        parameters: that the dense model had.
    """
    storage = report.settings.storage_dtype
    dtype = getattr(torch, storage) if storage else next(p.dtype for p in model.parameters() if p.is_floating_point())
    sizes = checkpoint.measure(model.state_dict().values(), report, dtype)
    return Result(model, report, (parameters, parameters - report.dense_parameters + report.parameters), sizes)


def measure(
    result: Result,
    model: nn.Module,
    reference: Reference,
    display: Display,
    batch_size: int | None = None,
) -> None:
    """Add the cost and the speed to a result.

    Args:
        model: the compressed one as it will be used.
        reference: what the dense model said of held-out inputs.
        batch_size: to time beside a batch of one; that of the held-out inputs if not given.
    """
    with display.counting("compressed model, held-out", reference.reader.unit, reference.count) as tell:
        result.cost, result.examples = reference.compare(model, tell)
    if record_of(model).on_disk:
        result.untimed = "its weights are read block by block, since they do not fit in memory"
        return
    if not ranks.is_main():
        return
    try:
        result.speed = speed(model, reference, display, batch_size)
    except (RuntimeError, MemoryError, ModelError) as problem:  # the dense twin takes memory again
        result.untimed = one_line(problem, 200)


def speed(model: nn.Module, reference: Reference, display: Display, batch_size: int | None = None) -> list[Timing]:
    """Latency of a compressed model in turns with its dense twin, at batch 1 and at the batch size."""
    twin, first = dense_twin(model), reference.first
    sizes = sorted({1, batch_size or len(first.tensor)})
    with display.counting("timing dense and compressed", "rounds", 2 * ROUNDS) as tell:
        return task_of(model).time(twin, model, first, reference.dtype, sizes, ROUNDS, tell, SECONDS)


def update_speed(directory: Path, timings: Sequence[Timing], machine: dict[str, Any]) -> bool:
    """Put other measurements of speed into a checkpoint's report.json, with the advice that follows from them.

    Returns:
        Whether it could be written.

    Raises:
        CheckpointError: the report is damaged.
    """
    settings = checkpoint.read_config(directory).report.settings
    kept = (line for line in read_report(directory).advice if not line.startswith((SLOW, BUSY, UNTIMED)))
    advice = [*advice_on_speed(timings, settings, torch.device(machine["device"])), *kept]
    speed = [timing.to_dict() for timing in timings]
    changed = {"speed": speed, "advice": advice, "speed_machine": machine}
    return checkpoint.change_report(directory, lambda content: changed)


def with_one_shot(rows: list[list[str]], before: list[list[str]]) -> list[list[str]]:
    """Each metric's row, followed by what it was before a recovery, if there was one."""
    if not before:
        return rows
    pairs = ([row, ["  one shot, before recovery", *old[1:]]] for row, old in zip(rows, before, strict=True))
    return [row for pair in pairs for row in pair]


def _bytes_row(name: str, dense: int, ours: int) -> list[str]:
    return [name, megabytes(dense), megabytes(ours), ratio(dense, ours)]
