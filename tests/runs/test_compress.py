"""What `oats_vision.compress` returns: figures, a table, advice."""

import dataclasses
import inspect
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

import oats_vision as ov
from oats_vision import checkpoint
from oats_vision.cli.compress_output import print_finished
from oats_vision.compression import recover
from oats_vision.compression.settings import CompressionOptions
from oats_vision.data.pictures import shared_out
from oats_vision.display import Display
from oats_vision.errors import ConfigError
from oats_vision.evaluation.speed import Timing
from oats_vision.runs.advice import advice_on_speed
from oats_vision.runs.config import RunConfig
from oats_vision.runs.grid import sweep_config
from oats_vision.runs.run import run

QUICK = {"rate": 0.5, "iterations": 3}


@pytest.fixture
def folder(tmp_path):
    """Thirty pictures of one colour each, and no labels."""
    path = tmp_path / "pictures"
    path.mkdir()
    for i in range(30):
        Image.new("RGB", (40, 40), (8 * i, 255 - 8 * i, 5 * i)).save(path / f"{i:02}.png")
    return path


@pytest.fixture
def result(model_directory):
    model, transform = ov.load_model(model_directory)
    pictures = ov.load_pictures("demo", transform, batch_size=8, samples=16, held_out=70)
    return ov.compress(model, pictures, **QUICK)


def test_the_result_prints_as_the_table_and_shows_in_notebooks(result):
    rows = result.rows()
    text, page = str(result), result._repr_html_()
    for name, *values in rows:
        for value in (name, *values):
            assert value.strip() in text
            assert value.strip() in page
    names = [row[0] for row in rows]
    assert names[:2] == ["same class *", "relative error of features *"]
    assert names[2:4] == ["forward, batch 1", "forward, batch 8"]
    assert "on 70 pictures held out from calibration" in text
    assert max(map(len, text.splitlines()[: len(rows) + 4])) <= 100


def test_the_figures_are_json_and_those_of_the_checkpoint(result, tmp_path):
    figures = json.loads(json.dumps(result.to_dict()))
    assert figures["cost"]["samples"] == 70
    result.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert figures["settings"]["rate"] == config["settings"]["rate"] == 0.5
    loaded = ov.load(tmp_path / "out")
    assert sum(p.numel() for p in loaded.parameters()) <= figures["parameters"]["compressed"]
    assert figures["bytes"]["total"] < figures["bytes"]["dense_total"]


def test_markup_of_strangers_is_text_in_notebooks(result):
    result.report.settings = result.report.settings.model_copy(update={"skip": ("<script>x</script>",)})
    assert "<script>" not in result._repr_html_()


def test_an_editor_sees_every_setting_with_its_default():
    parameters = inspect.signature(ov.compress).parameters
    for name, field in CompressionOptions.model_fields.items():
        assert parameters[name].default == field.default, name
        assert re.search(rf"^    +{name}: ", ov.compress.__doc__, re.M), name


def test_advice_on_a_gpu_is_of_the_gpu(result):
    slow = [Timing("forward, batch 1", 1, "pictures", 1.0, 4.0)]
    (line,) = advice_on_speed(slow, result.report.settings, torch.device("cuda"))
    assert "0.25 x" in line
    assert "GPU" in line
    assert "kernels" not in line


def test_advice_names_what_came_out_slower_or_worse(result):
    assert not any("batch" in line for line in dataclasses.replace(result, speed=[]).advice)
    slow = [Timing("forward, batch 1", 1, "pictures", 1.0, 1.25), Timing("forward, batch 8", 8, "pictures", 1.0, 0.5)]
    advice = dataclasses.replace(result, speed=slow).advice
    assert any("0.80 x (forward, batch 1)." in line and "rank ratio auto" in line for line in advice)
    assert not any("2.00" in line for line in advice)
    busy = [dataclasses.replace(slow[0], low=0.5, high=1.1)]
    assert any("idle machine" in line for line in dataclasses.replace(result, speed=busy).advice)
    layers = result.report.layers
    worst = dataclasses.replace(layers[3], output_errors={"fc2": 10.0})
    result.report.layers = [*layers[:3], worst, *layers[4:]]
    assert not any("skip" in line for line in result.advice)  # measured budgets let it err
    result.report.settings = result.report.settings.model_copy(update={"budget": "uniform"})
    assert any(worst.name in line and f"(skip {worst.name})" in line for line in result.advice)


@given(st.integers(1, 10_000), st.integers(1, 4096), st.integers(0, 512))
def test_sharing_out_never_takes_what_is_not_there(there, samples, held_out):
    count, apart = shared_out(there, samples, held_out)
    assert 1 <= count <= samples
    assert 0 <= apart <= held_out
    assert count + apart <= there
    if there >= samples + held_out:
        assert (count, apart) == (samples, held_out)
    else:
        assert count >= min(samples, there - there // 4)


@pytest.mark.parametrize("streaming", [False, True])
def test_no_picture_is_both_seen_and_held_out(folder, tmp_path, streaming):
    import datasets

    source: object = folder
    if streaming:
        files = [str(file) for file in sorted(folder.iterdir())]
        table = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
        table.save_to_disk(tmp_path / "table")
        table.to_parquet(tmp_path / "table.parquet")
        source = tmp_path / "table"
    batches = ov.load_pictures(
        source, lambda picture: torch.tensor(picture.getpixel((0, 0))).view(3, 1, 1) / 255, batch_size=4, samples=20,
        held_out=6,
    )  # fmt: skip
    seen, apart = (
        {tuple(x.flatten().tolist()) for pictures, _ in part for x in pictures} for part in (batches, batches.held_out)
    )
    assert (len(seen), len(apart), seen & apart) == (20, 6, set())


def test_a_run_on_a_folder_without_labels_says_what_it_cost(folder, model_directory, tmp_path):
    config = RunConfig(model=str(model_directory), data=str(folder), out=tmp_path / "out", batch_size=8, **QUICK)
    finished = run(config, Display())
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["samples"] + written["cost"]["samples"] == 30
    assert written["cost"]["samples"] == 7  # a quarter, since there are few
    assert written["cost"] == finished.result.cost.model_dump()
    assert [timing["what"] for timing in written["speed"]] == ["forward, batch 1", "forward, batch 8"]
    assert any("Only 7 pictures were held out" in line for line in written["advice"])
    loaded = ov.load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), finished.result.model.parameters(), strict=True))


def test_a_run_without_evaluation_calibrates_on_all(folder, model_directory, tmp_path):
    config = RunConfig(model=str(model_directory), data=str(folder), out=tmp_path / "out", eval=False, **QUICK)
    finished = run(config, Display())
    assert (finished.result.report.samples, finished.result.cost, finished.result.speed) == (30, None, [])


def test_a_language_model_says_what_it_cost(language_directory, tmp_path):
    config = RunConfig(
        model=str(language_directory),
        data="demo",
        samples=4,
        sequence_length=64,
        out=tmp_path / "out",
        storage_dtype="float32",
        **QUICK,
    )
    finished = run(config, Display())
    assert [metric.name for metric in finished.result.cost.metrics] == ["perplexity ratio", "same next token"]
    assert finished.result.cost.samples == 64
    assert [timing.what for timing in finished.result.speed] == ["prompt of 64 tokens", "generating 32 tokens"]


def _colours(batches) -> list[tuple]:
    return [tuple(x.flatten().tolist()) for pictures, _ in batches for x in pictures]


def _colour(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(picture.getpixel((0, 0))).view(3, 1, 1) / 255


def test_a_short_stream_gives_a_quarter_away_at_most(folder, tmp_path):
    import datasets

    files = [str(file) for file in sorted(folder.iterdir())]
    datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image()).to_parquet(
        tmp_path / "table.parquet"
    )
    batches = ov.load_pictures(
        f"hf:{tmp_path}", _colour, batch_size=4, samples=100, held_out=64, streaming=True, split="train"
    )
    seen, apart = _colours(batches), _colours(batches.held_out)
    assert (len(seen), len(apart), set(seen) & set(apart)) == (23, 7, set())


def test_names_are_those_of_the_pictures_that_were_read(folder):
    for i in range(0, 30, 3):
        (folder / f"{i:02}.png").write_bytes(b"no picture")
    batches = ov.load_pictures(folder, _colour, batch_size=4, samples=8, held_out=6)
    for part in (batches, batches.held_out):
        colours = _colours(part)
        assert len(part.names) == len(colours) == part.total  # others were read in the place of broken ones
        for name, colour in zip(part.names, colours, strict=True):
            assert torch.equal(_colour(Image.open(name)).flatten(), torch.tensor(colour))
    assert not set(batches.names) & set(batches.held_out.names)


def test_a_run_with_recovery_reports_the_one_shot_model_apart(model_directory, folder, tmp_path, capsys):
    out = tmp_path / "out"
    config = RunConfig(model=str(model_directory), data=str(folder), out=out, batch_size=4, recover=12, **QUICK)
    finished = run(config, Display())
    print_finished(finished, as_json=False)
    printed = " ".join(capsys.readouterr().out.split())
    content, page = json.loads((out / "report.json").read_text()), (out / "report.html").read_text()
    one_shot, cost = content["one_shot"]["cost"]["metrics"][-1], content["cost"]["metrics"][-1]
    assert one_shot["name"] == cost["name"] == "relative error of features"
    assert cost["value"] < one_shot["value"]
    assert content["recovery"]["steps"] == content["run"]["recover"] == 12
    assert f"{one_shot['value']:.4f}" in printed
    assert f"{one_shot['value']:.4f}" in page
    assert finished.result.report.recovery.summary in printed
    assert "one shot, before recovery" in page
    assert checkpoint.read_config(out).report.recovery == finished.result.report.recovery
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(ConfigError, match="recover"):
        sweep_config(model=str(model_directory), data=str(folder), recover=1)
    with pytest.raises(ValidationError, match="recover is for methods that keep"):
        RunConfig(method="slicegpt", recover=1)


def test_a_recovery_that_was_stopped_goes_on(model_directory, folder, tmp_path, monkeypatch):
    options = {"model": str(model_directory), "data": str(folder), "eval": False, "report": False, **QUICK}
    whole = run(RunConfig(out=tmp_path / "whole", recover=4, batch_size=4, **options), Display())
    config = RunConfig(out=tmp_path / "out", recover=4, batch_size=4, **options)

    class Stopped(SystemExit):
        pass

    def stop(*given, **named):
        if (tmp_path / "out.partial" / "recovery" / "0000.safetensors").exists():
            raise Stopped
        return train_block(*given, **named)

    train_block = recover.train_block
    monkeypatch.setattr(recover, "train_block", stop)
    with pytest.raises(Stopped):
        run(config, Display())
    assert checkpoint.read_config(config.out).report.recovery is None  # the one-shot model, whole
    monkeypatch.setattr(recover, "train_block", train_block)
    run(config, Display())
    stored = [(out / "model.safetensors").read_bytes() for out in (config.out, whole.config.out)]
    assert stored[0] == stored[1]
