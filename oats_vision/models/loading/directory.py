"""Directories in timm's or Hugging Face's format."""

from pathlib import Path
from typing import Any

from oats_vision.errors import ModelError
from oats_vision.models.loading.provider import Loaded, Provider, Wanted, read_json
from oats_vision.models.loading.registry import provider

TOKENIZER = "tokenizer"  # folder of a compressed language model's directory


@provider
class Directory(Provider):
    def claims(self, name: str) -> bool:
        return Path(name).is_dir()

    def origin(self, name: str) -> str:
        return str(Path(name).resolve())

    def load(self, name: str, wanted: Wanted) -> Loaded:
        from oats_vision.models.loading import huggingface, timm

        path = Path(name)
        file = path / "config.json"
        if not file.is_file():
            raise ModelError(f"{name} is not a model directory: it has no config.json")
        config = read_json(file)
        if "format_version" in config:
            raise ModelError(f"{name} is compressed already: load it with oats_vision.load, or `oats-vision eval`")
        if isinstance(config.get("architecture"), str):
            return timm.load_directory(path, config, wanted)
        if "model_type" in config:
            return huggingface.load_repository(name, wanted)
        raise ModelError(f"{file} is neither timm's (architecture) nor Hugging Face's (model_type)")

    def load_tokenizer(self, name: str) -> Any:
        from oats_vision.models.loading.huggingface import tokenizer_at

        inside = Path(name) / TOKENIZER
        return tokenizer_at(name, str(inside if inside.is_dir() else name))
