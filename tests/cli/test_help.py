"""What a user reads of the commands before a run: help, completion, and the answer to a word that is misspelt."""

import re
from collections import Counter

import pytest
import typer
from typer.testing import CliRunner

from oats_vision.cli import ending
from oats_vision.cli.commands import app
from oats_vision.cli.flags import flag
from oats_vision.cli.help import PANELS
from oats_vision.cli.options import SETTINGS
from oats_vision.errors import did_you_mean
from oats_vision.runs.config import RunConfig


def _commands() -> list[list[str]]:
    group = typer.main.get_command(app)
    return [
        [],
        *([name] for name in group.commands),
        *([name, inner] for name, one in group.commands.items() for inner in getattr(one, "commands", ())),
    ]


def _help(*command: str, width: int = 80) -> str:
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(width)})
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize("command", _commands(), ids=" ".join)
def test_help_fits_the_width_and_is_plain_text_where_it_goes_to_a_pipe(command):
    for width in (80, 120):
        lines = _help(*command, width=width).splitlines()
        assert lines[0].startswith("Usage: ")
        assert max(map(len, lines)) <= width
        assert not any("\033" in line or line != line.rstrip() for line in lines)
    titles = [line for line in lines if line in PANELS]
    assert titles == [panel for panel in PANELS if panel in titles]
    assert "Examples" in lines or command == ["eval"]


def test_every_setting_is_in_one_panel_with_its_flag_and_its_default():
    assert Counter(name for fields in SETTINGS.values() for name in fields) == Counter(list(RunConfig.model_fields))
    text = " ".join(_help("compress", width=120).split())
    for name, field in RunConfig.model_fields.items():
        assert flag(name) in text or flag(f"no_{name}") in text or flag(f"[no_]{name}") in text
        if isinstance(field.default, (str, int, float)) and not isinstance(field.default, bool):
            shown = field.default if isinstance(field.default, str) else f"{field.default:g}"
            assert f"default: {shown}]" in text, name
    for words in (
        "share of parameters removed [in (0, 1); default: 0.5]",
        "[in [0, 1] or auto; default: 0.2; baselines: their own]",
        "[oats, dsnot, gptq, magnitude, rtn, slicegpt, sparsegpt, svd or wanda; default: oats]",
        "[at least 1; default: 2048; 128 for text]",
        "[in [0, 1); default: 0.001]",
    ):
        assert words in text


def test_words_are_short_enough_for_one_line_of_a_completion():
    for command in typer.main.get_command(app).commands.values():
        for one in (command, *getattr(command, "commands", {}).values()):
            assert all(len(parameter.help or "") < 80 for parameter in one.params), one.name


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("oats-vision comp", {"compress", "compare"}),
        ("oats-vision compress --model dinov2_vitl", {"dinov2_vitl14", "dinov2_vitl14_reg"}),
        ("oats-vision compress --model vit_base_patch16_dinov3.", {"vit_base_patch16_dinov3.lvd1689m"}),
        ("oats-vision compress --model dem", {"demo"}),
        ("oats-vision compress --method w", {"wanda"}),
        ("oats-vision compress --pattern 2", {"2:4", "2:8"}),
        ("oats-vision compress --rank", {"--rank-ratio"}),
        ("oats-vision eval top1 demo --dtype b", {"bfloat16"}),
        ("oats-vision bench folder --device c", {"cpu", "cuda"}),
    ],
)
def test_shells_complete_commands_options_values_and_models(words, completed):
    environment = {
        "_OATS_VISION_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = CliRunner().invoke(app, [], env=environment, prog_name="oats-vision")
    assert set(done.stdout.split()) == completed


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("comprss", "no such command 'comprss'. Did you mean 'compress', 'compare'? See oats-vision --help"),
        ("eval tpo1", "no such command 'tpo1'. Did you mean 'top1'? See oats-vision eval --help"),
        ("compress --modle x", "no such option: --modle. Did you mean '--model'"),
        ("eval top1", "missing argument 'MODEL'. See oats-vision eval top1 --help"),
        (
            "compress --method wnda",
            "--method must be oats, dsnot, gptq, magnitude, rtn, slicegpt, sparsegpt, svd or wanda, got 'wnda'.",
        ),
        ("compress --method wnda", "Did you mean 'wanda'?"),
        ("compress --pattern rwo", "got 'rwo'. Did you mean 'row'?"),
        ("compress --device cudda:1", "--device 'cudda:1' is not known. Did you mean 'cuda'?"),
        (
            "bench x --dtype flot16",
            "--dtype must be float32, float16 or bfloat16, got 'flot16'. Did you mean 'float16'",
        ),
        ("eval top1 x --data demo --mixed-precision int8", "--mixed-precision must be float32, float16 or bfloat16"),
        ("compress --rate half", "--rate must be in (0, 1), got 'half'"),
        ("compress --samples 1.5", "--samples must be a whole number, at least 1, got '1.5'"),
        ("compress --model x", "unknown model 'x'"),
        ("compress --model dinov2_vitl14", "--data must be given"),
        ("compress --no-eval --eval-data demo", "--eval-data is given, and nothing is to be evaluated"),
    ],
)
def test_a_misspelt_word_is_one_line_with_what_was_meant(words, line, capsys):
    status = ending.status(lambda: app(words.split(), prog_name="oats-vision", standalone_mode=False))
    shown = capsys.readouterr().err
    assert status in (1, 2)
    assert shown.startswith("error: ")
    assert line in shown
    assert shown.count("\n") == 1


def test_versions_and_help_without_a_command():
    shown = CliRunner().invoke(app, ["--version"]).stdout
    assert re.fullmatch(r"oats-vision \S+, Python 3\.\S+, PyTorch \S+\n", shown)
    assert CliRunner().invoke(app, []).stdout == CliRunner().invoke(app, ["--help"]).stdout
    assert "linear-probe" in CliRunner().invoke(app, ["eval"]).stdout


@pytest.mark.parametrize(
    ("word", "known", "question"),
    [
        ("wnda", ["oats", "wanda"], " Did you mean 'wanda'?"),
        ("ROW", ["row", "layer"], " Did you mean 'row'?"),
        ("abcd", ["abce", "abcf"], " Did you mean 'abcf' or 'abce'?"),
        ("zzz", ["row"], ""),
        ("row", [], ""),
    ],
)
def test_did_you_mean(word, known, question):
    assert did_you_mean(word, known) == question
