"""Searches for a rate: what is judged and on what, what is found and written, and how one that was stopped goes on."""

import io
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import oats_vision as ov
from command import run
from oats_vision import checkpoint
from oats_vision.calibration.origin import NotFiniteError
from oats_vision.compression import methods, sharing
from oats_vision.data.pictures import Batches, load_pictures
from oats_vision.data.text import Sequences
from oats_vision.display import Display
from oats_vision.errors import CheckpointError, ConfigError, DataError, ModelError
from oats_vision.evaluation.results import Difference, Ratio
from oats_vision.evaluation.searched import Loss
from oats_vision.runs import file_size
from oats_vision.runs import search as module
from oats_vision.runs.config import RunConfig
from oats_vision.runs.finished import FinishedRun
from oats_vision.runs.kept import halves, kept
from oats_vision.runs.losses import MOST_HELD_OUT, fewest, floor, needed, of_change
from oats_vision.runs.run import run as run_once
from oats_vision.runs.search import dry_search, folder_of, search

QUICK = {"data": "demo", "samples": 20, "batch_size": 32, "method": "magnitude"}
LABELLED = QUICK | {"eval_data": "demo", "eval_samples": 120}


def config(model: Path, out: Path, **fields) -> RunConfig:
    return RunConfig(model=str(model), out=out, **fields)


def trials(done: FinishedRun) -> list[float]:
    return [one.settings.rate for one in done.searched.trials]


@pytest.fixture(scope="module")
def backbone(model_directory, tmp_path_factory) -> Path:
    """The tiny model without its head."""
    directory = tmp_path_factory.mktemp("backbone")
    fields = json.loads((model_directory / "config.json").read_text())
    fields["num_classes"] = fields["pretrained_cfg"]["num_classes"] = 0
    (directory / "config.json").write_text(json.dumps(fields))
    tensors = load_file(model_directory / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.startswith("head.")}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def classifier(model_directory, backbone, tmp_path_factory) -> Path:
    """The tiny model with a head that is fitted to pictures, so that its accuracy is above chance."""
    directory = tmp_path_factory.mktemp("classifier")
    shutil.copytree(model_directory, directory, dirs_exist_ok=True)
    model, transform = ov.load_model(backbone)
    ((pictures, labels),) = ov.load_pictures("demo", transform, labelled=True, batch_size=600, samples=600)
    with torch.inference_mode():
        features = torch.nn.functional.pad(model(pictures), (0, 1), value=1.0)
    wanted = torch.nn.functional.one_hot(labels, 10).float()
    head = torch.linalg.solve(features.T @ features + 0.1 * torch.eye(features.shape[1]), features.T @ wanted).T
    tensors = load_file(directory / "model.safetensors")
    tensors |= {"head.weight": head[:, :-1].half().contiguous(), "head.bias": head[:, -1].half().contiguous()}
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def on_disk() -> list[int]:
    """How many checkpoints lay in the folder of the search that is `made`, after each compression."""
    return []


@pytest.fixture(scope="module")
def made(classifier, tmp_path_factory, on_disk) -> FinishedRun:
    out, compress = tmp_path_factory.mktemp("search") / "out", module.compress_and_write

    def counted(*given, **named):
        done = compress(*given, **named)
        on_disk.append(len(list(folder_of(out).glob("*/model.safetensors"))))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compress_and_write", counted)
        return search(config(classifier, out, **LABELLED, max_drop=15))


def test_the_highest_rate_that_stays_below_is_the_output(made):
    found, out = made.searched, made.config.out
    below = [one for one in found.trials if one.loss.high < 15]
    assert below
    assert len(below) < len(found.trials) <= 8
    assert found.best == max(below, key=lambda one: one.settings.rate)
    above = min(one.settings.rate for one in found.trials if one.loss.high >= 15)
    assert above - found.best.settings.rate < 0.0201
    assert checkpoint.read_config(out).weights_sha256 == found.best.weights_sha256
    assert ov.record(ov.load(out)).report.settings.rate == found.best.settings.rate == made.settings.rate
    assert found.best.bytes == sum((out / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]  # what the search kept is gone


def test_the_final_figures_are_of_pictures_that_the_search_did_not_see(made):
    found = made.searched
    assert (found.samples, found.final_samples) == (60, 60)
    assert made.evaluation.compressed.samples == 60
    assert made.result.cost.samples == 64  # of the calibration data, which the search left alone
    change = made.evaluation.difference["top-1"]
    assert found.final.value == -change.points
    assert found.final.high == max(-change.low, floor(60))
    assert f"{found.final} on 60 others" in found.sentence


def test_the_report_and_the_page_have_all_that_was_tried(made):
    report = json.loads((made.config.out / "report.json").read_text())
    assert [one["settings"]["rate"] for one in report["search"]["trials"]] == trials(made)
    assert report["run"]["max_drop"] == 15
    page = (made.config.out / "report.html").read_text()
    assert "top-1 accuracy lost against bytes" in page
    assert "The limit, 15 points, is the dashed line" in page
    assert page.count("<td>chosen</td>") == 1
    for one in made.searched.trials:
        assert f"<td>{one.settings.rate:.3g}</td>" in page


def stopped_in(monkeypatch, number: int):
    """Let the so manieth compression of this process be stopped by Ctrl-C when its first layer was done."""
    method, done = methods.find("magnitude"), []
    before = method.decompose

    def decompose(*given):
        done.append(given)
        if len(done) == (number - 1) * 12 + 2:  # 2 blocks of a fused qkv and three others
            raise KeyboardInterrupt
        return before(*given)

    monkeypatch.setattr(method, "decompose", decompose)
    return done


def test_a_search_that_was_stopped_goes_on_and_finds_the_same(made, classifier, tmp_path, monkeypatch):
    settings = config(classifier, tmp_path / "out", **LABELLED, max_drop=15)
    with monkeypatch.context() as patch:
        stopped_in(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            search(settings)
    folder = folder_of(tmp_path / "out")
    assert len(list((folder / "cells").iterdir())) == 1
    assert not (tmp_path / "out").exists()
    (folder / ".oats.writing-x").mkdir()  # as a killed process leaves it
    compressed = stopped_in(monkeypatch, 100)
    again = search(settings)
    assert trials(again) == trials(made)
    assert [one.loss for one in again.searched.trials] == [one.loss for one in made.searched.trials]
    assert again.searched.trials[0].seconds != made.searched.trials[0].seconds
    assert len(compressed) == 12 * (len(trials(made)) - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_fails_after_the_search_is_done_again_alone(made, classifier, tmp_path, monkeypatch):
    settings = config(classifier, tmp_path / "out", **LABELLED, max_drop=15)
    with monkeypatch.context() as patch:

        def fail(*given):
            raise RuntimeError("no memory")

        patch.setattr(module, "measure_stored", fail)
        with pytest.raises(CheckpointError, match="is complete; what comes after it failed: no memory"):
            search(settings)
    ov.load(tmp_path / "out")
    compressed = stopped_in(monkeypatch, 1)
    assert search(settings).searched.final == made.searched.final
    assert not compressed
    with pytest.raises(CheckpointError, match="exists: give another"):
        search(settings)


def test_another_limit_replaces_what_the_search_has_put_in_its_place(classifier, tmp_path, monkeypatch):
    settings = LABELLED | {"max_drop": 15}
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure_stored", lambda *given: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            search(config(classifier, tmp_path / "out", **settings))
    before = checkpoint.read_config(tmp_path / "out").weights_sha256
    found = search(config(classifier, tmp_path / "out", **settings | {"max_drop": 60})).searched
    assert checkpoint.read_config(tmp_path / "out").weights_sha256 == found.best.weights_sha256 != before


def test_other_settings_are_refused_and_another_limit_begins_with_the_trials(classifier, tmp_path):
    settings = LABELLED | {"method": "svd", "max_drop": 1e-6 + floor(60)}  # no rate of svd is harmless
    with pytest.raises(
        ConfigError, match=r"is not reached: at rate 0\.05 it is .* points \(top-1 accuracy lost, on 60"
    ):
        search(config(classifier, tmp_path / "out", **settings))
    rows = {file.name: file.stat().st_mtime_ns for file in (folder_of(tmp_path / "out") / "cells").iterdir()}
    with pytest.raises(ConfigError, match=r"samples is 20 there and 21 here\. Give these, or another out"):
        search(config(classifier, tmp_path / "out", **settings | {"samples": 21}))
    with pytest.raises(ConfigError, match="drop_of is None there and agreement here"):
        search(config(classifier, tmp_path / "out", **settings, drop_of="agreement"))
    with checkpoint.locked(tmp_path / "out"), pytest.raises(CheckpointError, match="written by another run"):
        search(config(classifier, tmp_path / "out", **settings))
    done = search(config(classifier, tmp_path / "out", **settings | {"max_drop": 90}))
    assert len(rows) < len(trials(done))
    assert done.searched.best.settings.rate > max(trials(done)[: len(rows)])


def test_another_limit_begins_with_the_trials_without_labels_too(classifier, tmp_path, monkeypatch):
    """It takes more inputs to show that a smaller one is kept."""
    settings = QUICK | {"drop_of": "agreement"}
    with monkeypatch.context() as patch:
        stopped_in(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            search(config(classifier, tmp_path / "out", **settings, max_drop=60))
    (folder_of(tmp_path / "out") / "cells" / ".ipynb_checkpoints").mkdir()  # which is not ours
    with pytest.raises(DataError, match=r"`max_drop` 20 cannot be shown on 10 pictures.* it takes 17"):
        search(config(classifier, tmp_path / "out", **settings, max_drop=20))
    compressed = stopped_in(monkeypatch, 100)
    found = search(config(classifier, tmp_path / "out", **settings, max_drop=90)).searched
    assert found.samples == found.final_samples == 10
    assert len(compressed) == 12 * (len(found.trials) - 1)


def broken_when_measured(monkeypatch):
    load = module._Search.load

    def broken(found, directory):
        model = load(found, directory)
        if checkpoint.read_config(directory).report.settings.rate > 0.6:
            torch.nn.init.constant_(model.norm.weight, math.inf)
        return model

    monkeypatch.setattr(module._Search, "load", broken)


def broken_while_compressed(monkeypatch):
    compress = module.compress_and_write

    def overflowing(model, own, settings, *others, **named):
        if settings.rate > 0.6:
            raise NotFiniteError("the outputs of blocks.1", 0, torch.float16, leaves=True)
        return compress(model, own, settings, *others, **named)

    monkeypatch.setattr(module, "compress_and_write", overflowing)


def test_what_cannot_be_read_may_be_overwritten(classifier, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps({"format": "oats_vision", "format_version": 99}))
    assert checkpoint.is_checkpoint(tmp_path / "out")
    done = search(config(classifier, tmp_path / "out", **LABELLED, max_drop=90, report=False, overwrite=True))
    assert checkpoint.read_config(tmp_path / "out").weights_sha256 == done.searched.best.weights_sha256


@pytest.mark.parametrize(
    ("broken", "missing", "why"),
    [
        (broken_when_measured, "loss", "the logits are not finite"),
        (broken_while_compressed, "bytes", "the outputs of blocks.1 are not finite"),
    ],
)
def test_a_trial_whose_outputs_are_not_finite_counts_as_too_much(
    classifier, tmp_path, monkeypatch, broken, missing, why
):
    broken(monkeypatch)
    told = io.StringIO()
    settings = config(classifier, tmp_path / "out", **LABELLED, max_drop=90)
    done = search(settings, Display(Console(file=told, width=200)))
    failed = [one for one in done.searched.trials if one.failed]
    assert failed
    assert all(getattr(one, missing) is None and one.settings.rate > 0.6 for one in failed)
    assert done.searched.best.settings.rate == pytest.approx(0.6)
    assert why in told.getvalue()
    assert why in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("wanted", [{"max_drop": 90}, {"target_mb": 0.11}], ids=["a drop", "a size"])
def test_where_no_trial_could_be_measured_the_same_command_tries_again(classifier, tmp_path, monkeypatch, wanted):
    def overflowing(*given, **named):
        raise NotFiniteError("the outputs of blocks.0", 0, torch.float16, leaves=True)

    settings = config(classifier, tmp_path / "out", **LABELLED, report=False, **wanted)
    with monkeypatch.context() as patch:
        patch.setattr(module, "compress_and_write", overflowing)
        with pytest.raises(ModelError, match=r"the outputs of blocks.0 are not finite .* \(at rate 0.\d+\)"):
            search(settings)
    assert list(tmp_path.iterdir()) == []
    assert not search(settings).searched.best.failed


def test_at_most_two_checkpoints_lie_on_the_disk(made, on_disk):
    assert set(on_disk) == {1, 2}


BITS = {"data": "demo", "samples": 20, "batch_size": 32, "quality": "fast", "bits": "auto"}
FEW = BITS | {"eval_data": "demo", "eval_samples": 120}


@pytest.fixture(scope="module")
def offers() -> Iterator[list[str]]:
    """Grows with each part of a linear whose formats are tried."""
    done, before = [], sharing.offered
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "offered", lambda *given: done.append("") or before(*given))
        yield done


@pytest.fixture(scope="module")
def of_few_bits(classifier, tmp_path_factory, offers) -> FinishedRun:
    done = search(config(classifier, tmp_path_factory.mktemp("bits") / "out", **FEW, max_drop=15))
    assert len(offers) == 12  # parts of 2 blocks, once for all trials
    return done


def test_the_fewest_bits_that_stay_below_are_found(of_few_bits):
    done, found, out = of_few_bits, of_few_bits.searched, of_few_bits.config.out
    below = [one for one in found.trials if one.loss.high < 15]
    assert below
    assert 1 < len(found.trials) <= 8
    assert found.best == min(below, key=lambda one: one.settings.bits)
    assert ov.record(ov.load(out)).report.settings.bits == found.best.settings.bits == done.settings.bits
    assert (
        found.best.bytes
        == min(one.bytes for one in below)
        == sum((out / name).stat().st_size for name in ("config.json", "model.safetensors"))
    )
    assert found.sentence.startswith(
        f"{done.settings.bits:g} bits a weight, found in {len(found.trials)} trials: top-1"
    )
    report = json.loads((out / "report.json").read_text())
    assert (report["run"]["bits"], report["settings"]["bits"]) == ("auto", done.settings.bits)
    assert [one["settings"]["bits"] for one in report["search"]["trials"]] == [
        one.settings.bits for one in found.trials
    ]
    page = (out / "report.html").read_text()
    assert "Numbers are bits a weight; the chosen one is ringed." in page
    assert "<th>bits a weight</th>" in page.replace(' scope="col"', "")
    assert all(f"<td>{one.settings.bits:g}</td>" in page for one in found.trials)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_a_search_for_bits_that_was_stopped_goes_on_with_what_it_knows_of_the_formats(
    of_few_bits, classifier, tmp_path, monkeypatch, offers
):
    offers.clear()
    settings = config(classifier, tmp_path / "out", **FEW, max_drop=15, report=False)
    write = module.write_row
    with monkeypatch.context() as patch:

        def stop(folder, name, tried):
            write(folder, name, tried)
            raise KeyboardInterrupt

        patch.setattr(module, "write_row", stop)
        with pytest.raises(KeyboardInterrupt):
            search(settings)
    assert len(offers) == 12
    again = search(settings)
    assert len(offers) == 12
    for mine, own in zip(again.searched.trials, of_few_bits.searched.trials, strict=True):
        assert (mine.settings, mine.loss, mine.weights_sha256) == (own.settings, own.loss, own.weights_sha256)


def test_a_loss_that_no_bits_keep_to_is_said_with_the_most_of_them(backbone, tmp_path):
    with pytest.raises(ConfigError, match=r"is not reached: at 8\.25 bits a weight it is .* hundredths \(cosine"):
        search(config(backbone, tmp_path / "out", **BITS, max_drop=1e-5))


@pytest.mark.parametrize("megabytes", [0.06, 0.08])
def test_bits_reach_a_size_in_one_trial(model_directory, tmp_path, megabytes):
    done = search(config(model_directory, tmp_path / "out", **BITS, target_mb=megabytes, report=False))
    (one,) = done.searched.trials
    assert (
        0.94e6 * megabytes < one.bytes <= 1e6 * megabytes
    )  # of so small a model a layer's next format is some per cent
    assert one.settings.bits == done.settings.bits
    assert done.result.cost.samples == 64


def test_a_dry_run_counts_the_formats_once(model_directory, tmp_path):
    wanted = config(model_directory, tmp_path / "out", **BITS, max_drop=20)
    _, estimate, trials = dry_search(wanted, Display(Console(quiet=True)))
    assert trials.most == 8
    assert trials.seconds == pytest.approx(8 * estimate.total - 7 * estimate.budgets)
    assert 0 < estimate.budgets < estimate.total


def test_bits_that_reach_no_size_are_said(model_directory, tmp_path):
    with pytest.raises(ConfigError, match=r"the sizes of bits from 2\.125 to 8\.25, got 5"):
        search(config(model_directory, tmp_path / "out", **BITS, target_mb=5))


@pytest.mark.parametrize("wanted", [{"max_drop": 40}, {"target_mb": 0.06}], ids=["a drop", "a size"])
def test_a_rate_is_found_for_values_of_few_bits(model_directory, tmp_path, wanted):
    settings = QUICK | {"method": "sparsegpt", "values": "int4", "report": False}
    done = search(config(model_directory, tmp_path / "out", **settings, **wanted))
    assert done.settings.values == "int4"
    assert {one.settings.values for one in done.searched.trials} == {"int4"}
    assert done.searched.sentence.startswith(f"Rate {done.settings.rate:.3g}, int4 in groups of 64, found in ")
    spec = ov.record(ov.load(tmp_path / "out")).report.layers[0].spec
    assert spec.grid.bits == 4
    assert spec.nonzeros < spec.dense_parameters
    if "target_mb" in wanted:
        assert 57_000 < done.searched.best.bytes <= 60_000


WRONG = {
    "two ways": ({"max_drop": 1, "target_mb": 1}, "max_drop and `target_mb` are both given"),
    "a rate too": ({"max_drop": 1, "rate": 0.5}, "rate is given, and `max_drop` finds the rate: leave one"),
    "bits too": (
        {"max_drop": 1, "bits": 4},
        "bits 4 and `max_drop` are both given: leave one of them out, or give `bits` auto",
    ),
    "bits of no search": ({"bits": "auto"}, "bits auto is searched for: give `max_drop` or `target_mb` too"),
    "bits that are searched for, and values": (
        {"bits": "auto", "max_drop": 1, "values": "int4"},
        "values and `bits` are both given",
    ),
    "values and a density": (
        {"max_drop": 1, "values": "int4", "density": 0.5},
        "max_drop finds the rate, and `density` has none: leave one of them out",
    ),
    "a method without a rate": (
        {"target_mb": 1, "method": "gptq"},
        "target_mb finds the rate, and `method` gptq has none",
    ),
    "a rate and a size": ({"target_mb": 1, "rate": 0.5}, "rate is given, and `target_mb` finds the rate"),
    "no drop": ({"max_drop": 0}, "max_drop must be above 0, got 0"),
    "no size": ({"target_mb": -2}, "target_mb must be above 0, got -2"),
    "nothing limited": ({"drop_of": "top1"}, "drop_of is for `max_drop`"),
    "unknown": ({"max_drop": 1, "drop_of": "top5"}, "'top5'"),
    "nothing measured": ({"max_drop": 1, "eval": False}, "nothing is to be evaluated"),
    "sizes that are not known": ({"target_mb": 1, "rank_ratio": "auto"}, "give a number for `rank_ratio`, not auto"),
    "a rate that is fixed": (
        {"max_drop": 1, "pattern": "2:4", "rank_ratio": 0.2},
        "max_drop finds the rate, which pattern 2:4 and rank ratio 0.2 fix at 0.375",
    ),
    "a rate that a method fixes": ({"max_drop": 1, "pattern": "2:4", "method": "wanda"}, "fix at 0.5"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_go_together_is_refused_in_one_line(tmp_path, fields, message):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items() if name != "eval"]
    done = run("compress", *flags, *["--no-eval"] * ("eval" in fields), "--out", tmp_path / "out")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    shown = message.split("`")  # names are flags there
    for i, words in enumerate(shown):
        expected = f"--{words.replace('_', '-')}" if i % 2 else words.removeprefix(next(iter(fields)))
        assert expected.replace("max_drop", "--max-drop") in line.replace("max_drop", "--max-drop")
    assert list(tmp_path.iterdir()) == []


def test_a_rate_is_no_search_and_a_search_no_run(tmp_path):
    with pytest.raises(ConfigError, match="`max_drop` or `target_mb` must be given"):
        search(RunConfig(out=tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"`max_drop` is for `oats_vision\.runs\.search\.search`"):
        run_once(RunConfig(out=tmp_path / "out", max_drop=1), None)


BY = {
    "agreement": ({"max_drop": 60}, "pictures in another class", "pictures"),
    "knn": ({"max_drop": 60, "drop_of": "knn", "eval_data": "demo", "eval_samples": 200}, "k-NN", "pictures"),
    "probe": (
        {"max_drop": 60, "drop_of": "probe", "eval_data": "demo", "eval_samples": 200},
        "linear probe",
        "pictures",
    ),
}


@pytest.mark.parametrize(("fields", "words", "unit"), BY.values(), ids=BY.keys())
def test_a_model_is_judged_by_what_is_asked_for(model_directory, tmp_path, fields, words, unit):
    done = search(config(model_directory, tmp_path / "out", **QUICK, **fields))
    found = done.searched
    assert words in found.loss
    assert found.of == unit
    assert found.best.loss.high < fields["max_drop"]
    assert found.final is not None
    assert found.final_samples == found.samples or abs(found.final_samples - found.samples) < 2
    assert found.final != found.best.loss
    if fields.get("drop_of") in ("knn", "probe"):
        assert found.samples == 50  # of 200: half are learnt from
        key = {"knn": "knn", "probe": "linear-probe"}[fields["drop_of"]]
        assert json.loads((tmp_path / "out" / "report.json").read_text())[key]["compressed"]["samples"] == 50
        assert "k-NN" in done.evaluation.protocol or "probe" in done.evaluation.protocol


def test_a_backbone_is_judged_by_neighbours_with_labels_and_by_cosine_without(backbone, tmp_path):
    with_labels = search(config(backbone, tmp_path / "a", **LABELLED, max_drop=60))
    assert "k-NN" in with_labels.searched.loss
    without = search(config(backbone, tmp_path / "b", **QUICK, max_drop=20))
    assert "cosine" in without.searched.loss
    assert without.searched.samples == without.searched.final_samples == 256
    with pytest.raises(ConfigError, match=r"`drop_of` top1 cannot be measured of .*: give knn, probe or cosine"):
        search(config(backbone, tmp_path / "c", **LABELLED, max_drop=60, drop_of="top1"))
    with pytest.raises(ConfigError, match=r"`drop_of` knn cannot be measured of .* without `eval_data`: give cosine"):
        search(config(backbone, tmp_path / "c", **QUICK, max_drop=60, drop_of="knn"))
    assert not folder_of(tmp_path / "c").exists()


TEXT = {"samples": 8, "batch_size": 4, "sequence_length": 32, "method": "magnitude", "data": "demo"}


@pytest.mark.parametrize("fields", [{}, {"eval_data": "demo", "eval_samples": 41}], ids=["held out", "a text"])
def test_text_is_judged_by_perplexity(language_directory, tmp_path, fields):
    done = search(config(language_directory, tmp_path / "out", **TEXT, **fields, max_drop=0.5))
    found = done.searched
    assert (found.loss, found.unit) == ("perplexity gained", "%")
    assert found.best.loss.high < 0.5
    assert found.final != found.best.loss
    assert (tmp_path / "out" / "tokenizer").is_dir()
    assert found.best.bytes > (tmp_path / "out" / "model.safetensors").stat().st_size
    if fields:
        assert (found.samples, found.of, found.final_samples) == (21 * 31, "tokens", 20 * 31)
    else:
        assert found.samples == found.final_samples == 128


def test_a_limit_that_so_few_inputs_cannot_show_is_refused(model_directory, tmp_path, language_directory):
    told = Display(Console(file=io.StringIO(), force_terminal=True))
    for by, count in (("top1", 60), ("knn", 30)):
        with pytest.raises(DataError, match=rf"`max_drop` 1 cannot be shown on {count} pictures.* it takes 368"):
            search(config(model_directory, tmp_path / "out", **LABELLED, max_drop=1, drop_of=by), told)
    assert "for the search" not in told.console.file.getvalue()  # refused before anything is measured
    with pytest.raises(DataError, match="demo has 20 labelled pictures, too few for a search: give 32 or more"):
        search(config(model_directory, tmp_path / "out", **QUICK, eval_data="demo", eval_samples=20, max_drop=90))
    with pytest.raises(DataError, match="demo has 3 windows of 32 tokens, too few for a search: give 16"):
        search(config(language_directory, tmp_path / "out", **TEXT, eval_data="demo", eval_samples=3, max_drop=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_a_size_is_reached_and_not_exceeded(model_directory, tmp_path, share):
    limit = round(share * (model_directory / "model.safetensors").stat().st_size)
    done = search(config(model_directory, tmp_path / "out", **QUICK, target_mb=limit / 1e6, report=False))
    files = [tmp_path / "out" / name for name in ("config.json", "model.safetensors")]
    size = sum(file.stat().st_size for file in files)
    assert 0.96 * limit < size <= limit  # config.json is a tenth of so small a model, and only bounded before
    assert done.searched.sort == "target_mb"
    assert trials(done) == [done.settings.rate]
    assert done.result.cost.samples == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_size_that_was_told_too_small_is_kept_all_the_same(model_directory, tmp_path, monkeypatch):
    told = file_size.planned_bytes
    monkeypatch.setattr(file_size, "planned_bytes", lambda *given: round(0.96 * told(*given)))
    done = search(config(model_directory, tmp_path / "out", **QUICK, target_mb=0.1, report=False))
    assert len(done.searched.trials) > 1
    assert 98_000 < done.searched.best.bytes <= 100_000


def test_of_the_settings_that_reach_a_size_the_one_that_loses_least_is_taken(model_directory, tmp_path):
    settings = {"data": "demo", "samples": 20, "batch_size": 32, "iterations": 2, "target_mb": 0.11}
    done = search(config(model_directory, tmp_path / "out", **settings))
    found = done.searched
    assert [one.settings.rank_ratio for one in sorted(found.trials, key=lambda one: one.settings.rank_ratio)] == [
        0.1,
        0.2,
        0.3,
    ]
    assert found.best.loss.value == min(one.loss.value for one in found.trials)
    assert all(one.bytes <= 110_000 for one in found.trials)
    assert "The limit, 0.11 MB, is the dashed line." in (tmp_path / "out" / "report.html").read_text()
    alone = search(config(model_directory, tmp_path / "alone", **settings, eval=False))
    assert len(alone.searched.trials) == 1
    assert alone.searched.best.loss is None


def test_a_trial_that_came_out_too_large_is_not_taken_for_the_best_afterwards(model_directory, tmp_path, monkeypatch):
    compress, rates, large = module.compress_and_write, [], (1, 3)

    def noted(model, own, settings, *others, **named):
        rates.append(settings.rate)
        if len(rates) == 4:
            raise KeyboardInterrupt
        return compress(model, own, settings, *others, **named)

    def lost(found, directory):
        """The more, the later; nothing where it is too large."""
        return Loss(value=0 if len(rates) in large else len(rates), low=0, high=9), None

    monkeypatch.setattr(module, "compress_and_write", noted)
    monkeypatch.setattr(module._Search, "lost", lost)
    monkeypatch.setattr(module, "size_of", lambda directory: 120_000 if len(rates) in large else 100_000)
    settings = {"data": "demo", "samples": 20, "batch_size": 32, "iterations": 2, "target_mb": 0.11, "report": False}
    with pytest.raises(KeyboardInterrupt):
        search(config(model_directory, tmp_path / "out", **settings))
    found = search(config(model_directory, tmp_path / "out", **settings)).searched
    assert [one.bytes > 110_000 for one in found.trials] == [True, False, True, False, False]
    assert found.best.number == 2
    assert len(rates) == 5 + 1  # but for the one that was stopped, each was compressed once


def test_a_size_beyond_all_rates_is_refused_with_those_that_can_be(model_directory, tmp_path):
    for size in (0.001, 5):
        with pytest.raises(ConfigError, match=rf"`target_mb` must be in \[0\.0\d, 0\.\d\d\) for .*, got {size:g}"):
            search(config(model_directory, tmp_path / "out", **QUICK, target_mb=size))
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_decoded_once_and_halves_share_nothing():
    read = []

    def transform(picture):
        read.append(picture)
        return torch.full((3, 2, 2), float(len(read)))

    batches = kept(load_pictures("demo", transform, batch_size=4, samples=10, held_out=7))
    assert isinstance(batches, Batches)
    first = [pictures.clone() for pictures, _ in batches]
    assert [len(pictures) for pictures in first] == [4, 4, 2]
    assert len(read) == 10
    assert all(torch.equal(a, b) for a, (b, _) in zip(first, batches, strict=True))
    assert len(batches.names) == 10
    parts = halves(batches.held_out)
    assert [part.total for part in parts] == [4, 3]
    seen = [torch.cat([pictures for pictures, _ in part])[:, 0, 0, 0].tolist() for part in parts]
    assert [len(values) for values in seen] == [4, 3]
    assert len({*seen[0], *seen[1]}) == 7
    assert len(read) == 17
    assert len({*parts[0].names, *parts[1].names}) == 7
    one, other = halves(Sequences(torch.arange(10).view(5, 2), 2))
    assert [one.ids.flatten().tolist(), other.ids.flatten().tolist()] == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7]]


def test_pictures_are_decoded_again_where_reading_was_broken_off():
    batches = kept(load_pictures("demo", lambda picture: torch.zeros(3, 2, 2), batch_size=4, samples=10))
    next(iter(batches))
    assert sum(len(pictures) for pictures, _ in batches) == 10
    assert sum(len(pictures) for pictures, _ in batches) == 10


def test_a_loss_is_what_a_change_takes_away_and_nothing_lost_proves_little():
    lost = of_change(Difference(-0.5, -0.8, -0.2, 0.01), 10_000)
    assert (lost.value, lost.low, lost.high) == (0.5, 0.2, 0.8)
    none = of_change(Difference(0.0, 0.0, 0.0, 1.0), 100)
    assert none.high == pytest.approx(100 * (1 - 0.025 ** (1 / 100)))
    dearer = of_change(Ratio(1.02, 1.01, 1.03), 5)
    assert (dearer.value, dearer.low, dearer.high) == pytest.approx((2, 1, 3))
    for limit in (0.1, 0.5, 3, 50):
        assert floor(fewest(limit)) < limit <= floor(fewest(limit) - 1)
        assert fewest(limit) <= needed("agreement", limit) // 2
        assert needed("agreement", limit) <= max(MOST_HELD_OUT, 2 * fewest(limit))
    assert str(none) == "+0.00 [+0.00, +3.62]"


def test_the_command_shows_the_path_and_a_dry_run_how_long_it_takes(classifier, tmp_path):
    words = ["compress", "--model", classifier, "--data", "demo", "--samples", 20, "--method", "magnitude"]
    words += ["--eval-data", "demo", "--eval-samples", 120, "--max-drop", 15, "--out", "out"]
    dry = run(*words, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert "The search compresses at most 8 times" in " ".join(dry.stdout.split())
    figures = json.loads(run(*words, "--dry-run", "--json", cwd=tmp_path).stdout)
    assert figures["trials"] == 8
    assert list(tmp_path.iterdir()) == []
    done = run(*words, "--no-report", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    start = next(
        i for i, line in enumerate(lines) if line.startswith("search: top-1 accuracy lost of less than 15 points")
    )
    assert lines[start].endswith("judged by 60 pictures")
    rows = [line.split() for line in lines[start:] if line.endswith(("below the limit", "too much"))]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [float(row[0]) for row in rows] == [one["settings"]["rate"] for one in report["search"]["trials"]]
    assert "found in" in done.stdout


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was(classifier, tmp_path):
    out, folder = tmp_path / "out", folder_of(tmp_path / "out")
    fields = LABELLED | {"method": "oats", "iterations": 400, "tolerance": 0, "solver": "exact", "max_drop": 15}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    words = [sys.executable, "-m", "oats_vision", "compress", f"--model={classifier}", *flags, f"--out={out}"]
    killed = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not list(folder.glob("cells/[!.]*.json")):
        assert killed.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)  # into the second trial
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    assert not out.exists()
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "cells").glob("[!.]*.json")}
    rows = {name: (folder / "cells" / name).read_text() for name in before}
    done = search(config(classifier, out, **fields))
    known = [json.loads(text)["weights_sha256"] for text in rows.values()]
    assert {one.weights_sha256 for one in done.searched.trials} >= {*known}
    assert len(done.searched.trials) > len(known)
    ov.load(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
