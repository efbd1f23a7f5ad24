"""What a user waits for before any work: imports and help without the libraries that take seconds."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import oats_vision as ov

HEAVY = {
    "accelerate",
    "datasets",
    "matplotlib",
    "numpy",
    "scipy",
    "sklearn",
    "timm",
    "torch",
    "torchvision",
    "transformers",
}


def test_public_names_are_found_when_they_are_used():
    for name in ov.__all__:
        assert getattr(ov, name).__name__ == name
    assert {*ov.__all__, "__version__"} <= set(dir(ov))
    assert ov.__version__ == version("oats_vision")
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        ov.compres  # noqa: B018


def test_the_package_its_help_and_its_refusals_load_no_heavy_library(tmp_path):
    """All in one process, so that it stays a matter of a second."""
    code = f"""
import sys
import oats_vision
from typer.testing import CliRunner
from oats_vision.cli.commands import app
from oats_vision.errors import OatsVisionError

def heavy():
    return sorted({HEAVY} & sys.modules.keys())

assert not heavy(), ("import", heavy())
def visit(group, path):
    for command in group.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")
        yield [*path, name]
    for one in group.registered_groups:
        yield [*path, one.name]
        yield from visit(one.typer_instance, [*path, one.name])

commands = [[], *visit(app, [])]
assert ["compress"] in commands and ["eval", "top1"] in commands, commands
for command in commands:
    done = CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0 and "Usage" in done.stdout, (command, done)
    assert not heavy(), (command, heavy())
for arguments in (
    ["--version"],
    ["models"],
    ["models", "--search", "dinov2"],
    ["compress", "--rate", "1.5"],
    ["compress", "--pattern", "rwo"],
    ["compress", "--device", "cudda"],
    ["compress", "--config", "none.yaml"],
    ["compress", "--model", "vit_bas_patch16_224", "--data", "demo"],
    ["compress", "--modle", "demo"],
    ["eval", "top1", "none", "--data", "demo"],
    ["eval", "knn", "demo", "--train", "demo", "--val", "demo", "--dtype", "fp16"],
    ["bench", "none"],
    ["inspect", "none"],
    ["rollout", "none", "--images", "none"],
):
    done = CliRunner().invoke(app, arguments)
    known = done.exception is None or isinstance(done.exception, (OatsVisionError, SystemExit))
    assert known, (arguments, done.exception)
    assert not heavy(), (arguments, heavy())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
