"""What the README and the pages of docs/ tell a reader to type: Python runs, flags exist, links lead somewhere."""

import pkgutil
import re
import shlex
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import oats_vision as ov
from oats_vision.cli.commands import app
from oats_vision.compression import methods

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = "<!-- not run: "  # on the line before a block, with the reason
BLOCK = re.compile(
    r"^(?P<before>[^\n]*)\n(?P<indent> *)```(?P<language>\w+)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S
)
SMALL = {"compress": ["--samples", "64", "--iterations", "2", "--eval-samples", "64"]}


def _blocks(page: Path, language: str) -> list[str]:
    """The code of a page's blocks of one language, without those that say that they cannot run."""
    found = BLOCK.finditer(page.read_text())
    return [
        dedent(block["code"])
        for block in found
        if block["language"] == language and not block["before"].startswith(NOT_RUN)
    ]


def _commands(page: Path) -> list[list[str]]:
    """The arguments of every `oats-vision` command of a page, in blocks and in tables."""
    lines = "\n".join(_blocks(page, "sh")).replace("\\\n", " ").splitlines()
    shown = [line.partition(" && ")[2].rpartition(" && ")[2] if " && " in line else line for line in lines]
    inline = re.findall(r"`(oats-vision [^`]+)`", page.read_text())
    every = [shlex.split(line.strip().removeprefix(".venv/bin/"), comments=True) for line in [*shown, *inline]]
    return [words[1:] for words in every if words[:1] == ["oats-vision"] and "COMMAND" not in words]


QUICKSTART = ROOT / "docs" / "quickstart.md"
WITH_PYTHON = [page for page in PAGES if _blocks(page, "python") and page != QUICKSTART]
WITH_COMMANDS = [page for page in PAGES if _commands(page)]


def _name(page: Path) -> str:
    return page.stem


def test_the_pages_are_found():
    assert {"README", "your-model", "data", "language-models"} <= {page.stem for page in WITH_PYTHON}
    assert {"README", "quickstart", "evaluation", "troubleshooting"} <= {page.stem for page in WITH_COMMANDS}


@pytest.fixture
def methods_as_before():
    """What a page registers is gone after it."""
    before = methods.names()
    yield
    for name in methods.names():
        if name not in before:
            methods.unregister(name)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=_name)
@pytest.mark.slow
@pytest.mark.usefixtures("methods_as_before")
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _run_python(page)


def _run_python(page: Path) -> None:
    """The blocks of a page one after the other, as a reader types them."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in _blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=_name)
def test_commands_have_these_flags(page):
    for words in _commands(page):
        command: Any = typer.main.get_command(app)
        context = command.context_class(command, info_name="oats-vision")
        while getattr(command, "commands", {}) and words[:1] and not words[0].startswith("-"):
            assert words[0] in command.commands, f"no command {words[0]}"
            command = command.commands[words.pop(0)]
            context = command.context_class(command, info_name=command.name, parent=context)
        flags = {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}
        if words and not flags.isdisjoint({words[0]} & {"--help", "--install-completion"}):
            continue  # they end the process
        if words or not any(one.required for one in command.params):  # else it is a command's mere name
            command.parse_args(context, words)


def test_a_wrong_flag_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n```sh\npip install . && oats-vision compress --rat 0.5 # why\n```\n`oats-vision bench X`\n")
    assert _commands(page) == [["compress", "--rat", "0.5"], ["bench", "X"]]
    with pytest.raises(Exception, match="--rat"):
        test_commands_have_these_flags(page)


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = [words for words in _commands(QUICKSTART) if not any("imagenet" in word for word in words)]
    assert [words[0] for words in ours] == ["compress", "inspect", "bench", "eval", "doctor"]
    for words in ours[:-1]:
        done = CliRunner().invoke(app, [*words, *SMALL.get(words[0], [])])
        assert done.exit_code == 0, (words, done.output, done.exception)
    _run_python(QUICKSTART)


@pytest.mark.parametrize("page", PAGES[:2], ids=_name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)|(?:src|srcset)=\"([^\"]+)\"", page.read_text())
    local = [link for pair in links for link in pair if link and "://" not in link]
    assert page.stem != "README" or len(local) > 15
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert {f"oats_vision.{name}" for name in ov.__all__} <= set(named)
    assert [name for name in named if pkgutil.resolve_name(name).__doc__ is None] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["cff-version"], citation["type"], citation["version"]) == ("1.2.0", "software", ov.__version__)
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Zhang", "Papyan"]
