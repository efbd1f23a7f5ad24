"""The study that kills compressions, in a process of its own: it forks, and this one may have threads."""

import subprocess
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "eval" / "studies" / "kill_and_resume.py"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--samples", "32", "--iterations", "5"], "bit-equal"),
        (["--while", "saving"], "one whole checkpoint there"),
    ],
    ids=["compressing", "saving"],
)
@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(arguments, shown):
    done = subprocess.run(
        [sys.executable, STUDY, "--kills", "10", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert shown in " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_recovery_is_killed_too(model_directory):
    arguments = ["--model", model_directory, "--kills", "6", "--samples", "40", "--iterations", "5", "--recover", "20"]
    done = subprocess.run([sys.executable, STUDY, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
