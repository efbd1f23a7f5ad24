"""A dense model's weights as they are loaded: random ones, their precision, and a digest to know them by."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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
        values = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(values))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values, to be hashed; no copy where it lies contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a model's weights another dtype, in place, as `from_pretrained(dtype=)` does.

    What no checkpoint holds keeps its precision: rotary frequencies are computed, and wrong if they are rounded.
    """
    stored = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model
