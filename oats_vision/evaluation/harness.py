"""Tasks of the LM evaluation harness (EleutherAI's lm-eval) on dense and compressed language models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from oats_vision.errors import ConfigError, DataError, one_line
from oats_vision.evaluation.paired import Accuracy


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    task_folder: Path | None = None,
) -> dict[str, Accuracy]:
    """Accuracy (`acc`) of each task, the members of a group (such as `mmlu`) one by one.

    Args:
        model: a causal language model of transformers, dense or compressed.
        tasks: names of the harness.
        shots: examples in the prompt; each task's own number if None.
        limit: documents of each task at most.
        task_folder: of task definitions of your own.

    Raises:
        ConfigError: the harness is not installed, does not know a task, or cannot read the folder.
        DataError: a task's data cannot be loaded, or it has no accuracy.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as missing:
        raise ConfigError(f"tasks need lm-eval: pip install lm-eval ({missing})") from None
    if task_folder is not None and not task_folder.is_dir():
        raise ConfigError(f"`task_folder` {task_folder} is not a folder")
    try:
        manager = TaskManager(include_path=str(task_folder) if task_folder else None)
    except Exception as problem:  # definitions of the user's own are YAML and Python files
        raise ConfigError(f"`task_folder` {task_folder} cannot be read: {one_line(problem, 300)}") from problem
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"`tasks`: the harness has no task {', '.join(unknown)}")
    try:
        loaded = manager.load(list(tasks))["tasks"]
    except Exception as problem:  # hub, network and data errors of the harness and of `datasets`
        raise DataError(f"`tasks` {' '.join(tasks)} cannot be loaded: {one_line(problem, 300)}") from problem
    for name, task in loaded.items():
        if "acc" not in task.aggregation() or getattr(task, "MULTIMODAL", False):
            raise DataError(f"`tasks`: {name} is not scored by the accuracy of answers to text")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with torch.inference_mode():
        found = lm_eval.simple_evaluate(
            wrapped,
            tasks=list(loaded.values()),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    scores = {}
    for task, documents in found["samples"].items():
        by_document = {document["doc_id"]: bool(document["acc"]) for document in documents}
        scores[task] = Accuracy(torch.tensor([by_document[i] for i in sorted(by_document)]))
    return scores
