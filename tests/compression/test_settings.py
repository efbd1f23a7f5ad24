import pytest

from oats_vision.compression import methods
from oats_vision.compression.settings import LEVERS, CompressionSettings, resolve
from oats_vision.errors import ConfigError
from oats_vision.runs.config import load_run_config


@pytest.fixture
def read(tmp_path):
    def read(text: str):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return load_run_config(file, {})

    return read


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("pattern: 2:4\nrank_ratio: 0.2", "pattern", "2:4"),
        ("pattern: 10:40\nrank_ratio: 0.2", "pattern", "10:40"),
        ("data: 12:30:45", "data", "12:30:45"),
        ("model: no", "model", "no"),
        ("split: 2024-01-31", "split", "2024-01-31"),
        ("seed: 010", "seed", 10),
        ("tolerance: 1e-2", "tolerance", 0.01),
        ("rate: .25", "rate", 0.25),
        ("merge: true", "merge", True),
        ("data: ~", "data", None),
        ("data:", "data", None),
        ("skip: blocks.0", "skip", ("blocks.0",)),
        ("skip: [blocks.0, '*.fc2']", "skip", ("blocks.0", "*.fc2")),
    ],
)
def test_plain_values_of_yaml_are_what_they_look_like(read, text, field, value):
    assert getattr(read(text), field) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pattern: 24", r"pattern must be text \(in YAML in quotes\), got 24"),
        ("model: 1.5", r"model must be text .* got 1\.5"),
        ("1: 2", "1 is not a setting; known: method"),
        ("skip: 3", "skip must be a name or a list of names, got 3"),
        ("skip: [3]", r"skip must be text .* got 3"),
        ("rate: !!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_wrong_values_of_yaml_are_one_clear_line(read, text, message):
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_skip_is_one_name_or_several_and_not_for_slicegpt():
    assert resolve(skip="a.b").skip == ("a.b",)
    assert resolve(skip=["a", "b"]).skip == ("a", "b")
    assert "without a.b" in resolve(skip="a.b").summary
    with pytest.raises(ConfigError, match="skip must be left out with method slicegpt"):
        resolve(skip="a", method="slicegpt")


def test_settings_of_checkpoints_from_before_skip_are_read():
    fields = resolve().model_dump()
    del fields["skip"]
    assert CompressionSettings(**fields) == resolve()


@pytest.mark.parametrize("method", methods.known(), ids=lambda method: method.name)
def test_each_method_has_its_papers_defaults_and_resolved_settings_stay_as_they_are(method):
    settings = resolve(method=method.name)
    assert settings.pattern == method.pattern
    assert settings.rank_ratio == (0.2 if method.rank_ratio is None else method.rank_ratio)
    assert settings.refit == (method.name == "oats")
    assert CompressionSettings(**settings.model_dump()) == settings
    assert method.citation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "wnda"}, r"method must be oats, .* or wanda, got 'wnda'\. Did you mean 'wanda'"),
        ({"method": "wanda", "rank_ratio": 0.3}, r"rank_ratio must be 0 \(or left out\) with method wanda"),
        ({"method": "svd", "pattern": "2:4"}, "pattern must be left out with method svd"),
        ({"method": "wanda", "refit": True}, "refit is for method oats"),
        ({"scaling": "none", "refit": True}, "refit is for method oats"),
        ({"rank_ratio": "auto", "pattern": "2:4"}, "rank_ratio auto is for method oats"),
        ({"pattern": "2:4", "rate": 0.7}, r"rate must be at most 0\.5"),
        ({"rate": 1.5, "iterations": 0}, r"rate must be in \(0, 1\), got 1.5; iterations must be at least 1, got 0"),
        ({"error_tolerance": float("inf")}, "error_tolerance must be a finite number, at least 0, got inf"),
        ({"rte": 0.5}, "rte is not a setting. Did you mean 'rate'"),
    ],
)
def test_options_that_are_wrong_or_do_not_fit_together_are_one_line(options, message):
    with pytest.raises(ConfigError, match=message):
        resolve(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "oats best, rate 0.5, rank ratio 0.2, row"),
        ({"quality": "fast"}, "oats fast, rate 0.5, rank ratio 0.2, row"),
        ({"quality": "plain", "skip": ("head",)}, "oats plain, rate 0.5, rank ratio 0.2, row, without head"),
        ({"quality": "fast", "joint": True}, "oats + joint + refit, rate 0.5, rank ratio 0.2, row"),
        ({"method": "wanda", "targets": True}, "wanda + targets, rate 0.5, rank ratio 0, row"),
        ({"pattern": "2:4"}, "oats + joint + refit + targets + sensitivity, rate 0.375, rank ratio 0.2, 2:4"),
    ],
)
def test_the_summary_says_what_differs_from_a_quality(options, words):
    assert resolve(**options).summary == words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": "good"}, "quality must be best, fast or plain"),
        ({"method": "wanda", "quality": "best"}, "quality must be left out with method wanda"),
        ({"method": "wanda", "joint": True}, "joint is for method oats with scaling second_moment"),
        ({"joint": True, "scaling": "none"}, "joint is for method oats with scaling second_moment"),
        ({"quality": "plain", "sensitivity": True}, "sensitivity weighs the joint rounds: give joint too"),
        ({"method": "slicegpt", "targets": True, "rate": 0.3}, "targets must be left out with method slicegpt"),
        ({"budget": "measured", "pattern": "2:4"}, "budget must be uniform with pattern 2:4"),
        ({"budget": "measured", "rank_ratio": "auto"}, "budget must be uniform with rank_ratio auto"),
    ],
)
def test_levers_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        resolve(**options)


def test_each_quality_uses_more_than_the_one_before():
    used = [
        [name for name in LEVERS if getattr(resolve(quality=quality), name)] for quality in ("plain", "fast", "best")
    ]
    assert used == [[], ["refit"], ["joint", "refit", "targets", "sensitivity"]]
    assert resolve().model_dump() == resolve(quality="best").model_dump()
    assert resolve(quality="best", sensitivity=False).budget == "uniform"
    assert not resolve(refit=False).joint
