"""Whose fault it is when a task cannot be run: the user's, the data's or ours."""

import json
from pathlib import Path

import pytest

import oats_vision as ov
from harness_task import TASK
from oats_vision.errors import ConfigError, DataError
from oats_vision.evaluation.harness import run_tasks


@pytest.fixture
def folder(tmp_path) -> Path:
    """Definitions of a task whose documents are there, and of one whose are not."""
    documents = [{"q": f"the cat sat {i}"} for i in range(3)]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "cats.yaml").write_text(TASK.format(name="cats", file=tmp_path / "docs.jsonl"))
    (tmp_path / "gone.yaml").write_text(TASK.format(name="gone", file=tmp_path / "none.jsonl"))
    scored = TASK.format(name="scored", file=tmp_path / "docs.jsonl").replace("metric: acc", "metric: brier_score")
    (tmp_path / "scored.yaml").write_text(scored)
    return tmp_path


@pytest.mark.slow
def test_tasks_that_cannot_be_run_are_said(language_directory, folder):
    model, _ = ov.load_model(str(language_directory))
    tokenizer = ov.load_tokenizer(str(language_directory))
    with pytest.raises(ConfigError, match=r"`task_folder` .*cats\.yaml is not a folder"):
        run_tasks(model, tokenizer, ["cats"], task_folder=folder / "cats.yaml")
    with pytest.raises(DataError, match=r"`tasks` gone cannot be loaded: .*none\.jsonl"):
        run_tasks(model, tokenizer, ["gone"], task_folder=folder)
    model.register_forward_pre_hook(lambda *_: pytest.fail("it is known before anything runs"))
    with pytest.raises(DataError, match="`tasks`: scored is not scored by the accuracy"):
        run_tasks(model, tokenizer, ["cats", "scored"], task_folder=folder)


@pytest.mark.slow
def test_an_error_of_the_model_is_no_error_of_the_data(language_directory, folder):
    model, _ = ov.load_model(str(language_directory))

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    model.register_forward_pre_hook(broken)
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        run_tasks(model, ov.load_tokenizer(str(language_directory)), ["cats"], task_folder=folder)
