"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert list(tmp_path.glob("*/model.safetensors"))


def test_an_adapter_takes_less_than_30_lines():
    (adapter,) = [block for block in BLOCKS if "register_adapter" in block]
    registration = adapter[adapter.index("ov.register_adapter(") :]
    assert len(registration.splitlines()) < 30
