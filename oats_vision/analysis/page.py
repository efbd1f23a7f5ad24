"""Pages that need nothing but themselves: no network, no script but our own, whatever the text in them."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from oats_vision.errors import CheckpointError
from oats_vision.files import replacing, why


def render(template: str, **values: Any) -> str:
    """A page of templates/, which may run templates/page.js and nothing else."""
    environment = Environment(
        loader=PackageLoader("oats_vision.analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    script = PackageLoader("oats_vision.analysis").get_source(environment, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(script=Markup(script), script_sha256=digest, **values)


def write_page(text: str, file: Path) -> None:
    """Write a page, all of it or nothing; a file that exists is replaced.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names may be in no encoding
    except OSError as problem:
        raise CheckpointError(f"{file} cannot be written: {why(problem)}") from None
