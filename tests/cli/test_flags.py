"""Library messages name arguments, those of the command line flags."""

import ast
import re
from pathlib import Path

import pytest

import oats_vision
from oats_vision.cli import ending
from oats_vision.cli.flags import with_flags
from oats_vision.errors import ConfigError

CASES = {
    "give `dense`, or `no_dense`": "give --dense, or --no-dense",
    "pass `trust_remote_code=True`": "pass --trust-remote-code",
    "use `pretrained=False` or `dtype=float32`": "use --no-pretrained or --dtype float32",
    "a smaller `sequence_length`": "a smaller --sequence-length",
    "rename `imge` to `image`": "rename `imge` to `image`",
    "`oats-vision doctor` says why": "`oats-vision doctor` says why",
    "imagenet/train and data are words": "imagenet/train and data are words",
}


@pytest.mark.parametrize(("message", "shown"), CASES.items())
def test_arguments_become_flags_and_other_words_stay(message, shown, capsys):
    def command() -> None:
        raise ConfigError(message)

    assert with_flags(message) == shown
    assert ending.status(command) == 1
    assert capsys.readouterr().err == f"error: {shown}\n"


def test_errors_of_the_library_name_no_flag():
    package = Path(oats_vision.__file__).parent
    for folder in ("evaluation", "runs", "analysis"):
        for file in (package / folder).rglob("*.py"):
            raised = [one for one in ast.walk(ast.parse(file.read_text())) if isinstance(one, ast.Raise)]
            words = [part.value for one in raised for part in ast.walk(one) if isinstance(part, ast.Constant)]
            assert [word for word in words if re.search(r"(^|[^\w-])--[a-z]", str(word))] == [], file
