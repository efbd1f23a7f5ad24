"""The names of models, for those who cannot wait for PyTorch: families, aliases and timm's models."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from oats_vision.errors import ModelError, did_you_mean, near

_LANGUAGE = {
    "lm_llama": "Llama, SmolLM and others of class Llama*",
    "lm_mistral": "Mistral",
    "lm_qwen2": "Qwen2 and Qwen2.5",
    "lm_qwen3": "Qwen3",
    "lm_phi3": "Phi-3 and Phi-4",
    "lm_gemma": "Gemma",
    "lm_opt": "OPT",
    "lm_gpt2": "GPT-2",
    "lm_gpt_neox": "GPT-NeoX and Pythia",
    "lm_mixtral": "Mixtral",
    "lm_qwen3_moe": "Qwen3 mixtures of experts",
    "lm_olmoe": "OLMoE",
}
# names of the shipped adapters, in the order in which they are asked, and the models that each is for
SERVES = {
    "timm_vit": "timm VisionTransformer: ViT, DeiT, DINOv2 with and without registers, SigLIP, CLIP, AugReg",
    "timm_eva": "timm Eva: DINOv3, EVA-02, Perception Encoder",
    "hf_vit": "Hugging Face ViT and DeiT checkpoints of class ViT*",
    "hf_deit": "Hugging Face DeiT",
    "hf_dinov2": "Hugging Face Dinov2*",
    "hf_dinov2_with_registers": "Hugging Face Dinov2WithRegisters*",
    "hf_dinov3": "Hugging Face DINOv3ViT*",
    "hf_clip": "Hugging Face CLIP vision towers",
    "hf_siglip": "Hugging Face SigLIP vision towers",
    "dinov2_hub": "facebookresearch/dinov2 from torch.hub",
    "dinov3_hub": "facebookresearch/dinov3 from torch.hub",
    **{name: f"Hugging Face causal language models: {models}" for name, models in _LANGUAGE.items()},
}

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
    """What to say of a name that is no model's."""
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


def check_model(name: str) -> None:
    """See that a name may be a model's, in milliseconds: `load_model` has the last word.

    Raises:
        ModelError: it is not.
    """
    path = Path(name)
    if not (name.startswith(("hf:", "hub:")) or name in known_models() or path.suffix == ".gguf" or path.is_dir()):
        architecture = name.partition(".")[0]
        if not re.fullmatch(r"\w+", architecture) or not _in_timm(architecture):
            raise unknown_model(name)


def _in_timm(architecture: str) -> bool:
    """Whether timm's code defines such a model, or maps an older name; importing timm would take seconds."""
    timm = find_spec("timm")
    name = re.escape(architecture).encode()
    definition = re.compile(rb"^def %b\(|['\"]%b['\"]: ?['\"]" % (name, name), re.MULTILINE)
    files = (Path(timm.origin).parent / "models").glob("*.py") if timm and timm.origin else ()
    return any(definition.search(file.read_bytes()) for file in files)
