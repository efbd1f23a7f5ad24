"""The command line in a process of its own."""

import subprocess
import sys
from pathlib import Path


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `oats-vision` with these arguments and return its status and what it printed."""
    command = [sys.executable, "-m", "oats_vision", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or Path(__file__).parent, check=False)
