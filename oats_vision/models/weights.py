"""A dense model's weights as they are loaded: random ones, their precision, and a digest to know them by."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from oats_vision.models.record import read_values


@contextmanager
def same_random_weights() -> Iterator[None]:
    """Random numbers from a fixed start; the caller's go on as if none had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # `torch.manual_seed` would seed the GPU too
        yield


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's state dict in the order of its names: name, shape and values, floating ones as float32."""
    digest = hashlib.sha256()
    for name, tensor in read_values(model, sorted(model.state_dict().items())):
        values = (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a model's weights another dtype, in place, as `from_pretrained(dtype=)` does.

    What no checkpoint holds keeps its precision: rotary frequencies are computed, and wrong if they are rounded.
    """
    stored = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model
