"""Models that torch.hub brings, with the code of their authors: it runs only if it is trusted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from oats_vision import network
from oats_vision.errors import ModelError
from oats_vision.models.library import library
from oats_vision.models.loading.provider import Loaded, Provider, Wanted
from oats_vision.models.loading.registry import provider
from oats_vision.models.source import ModelSource

if TYPE_CHECKING:
    from torch import nn


@provider
class TorchHub(Provider):
    kind = "torch_hub"

    def claims(self, name: str) -> bool:
        return name.startswith("hub:")

    def load(self, name: str, wanted: Wanted) -> Loaded:
        import timm.data

        from oats_vision.models.transforms import timm_transform_config

        wanted.check_no_size(name)
        repository, _, entry = name.removeprefix("hub:").rpartition(":")
        repository = repository or "facebookresearch/dinov2:main"
        failed = f"model {name!r} cannot be loaded"
        with network.github(failed, Path(repository).is_dir() or _has_clone(repository)):
            model = library(failed, _call, repository, entry, wanted.pretrained, wanted.trust_remote_code)
        # the preprocessing of the published evaluations: shorter side to 256, bicubic, centre crop of 224
        data = timm.data.resolve_data_config({"input_size": (3, 224, 224), "interpolation": "bicubic"})
        return model, ModelSource("torch_hub", entry, {"repository": repository}, timm_transform_config(data))

    def builder(self, source: ModelSource, trust_remote_code: bool) -> Callable[[], nn.Module]:
        repository = source.args.get("repository")
        if not isinstance(repository, str):
            raise ModelError(f"torch_hub model {source.name!r} cannot be rebuilt: it names no repository")
        return partial(_call, repository, source.name, False, trust_remote_code)


def _call(repository: str, entry: str, pretrained: bool, trust_remote_code: bool) -> nn.Module:
    """Build a model by an entry point of a GitHub repository (owner/name:ref) or of a clone in a directory."""
    import torch

    if not trust_remote_code:
        raise ModelError(f"{entry} runs code from {repository}: give `trust_remote_code=True` if you trust it")
    where: Literal["local", "github"] = "local" if Path(repository).is_dir() else "github"
    model: nn.Module = torch.hub.load(
        repository, entry, source=where, trust_repo=True, skip_validation=True, pretrained=pretrained
    )
    return model


def _has_clone(repository: str) -> bool:
    """Whether torch.hub has downloaded the GitHub repository (owner/name:ref)."""
    import torch

    place, _, ref = repository.partition(":")
    return bool(list(Path(torch.hub.get_dir()).glob(f"{place.replace('/', '_')}_{ref.replace('/', '_') or 'ma*'}")))
