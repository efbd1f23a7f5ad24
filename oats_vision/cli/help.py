"""Help as people read it: options in named groups, names in one column and words in the other."""

from collections import defaultdict
from collections.abc import Callable
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

WHAT, HOW_MUCH, GRID = "What to compress", "How much", "The grid"
CALIBRATION, EVALUATION = "Calibration data", "Evaluation"
MODELS, DATA, MEASURE = "Models", "Data", "How to measure"
OUTPUT, MACHINE, EXPERTS, RARE = "Output", "Machine", "The algorithm, for experts", "Rarely used"
COMMANDS, HELP = "Commands", "Help"
# in the order in which a user decides
PANELS = (
    WHAT,
    MODELS,
    HOW_MUCH,
    GRID,
    CALIBRATION,
    DATA,
    EVALUATION,
    MEASURE,
    OUTPUT,
    MACHINE,
    EXPERTS,
    RARE,
    COMMANDS,
    HELP,
)
# of the commands; others come after them as they were added
ORDER = ("compress", "eval", "bench", "inspect", "compare", "sweep", "rollout", "models", "doctor")
Row = tuple[str, str, str]  # names, words, facts
WIDEST = 120  # columns: longer lines are hard to read


class Facts(str):
    """What is said of an option's range and default, in place of typer's own words: its `show_default`.

    It is put into words when the help is drawn, since registries may have grown.
    """

    words: Callable[[], str]

    def __new__(cls, words: Callable[[], str]) -> "Facts":
        facts = super().__new__(cls)
        facts.words = words
        return facts


class Command(TyperCommand):
    """A command with this help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_page(self, ctx))


class Commands(TyperGroup):
    """A group of commands with this help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(_page(self, ctx))


def range_of(least: float | None, most: float | None) -> str:
    """A range in words, as settings' errors say it."""
    if least is not None and most is not None:
        return f"in [{least}, {most}]"
    return f"at least {least}" if least is not None else ""


def _page(command: Any, ctx: Any) -> str:
    """The help of a command or a group; plain text if it goes to a file or a pipe."""
    console = Console(markup=False, highlight=False, emoji=False)
    console.width = min(console.width, WIDEST)
    panels = _panels(command, ctx)
    options = [name for panel, rows in panels.items() if panel != COMMANDS for name, *_ in rows]
    with console.capture() as page:
        console.print(Text(f"Usage: {ctx.command_path} {_usage(command, ctx)}", "bold"))
        for paragraph in (command.help or "").split("\n\n"):
            console.print(Padding(" ".join(paragraph.split()), (1, 0, 0, 1)))
        for panel in [*filter(panels.get, PANELS), *(other for other in panels if other not in PANELS)]:
            names = [name for name, *_ in panels[panel]] if panel == COMMANDS else options
            width = min(max(map(len, names)), console.width // 3)
            console.print(Text(f"\n{panel}", "bold cyan"))
            console.print(Padding(_columns(panels[panel], width, console.width - width - 3), (0, 0, 0, 1)))
        if command.epilog:
            console.print(Text("\nExamples", "bold cyan"))
            for line in command.epilog.splitlines():
                console.print(Text(f"  {line}", "" if line.startswith(" ") else "dim"), soft_wrap=True)
    return "\n".join(line.rstrip() for line in page.get().splitlines()) + "\n"


def _usage(command: Any, ctx: Any) -> str:
    arguments = [_names(one) for one in command.get_params(ctx) if one.param_type_name == "argument"]
    return " ".join(["COMMAND"] * hasattr(command, "commands") + arguments + ["[OPTIONS]"])


def _columns(rows: list[Row], width: int, words_width: int) -> Table:
    """Names, and beside them the words; the range and the default on a line of their own where one is too short."""
    table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(width=width, style="green", overflow="fold")
    table.add_column()
    for names, words, facts in rows:
        last = (wrap(words, words_width) or [""])[-1]
        between = " " if len(last) + len(facts) + 3 <= words_width else "\n"
        table.add_row(names, Text.assemble(words, (f"{between}[{facts}]" if facts else "", "dim")))
    return table


def _panels(command: Any, ctx: Any) -> dict[str, list[Row]]:
    """The names and the words of a command's options and subcommands, by panel."""
    panels: dict[str, list[Row]] = defaultdict(list)
    for parameter in command.get_params(ctx):
        if not getattr(parameter, "hidden", False):
            panels[getattr(parameter, "rich_help_panel", None) or HELP].append(
                (_names(parameter), parameter.help or "", _facts(parameter))
            )
    commands = getattr(command, "commands", {})
    for name, one in sorted(
        commands.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER)
    ):
        panels[COMMANDS].append((name, (one.help or "").split("\n\n")[0], ""))
    panels[HELP] = [(names, words[:1].lower() + words[1:].rstrip("."), "") for names, words, _ in panels[HELP]]
    return panels


def _names(parameter: Any) -> str:
    """`-v, --verbose`, `--rate X`, `--[no-]refit`, DIRECTORY."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    names = ", ".join(sorted(parameter.opts, key=len))
    return str(parameter.metavar or names) if parameter.is_flag else f"{names} {parameter.metavar}"


def _facts(parameter: Any) -> str:
    """The range and the default of an option, and whether it must be given."""
    if isinstance(parameter.show_default, Facts):
        return parameter.show_default.words()
    default = parameter.show_default if isinstance(parameter.show_default, str) else _default(parameter.default)
    of_type = getattr(parameter, "type", parameter)  # where typer keeps a number's range depends on its version
    facts = [
        "required" if parameter.required else "",
        range_of(*(getattr(parameter, end, getattr(of_type, end, None)) for end in ("min", "max"))),
        f"default: {default}" if default else "",
    ]
    return "; ".join(filter(None, facts))


def _default(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "" if value is None or isinstance(value, bool) or callable(value) else str(value)
