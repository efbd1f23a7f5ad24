"""report.json holds what was measured, or anything at all."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from oats_vision.checkpoint import add_evaluation
from oats_vision.errors import CheckpointError
from oats_vision.evaluation.results import Evaluation
from oats_vision.evaluation.stored import Measured, read_report

GOOD = {
    "protocol": "top1",
    "data": "imagenet/val",
    "dense": {"top1": 91.0, "pictures": 400},
    "compressed": {"top1": 90.25},
    "difference": {"top-1": {"points": -0.75, "low": -1.2, "high": -0.3, "p_value": 0.01}},
    "machine": {"device": "cpu"},
}
ROW = ["top1", "imagenet/val", ["top-1", "91.00%", "90.25%", "-0.75 points [-1.20, -0.30]"]]


def _write(directory: Path, content: object) -> Path:
    (directory / "report.json").write_text(json.dumps(content))
    return directory


def _shown(evaluations: Sequence[Evaluation]) -> list[list[object]]:
    """Protocol, data and rows of each."""
    return [[one.protocol, one.where, *one.rows()] for one in evaluations]


def test_every_kind_of_evaluation_has_its_rows(tmp_path):
    ratio = {"value": 1.25, "low": 1.2, "high": 1.3}
    content = {
        "run": {"model": "a/model", "eval_data": None},
        "perplexity": {"dense": {"perplexity": 8.0}, "compressed": {"perplexity": 10.0}, "ratio": ratio},
        "evaluations": [
            GOOD,
            {"protocol": "k-NN", "train": "a", "val": "b", "compressed": {"top1": {"10": 50.0}}, "difference": {}},
        ],
    }
    assert _shown(read_report(_write(tmp_path, content)).evaluations) == [
        ["perplexity, when compressed", "a/model", ["perplexity", "8.000", "10.000", "1.2500 x [1.2000, 1.3000]"]],
        ROW,
        ["k-NN", "a → b", ["k = 10", "", "50.00%", ""]],
    ]
    assert read_report(tmp_path / "none") == Measured()


ODD = {
    "null": None,
    "a word": "top1",
    "a list": [GOOD],
    "no protocol": {name: value for name, value in GOOD.items() if name != "protocol"},
    "no compressed model": {name: value for name, value in GOOD.items() if name != "compressed"},
    "score of words": GOOD | {"compressed": {"top1": "most"}},
    "score that is a list": GOOD | {"compressed": {"top1": [90.25]}},
    "not a number": GOOD | {"compressed": {"top1": float("nan")}},
    "beyond all numbers": GOOD | {"dense": {"top1": 10**400}},
    "half a difference": GOOD | {"difference": {"top-1": {"points": -0.75}}},
    "data that is a number": GOOD | {"data": 7},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD.keys())
def test_an_odd_evaluation_is_left_out_and_said(odd, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = read_report(_write(tmp_path, {"evaluations": [odd, GOOD]})).evaluations
    assert _shown(found) == [ROW]
    assert "report.json: evaluation 1 is left out: " in caplog.text


METRIC = {"name": "same class", "kind": "percent", "value": 98.4, "lower_is_better": False, "low": 91.0, "high": 99.7}
COST = {"unit": "pictures", "samples": 64, "metrics": [METRIC]}
SPEED = {"what": "forward, batch 1", "units": 1, "unit": "pictures", "dense": 0.2, "compressed": 0.1, "speedup": 2.0}
EXAMPLE = {
    "name": "a.png",
    "thumbnail": "data:image/png;base64,AAAA",
    "dense": {"label": "cat", "share": 0.9},
    "compressed": {"label": "dog", "share": 0.6},
    "cosine": 0.9,
    "maps": ["data:image/png;base64,AAAA", "data:image/jpeg;base64,BBBB"],
}


def test_what_a_run_measured_is_read_by_its_types(tmp_path):
    content = {
        "run": {"model": "vit", "seed": 42, "data": None, "skip": []},
        "cost": COST,
        "speed": [SPEED, SPEED | {"what": "forward, batch 64", "units": 64}],
        "advice": ["leave fc2 dense"],
        "examples": [EXAMPLE],
        "seconds": {"total": 3.0, "command": 4.5},
        "peak_memory": 1000,
        "machine": {"device": "cpu", "threads": 2},
    }
    found = read_report(_write(tmp_path, content))
    assert found.cost is not None
    assert found.cost.model_dump() == COST
    assert [(timing.what, timing.speedup) for timing in found.speed] == [
        ("forward, batch 1", 2.0),
        ("forward, batch 64", 2.0),
    ]
    assert (found.advice, found.seconds, found.peak_memory) == (("leave fc2 dense",), 4.5, 1000)
    assert [example.model_dump() for example in found.examples] == [EXAMPLE]
    assert found.run == (("model", "vit"), ("seed", "42"))
    assert found.machine == (("device", "cpu"), ("threads", "2"))
    assert found.evaluations == ()


ODD_MEASUREMENTS = {
    "cost": [5, [], {}, COST | {"samples": 0}, COST | {"metrics": []}, COST | {"metrics": [METRIC | {"low": None}]}],
    "speed": [5, {}, *([SPEED | {"dense": value}] for value in (0, -1.0, float("nan"), 1e300, 1e-300, "fast"))],
    "advice": ["slow", [5], [None], ["x" * 2000]],
    "examples": [
        {},
        [[]],
        *(
            [EXAMPLE | {"thumbnail": address}]
            for address in (
                "https://example.org/a.png",
                "data:text/html;base64,AAAA",
                'data:image/png;base64,AA" onerror="alert(1)',
                "data:image/png;base64,AAAA\n",
                "data:image/png;base64," + "A" * 200_000,
            )
        ),
        [EXAMPLE | {"maps": ["https://example.org/a.png"]}],
        [EXAMPLE | {"dense": {"label": "cat", "share": float("inf")}}],
    ],
    "seconds": [5, {"command": -1}, {"command": "long"}],
    "peak_memory": [-5, "much", 1e300],
    "machine": [[], "cpu"],
}


@pytest.mark.parametrize(("name", "odd"), [(name, odd) for name, odds in ODD_MEASUREMENTS.items() for odd in odds])
def test_an_odd_measurement_is_left_out_and_said(name, odd, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = read_report(_write(tmp_path, {name: odd, "evaluations": [GOOD]}))
    assert replace(found, evaluations=()) == Measured()
    assert len(found.evaluations) == 1
    assert " is left out: " in caplog.text


def test_the_last_evaluation_of_the_best_protocol_says_most(tmp_path):
    knn = GOOD | {"protocol": "k-NN", "compressed": {"top1": {"10": 50.0}}, "dense": {"top1": {"10": 51.0}}}
    knn["difference"] = {"k = 10": GOOD["difference"]["top-1"]}
    lone = GOOD | {"data": "no dense model", "difference": {}}
    for evaluations, data in ([[knn], "k-NN"], [[GOOD, knn], "top1"], [[knn, GOOD, lone], "top1"]):
        found = read_report(_write(tmp_path, {"evaluations": evaluations})).labelled
        assert found is not None
        assert (found.protocol, found.data) == (data, "imagenet/val")
    two = [GOOD, GOOD | {"data": "other"}]
    assert read_report(_write(tmp_path, {"evaluations": two})).labelled.data == "other"
    assert read_report(_write(tmp_path, {"evaluations": [lone]})).labelled is None


def test_an_evaluation_takes_the_place_of_the_same_and_of_no_other(tmp_path):
    def kept(*settings: dict[str, object] | None) -> list[object]:
        _write(tmp_path, {})
        for one in settings:
            assert add_evaluation(tmp_path, GOOD if one is None else GOOD | {"settings": one})
        return [one.get("settings") for one in json.loads((tmp_path / "report.json").read_text())["evaluations"]]

    ten, twenty = {"k": [10], "workers": 0}, {"k": [20], "workers": 0}
    assert kept(ten, twenty) == [ten, twenty]
    assert kept(ten, twenty, ten) == [twenty, ten]
    assert kept(ten, ten | {"workers": 4}) == [ten | {"workers": 4}]
    assert kept(None, ten) == [ten]  # of an earlier version

    (tmp_path / "mine.json").write_text("{}")  # a stranger's checkpoint may link to a file of the user's
    (tmp_path / "report.json").unlink()
    (tmp_path / "report.json").symlink_to(tmp_path / "mine.json")
    assert add_evaluation(tmp_path, GOOD)
    assert (tmp_path / "mine.json").read_text() == "{}"

    def of_both(*results: dict[str, object]) -> list[tuple[object, bool]]:
        _write(tmp_path, {})
        for one in results:
            add_evaluation(tmp_path, one)
        found = json.loads((tmp_path / "report.json").read_text())["evaluations"]
        return [(one.get("dtype"), "dense" in one) for one in found]

    alone = {name: value for name, value in GOOD.items() if name not in ("dense", "difference")}
    single, half = GOOD | {"dtype": "float32"}, GOOD | {"dtype": "bfloat16"}
    assert of_both(single, half, single) == [("bfloat16", True), ("float32", True)]
    assert of_both(GOOD, half) == [("bfloat16", True)]  # of an earlier version
    assert of_both(single, alone | {"dtype": "float32"}) == [("float32", True), ("float32", False)]
    assert kept(ten, None) == [None]


def test_the_machine_of_a_later_bench_is_that_of_the_speeds_alone(tmp_path):
    ran, timed = {"device": "cpu", "threads": 2}, {"device": "cuda", "threads": 64}
    found = read_report(_write(tmp_path, {"machine": ran, "speed_machine": timed}))
    assert dict(found.machine) == {"device": "cpu", "threads": "2"}
    assert dict(found.speed_machine) == {"device": "cuda", "threads": "64"}
    assert read_report(_write(tmp_path, {"machine": ran})).speed_machine == found.machine


@pytest.mark.parametrize("odd", [[], 5, {"dense": 1, "compressed": None}, {"dense": {}, "compressed": {"top1": {}}}])
def test_what_compress_measured_may_be_odd_too(odd, tmp_path):
    content = {"run": ["demo"], "top1": odd, "perplexity": odd, "evaluations": [GOOD]}
    assert _shown(read_report(_write(tmp_path, content)).evaluations) == [ROW]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"text"', "7", '{"evaluations": null}', '{"evaluations": {"a": 1}}', "[" * 100_000, "\0"],
    ids=lambda text: text[:12] or "empty",
)
def test_what_is_no_report_is_one_clear_error_for_reader_and_writer(text, tmp_path):
    (tmp_path / "report.json").write_text(text)
    for use in (read_report, lambda path: add_evaluation(path, GOOD)):
        with pytest.raises(CheckpointError, match=r"report\.json is damaged"):
            use(tmp_path)
    assert (tmp_path / "report.json").read_text() == text


def test_bytes_that_are_no_text_and_a_folder_are_errors(tmp_path):
    (tmp_path / "report.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match="damaged"):
        read_report(tmp_path)
    (tmp_path / "report.json").unlink()
    (tmp_path / "report.json").mkdir()
    with pytest.raises(CheckpointError, match="damaged"):
        read_report(tmp_path)
