"""How a package hangs together: its modules, their imports, and whether any of these goes up.

    python eval/studies/structure.py                        # this checkout
    python eval/studies/structure.py --root ../another       # another one
    python eval/studies/structure.py --against ../another    # both, as the table of docs/architecture.md
    python eval/studies/structure.py --walk rate             # the functions that handle a name
    python eval/studies/structure.py --mermaid               # the layers as a graph, for docs/architecture.md

It reads source files and imports none of them. An arrow goes from a module to one that it imports; several imports of
one module are one arrow. Imports for the type checker alone (`if TYPE_CHECKING`) count only as arrows that go up. The
folders of the package are its layers, in the order of `LAYERS`; one that is laid out otherwise has folders, and no
order.
"""

import argparse
import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

TOP = "top"  # the small modules in the package's own folder, below all layers
LAYERS = (
    TOP,
    "core",
    "kernels",
    "nn",
    "models",
    "data",
    "calibration",
    "compression",
    "checkpoint",
    "evaluation",
    "analysis",
    "runs",
    "cli",
)
LONG = 300  # lines

Arrows = dict[str, set[str]]  # module -> the modules of the package that it imports


def modules(package: Path) -> dict[str, Path]:
    """The modules of a package by their dotted names, without its own `__init__` and `__main__`.

    A compiled module counts by its stub.
    """
    found = {}
    for file in sorted([*package.rglob("*.py"), *package.rglob("*.pyi")]):
        parts = file.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in (package.name, f"{package.name}.__main__"):
            found[name] = file
    return found


def arrows(found: Mapping[str, Path], *, for_types: bool = False) -> Arrows:
    """Which modules of the package each module imports, anywhere in it.

    Args:
        for_types: also for the type checker alone, under `if TYPE_CHECKING`.
    """
    return {name: set(_imported(name, file, found, for_types)) - {name} for name, file in found.items()}


def _imported(name: str, file: Path, found: Mapping[str, Path], for_types: bool) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    here = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    unseen = {id(node) for block in ast.walk(tree) if _for_types_only(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in unseen and not for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in found)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            source = ".".join([*start, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield from [inner] if inner in found else [source] if source in found else []


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def layers(found: Iterable[str]) -> dict[str, str]:
    """The folder of the package that each module lies in; `top` for those in none."""
    folders = {name.split(".")[1] for name in found if name.count(".") > 1}
    return {name: first if (first := name.split(".")[1]) in folders else TOP for name in found}


def between_layers(links: Arrows, layer: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """How many arrows go from each layer to each other one."""
    pairs = ((layer[a], layer[b]) for a, targets in links.items() for b in targets)
    return Counter((a, b) for a, b in pairs if a != b)


def upward(links: Arrows, layer: Mapping[str, str]) -> list[tuple[str, str]]:
    """The arrows to a higher layer, and those from data to models, as data know no model."""

    def wrong(a: str, b: str) -> bool:
        return LAYERS.index(a) < LAYERS.index(b) or (a, b) == ("data", "models")

    return sorted((a, b) for a, targets in links.items() for b in targets if wrong(layer[a], layer[b]))


def cycles(found: Mapping[str, set[str]]) -> list[set[str]]:
    """Groups of modules that all reach one another."""
    reached = {name: _reached(name, found) for name in found}
    groups: list[set[str]] = []
    for name in found:
        if not any(name in group for group in groups):
            groups.append({other for other in reached[name] if name in reached[other]})
    return [group for group in groups if len(group) > 1]


def _reached(start: str, found: Mapping[str, set[str]]) -> set[str]:
    reached, waiting = set(), [start]
    while waiting:
        for target in found[waiting.pop()] - reached:
            reached.add(target)
            waiting.append(target)
    return reached


def handled(found: Mapping[str, Path], name: str) -> Counter[str]:
    """In how many functions of each module a name is read, written, passed on or taken."""
    counts: Counter[str] = Counter()
    for module, file in found.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                counts[module] += any(name == _name(inner) for inner in ast.walk(node))
    return +counts


def _name(node: ast.AST) -> str | None:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=name):
            return name
    return None


def mermaid(counts: Mapping[tuple[str, str], int]) -> str:
    """The layers as a Mermaid graph; without cycles, only the arrows that no others imply are drawn."""
    targets: dict[str, set[str]] = {}
    for a, b in counts:
        targets.setdefault(a, set()).add(b)
        targets.setdefault(b, set())
    acyclic = not cycles(targets)

    def implied(a: str, b: str) -> bool:
        return acyclic and any(b in _reached(other, targets) for other in targets[a] - {b})

    def height(pair: tuple[tuple[str, str], int]) -> list[int]:
        return [-LAYERS.index(one) if one in LAYERS else 0 for one in pair[0]]

    drawn = [f"    {a} -->|{n}| {b}" for (a, b), n in sorted(counts.items(), key=height) if not implied(a, b)]
    return "\n".join(["graph TD", *drawn])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="a checkout [default: this one]")
    parser.add_argument("--package", default="oats_vision", help="the package in it [default: oats_vision]")
    parser.add_argument("--mermaid", action="store_true", help="print the layers as a Mermaid graph")
    parser.add_argument("--against", type=Path, metavar="DIR", help="an earlier checkout to print beside it")
    parser.add_argument("--walk", metavar="NAME", help="count the functions that handle a name, such as rate")
    args = parser.parse_args()
    found = modules(args.root / args.package)
    if not found:
        parser.error(f"{args.root / args.package} holds no Python module")
    short = len(args.package) + 1  # of a name, what all begin with
    if args.mermaid:
        print(mermaid(between_layers(arrows(found), layers(found))))
    elif args.against:
        print(table(modules(args.against / args.package), found))
    elif args.walk:
        handling = handled(found, args.walk)
        print(f"{args.walk}: {sum(handling.values())} functions of {len(handling)} modules")
        print("\n".join(f"  {module[short:]}: {n}" for module, n in handling.items()))
    else:
        for what, figure, which in figures(found):
            print(f"{what:<32} {figure:>6}  {', '.join(name[short:] for name in which)}".rstrip())


def figures(found: Mapping[str, Path]) -> list[tuple[str, int, list[str]]]:
    """What is counted: its name, the figure, and which modules these are, where that matters."""
    links, layer = arrows(found), layers(found)
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in found.items()}
    long = sorted((name for name in lines if lines[name] > LONG), key=lambda name: -lines[name])
    counts, circles = between_layers(links, layer), cycles(links)
    circling = sorted(name for group in circles for name in group)
    ordered = {*layer.values()} == {*LAYERS}
    up = [a for a, _ in upward(arrows(found, for_types=True), layer)] if ordered else []
    return [
        ("modules", len(found), []),
        ("  in the package's own folder", list(layer.values()).count(TOP), []),
        ("lines", sum(lines.values()), []),
        (f"modules over {LONG} lines", len(long), long),
        ("arrows between modules", sum(map(len, links.values())), []),
        ("modules in cycles", len(circling), circling),
        ("arrows between layers", sum(counts.values()), []),
        ("  pairs of layers with arrows", len(counts), []),
        ("  pairs with arrows both ways", sum((b, a) in counts for a, b in counts) // 2, []),
        *([("  arrows that go up", len(up), up)] if ordered else []),
    ]


def table(before: Mapping[str, Path], after: Mapping[str, Path]) -> str:
    """The figures of two checkouts, and what a rate passes in them, in Markdown."""
    old = {what: f"{figure:,}" for what, figure, _ in figures(before)}
    rows = [(what.strip(), old.get(what, "no order"), f"{figure:,}") for what, figure, _ in figures(after)]
    passed = [
        f"{sum(counts.values())} in {len(counts)} modules" for counts in (handled(p, "rate") for p in (before, after))
    ]
    lines = [("", "before", "after"), ("---",) * 3, *rows, ("functions that handle `rate`", *passed)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
