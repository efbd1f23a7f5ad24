import io

import pytest
from rich.console import Console

from oats_vision import report
from oats_vision.pipeline import Step


@pytest.mark.parametrize(("every", "lines"), [(0, 5), (3600, 1)])
def test_progress_goes_to_a_log_file_line_by_line_now_and_then(every, lines, monkeypatch):
    monkeypatch.setattr(report, "LOGGED_EVERY", every)
    console = Console(file=io.StringIO(), width=120)
    with report.compression_progress(console) as progress:
        for block in range(1, 5):
            progress(Step(block / 4, block, 4, "second moments", 0.25))
    written = console.file.getvalue().splitlines()
    assert len(written) == lines  # the last one when all is done
    assert all(f"block {min(i + 1, 4) if lines > 1 else 4}/4" in line for i, line in enumerate(written))
