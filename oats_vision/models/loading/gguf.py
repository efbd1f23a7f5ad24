"""Language models in llama.cpp's format, dequantised by transformers."""

from pathlib import Path
from typing import Any

from oats_vision.errors import ModelError, near
from oats_vision.models.library import library
from oats_vision.models.loading.provider import Loaded, Provider, Wanted
from oats_vision.models.loading.registry import provider


@provider
class Gguf(Provider):
    def claims(self, name: str) -> bool:
        return Path(name).suffix == ".gguf" and not name.startswith(("hf:", "hub:"))

    def origin(self, name: str) -> str:
        return str(Path(name).resolve())

    def load(self, name: str, wanted: Wanted) -> Loaded:
        import torch
        import transformers

        from oats_vision.models.loading.huggingface import source_for

        wanted.check_no_size(name)
        if not Path(name).is_file():
            raise ModelError(f"{name} does not exist.{near(name)}")
        failed, auto = f"model {name!r} cannot be loaded", transformers.AutoModelForCausalLM
        if wanted.pretrained:
            model = library(failed, auto.from_pretrained, **_place(name), dtype=torch.float32)
            # newer releases of transformers note the file that the weights, which are floats now, came from
            vars(model.config).pop("quantization_config", None)
        else:
            config = library(failed, transformers.AutoConfig.from_pretrained, **_place(name))
            model = library(failed, auto.from_config, config)
        # what was dequantised from 8 bits or fewer is stored in half precision without a loss that counts
        return model, source_for(model, dtype=torch.float16)

    def load_tokenizer(self, name: str) -> Any:
        from oats_vision.models.loading.huggingface import tokenizer_at

        return tokenizer_at(name, **_place(name))


def _place(name: str) -> dict[str, Any]:
    path = Path(name)
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
