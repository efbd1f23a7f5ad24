"""`oats-vision models`: what can be compressed."""

import json
from typing import Annotated

import typer

from oats_vision.analysis import tables
from oats_vision.cli.common import results
from oats_vision.cli.help import DATA
from oats_vision.cli.options import Json, option
from oats_vision.compression import methods
from oats_vision.models.aliases import ALIASES, timm_models
from oats_vision.models.families import families_served

EXAMPLES = """\
  oats-vision models
  oats-vision models --search dinov2"""


def models(
    search: Annotated[
        str | None, option(DATA, metavar="WORD", help="list timm models whose name contains this")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the supported model families, the methods and the aliases."""
    citations = {method.name: method.citation for method in methods.known()}
    found = [name for name in timm_models() if search and search in name]
    if as_json:
        typer.echo(
            json.dumps({"families": families_served(), "methods": citations, "aliases": ALIASES, "found": found})
        )
        return
    console = results()
    if search:
        console.print("\n".join(found) or f"no timm model with pretrained weights has {search!r} in its name")
        return
    console.print(tables.key_values("families", families_served()))
    console.print(tables.key_values("methods", citations))
    console.print(tables.key_values("aliases", ALIASES | {"demo": "a ViT for Fashion-MNIST, inside the package"}))
    console.print(
        "Any timm name of these families works too (--search NAME lists them), hf:org/name, hub:entry, a path."
    )
