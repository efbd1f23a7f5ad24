"""`oats-vision eval` on text: perplexity and tasks of the dense and of the compressed language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from oats_vision import logs
from oats_vision.cli.common import notes
from oats_vision.cli.common import perplexity as score_text
from oats_vision.cli.comparison import Dense, Model, Models, NoDense, Score, show
from oats_vision.cli.help import DATA, MACHINE, MEASURE
from oats_vision.cli.options import Device, Dtype, Json, LogFile, Streaming, Trust, Verbose, option, suggest

if TYPE_CHECKING:
    from torch import nn

PERPLEXITY_EXAMPLES = """\
  oats-vision eval perplexity smollm2_50 --data wikitext
  oats-vision eval perplexity smollm2_50 --data notes.txt \\
    --sequence-length 1024 --stride 512"""
LM_EXAMPLES = """\
  oats-vision eval lm smollm2_50 --tasks piqa --tasks arc_easy
MMLU as in the paper
  oats-vision eval lm smollm2_50 --tasks mmlu --shots 5"""


def perplexity(
    model: Model,
    data: Annotated[
        str,
        option(
            DATA,
            metavar="DATA",
            help="text: a .txt or .jsonl file, wikitext, c4, fineweb, hf:name or demo",
            autocompletion=suggest("data"),
        ),
    ],
    split: Annotated[str, option(DATA, metavar="SPLIT", help="split of a dataset")] = "test",
    sequence_length: Annotated[int, option(MEASURE, min=2, metavar="N", help="tokens in a window")] = 2048,
    stride: Annotated[
        int | None,
        option(MEASURE, min=1, metavar="N", help="tokens that windows move by", show_default="--sequence-length"),
    ] = None,
    samples: Annotated[
        int | None, option(DATA, min=1, metavar="N", help="the first windows only", show_default="all")
    ] = None,
    dense: Dense = None,
    no_dense: NoDense = False,
    batch_size: Annotated[int, option(MACHINE, min=1, metavar="N", help="windows in a batch")] = 1,
    device: Device = "auto",
    dtype: Dtype = "float32",
    streaming: Streaming = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
) -> None:
    """Perplexity of a language model.

    By default the convention of published WikiText-2 figures: the documents joined by empty lines, windows of 2,048
    tokens that do not overlap, an incomplete last one left out. The ratio's interval is over windows.
    """
    logs.set_up(verbose, log_file)
    models = Models(model, dense, no_dense, device, dtype, trust_remote_code)
    from oats_vision.data.text import load_tokens
    from oats_vision.models.loading.load import load_tokenizer

    ids = load_tokens(data, load_tokenizer(model), split=split, streaming=streaming)
    if samples:
        ids = ids[: sequence_length + (samples - 1) * (stride or sequence_length)]

    def protocol(module: nn.Module, what: str) -> Score:
        score = score_text(module, ids, what, length=sequence_length, stride=stride, batch_size=batch_size)
        return score.to_dict(), {"perplexity": score}

    scores = models.run(protocol)
    rows = {
        "tokens/s": [f"{about['tokens_per_second']:.0f}" for about, _ in scores.values()],
        "windows": [f"{about['windows']} of {sequence_length} tokens" for about, _ in scores.values()],
    }
    about = {"protocol": "perplexity", "data": data, "sequence_length": sequence_length, "stride": stride}
    show(models, f"perplexity of {model} on {data}", about, scores, rows, as_json)


def lm(
    model: Model,
    tasks: Annotated[
        list[str] | None,
        option(
            DATA,
            metavar="TASK",
            help="of the LM evaluation harness; may be repeated",
            show_default="the eight of the OATS paper",
        ),
    ] = None,
    shots: Annotated[
        int | None, option(MEASURE, min=0, metavar="N", help="examples in the prompt", show_default="the task's own")
    ] = None,
    limit: Annotated[
        int | None, option(DATA, min=1, metavar="N", help="documents of each task at most", show_default="all")
    ] = None,
    task_folder: Annotated[Path | None, option(DATA, metavar="FOLDER", help="task definitions of your own")] = None,
    dense: Dense = None,
    no_dense: NoDense = False,
    batch_size: Annotated[int, option(MACHINE, min=1, metavar="N", help="documents in a batch")] = 8,
    device: Device = "auto",
    dtype: Dtype = "float32",
    trust_remote_code: Trust = False,
    as_json: Json = False,
    verbose: Verbose = False,
    log_file: LogFile = None,
) -> None:
    """Accuracy on tasks of the LM evaluation harness (needs the extra `llm`)."""
    logs.set_up(verbose, log_file)
    models = Models(model, dense, no_dense, device, dtype, trust_remote_code)
    from oats_vision.evaluation.harness import ZERO_SHOT, run_tasks
    from oats_vision.models.loading.load import load_tokenizer

    tokenizer = load_tokenizer(model)

    def protocol(module: nn.Module, what: str) -> Score:
        with notes.status(f"tasks, {what}"):
            scores = run_tasks(
                module,
                tokenizer,
                tasks or ZERO_SHOT,
                shots=shots,
                limit=limit,
                batch_size=batch_size,
                folder=task_folder,
            )
        accuracy = {task: score.accuracy for task, score in scores.items()}
        mean = sum(accuracy.values()) / len(accuracy)
        return {"top1": accuracy, "mean": mean}, {task: score.correct for task, score in scores.items()}

    scores = models.run(protocol)
    rows = {"mean of the tasks": [f"{about['mean']:.2f}%" for about, _ in scores.values()]}
    about = {"protocol": "lm-eval", "data": " ".join(tasks or ZERO_SHOT), "shots": shots, "limit": limit}
    show(models, f"tasks, {model}", about, scores, rows, as_json)
