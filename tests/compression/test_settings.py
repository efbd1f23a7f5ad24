import pytest

from oats_vision.compression.settings import CompressionSettings, load_run_config, validated
from oats_vision.errors import ConfigError


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
        ("1: 2", "1 is no setting; known: method"),
        ("skip: 3", "skip must be a name or a list of names, got 3"),
        ("skip: [3]", r"skip must be text .* got 3"),
        ("rate: !!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_wrong_values_of_yaml_are_one_clear_line(read, text, message):
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_skip_is_one_name_or_several_and_not_for_slicegpt():
    assert CompressionSettings(skip="a.b").skip == ("a.b",)
    assert CompressionSettings(skip=["a", "b"]).skip == ("a", "b")
    assert "without a.b" in CompressionSettings(skip="a.b").summary
    with pytest.raises(ConfigError, match="skip must be left out with method slicegpt"):
        validated(CompressionSettings, {"skip": "a", "method": "slicegpt"})


def test_settings_of_checkpoints_from_before_skip_are_read():
    fields = CompressionSettings().model_dump()
    del fields["skip"]
    assert CompressionSettings(**fields) == CompressionSettings()
