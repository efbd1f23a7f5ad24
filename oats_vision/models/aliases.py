"""The names of models, for those who cannot wait for PyTorch: aliases and timm's models."""

import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from oats_vision.errors import ModelError, did_you_mean, near

_DINOV2 = {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}
_DINOV3 = {
    "vits16": "small",
    "vits16plus": "small_plus",
    "vitb16": "base",
    "vitl16": "large",
    "vith16plus": "huge_plus",
    "vit7b16": "7b",
}
ALIASES = {
    **{f"dinov2_{short}": f"vit_{size}_patch14_dinov2.lvd142m" for short, size in _DINOV2.items()},
    **{f"dinov2_{short}_reg": f"vit_{size}_patch14_reg4_dinov2.lvd142m" for short, size in _DINOV2.items()},
    **{f"dinov3_{short}": f"vit_{size}_patch16_dinov3.lvd1689m" for short, size in _DINOV3.items()},
}


@cache
def timm_models() -> tuple[str, ...]:
    """timm's models of these families that have trained weights, `architecture.weights`."""
    return tuple((Path(__file__).parent / "timm_models.txt").read_text().split())


def known_models() -> list[str]:
    """All names of models that can be listed: the demo, the aliases, timm's models with and without their weights."""
    names = timm_models()
    return ["demo", *ALIASES, *dict.fromkeys(name.partition(".")[0] for name in names), *names]


def unknown_model(name: str) -> ModelError:
    """What to say of a name that is not a model's."""
    path = Path(name)
    if path.is_file():
        return ModelError(f"{name} is a file: give the model's directory, or a .gguf file")
    if path.is_absolute() or name.startswith((".", "~")) or ("/" in name and path.parent.is_dir()):
        return ModelError(f"{name} does not exist: give a model's directory.{near(path)}")
    if name.count("/") == 1:
        return ModelError(
            f"unknown model {name!r}: there is no such directory; if it is of the Hugging Face hub give hf:{name}"
        )
    folders = [entry.name for entry in Path().iterdir() if entry.is_dir()]
    return ModelError(
        f"unknown model {name!r}: give a directory, hf:org/name, hub:entry, an alias or a timm name "
        f"(`oats-vision models` lists them).{did_you_mean(name, [*folders, *known_models()])}"
    )


def in_timm(name: str) -> bool:
    """Whether timm has a model of that name, or maps an older one; importing timm to ask it would take seconds."""
    architecture = name.partition(".")[0]
    if timm := sys.modules.get("timm"):
        return bool(timm.is_model(architecture))
    return name in known_models() or (re.fullmatch(r"\w+", architecture) is not None and _is_defined(architecture))


def _is_defined(architecture: str) -> bool:
    timm = find_spec("timm")
    name = re.escape(architecture).encode()
    definition = re.compile(rb"^def %b\(|['\"]%b['\"]: ?['\"]" % (name, name), re.MULTILINE)
    files = (Path(timm.origin).parent / "models").glob("*.py") if timm and timm.origin else ()
    return any(definition.search(file.read_bytes()) for file in files)
